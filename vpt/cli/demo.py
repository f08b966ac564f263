"""``vpt demo``: a page in the browser, where one sees the model look again."""

from __future__ import annotations

import argparse
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vpt.cli.model import (
    add_finders,
    add_model_arguments,
    check_model_arguments,
    load_runtime,
    print_loading,
)
from vpt.cli.output import print_err, print_status
from vpt.cli.parser import Command, add_flag, add_value, whole_number
from vpt.errors import CheckpointError, PromptError
from vpt.released import DEFAULT_DETECTOR, DEFAULT_SEGMENTER

if TYPE_CHECKING:
    from vpt.demo.remote import Model

NO_GRADIO = 'the demo needs gradio; pip install -e ".[demo]"'


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_finders(parser)
    page = parser.add_argument_group("page")
    local = "127.0.0.1"
    add_value(page, "--host", "H", str, f"address to listen at (default: {local})", local)
    add_value(page, "--port", "N", whole_number(0), "port to listen at", 7860)
    add_flag(page, "--share", "also make a public link through gradio's servers")
    anyway = "serve the page even if the model cannot be loaded: it says why, and replays traces"
    add_flag(page, "--anyway", anyway)
    server = "ask the model of `vpt serve` there instead of loading one; key: VPT_API_KEY"
    add_value(page, "--server", "URL", str, server)


def _run(args: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise PromptError(NO_GRADIO)
    check_port(args.host, args.port)
    model = _load(args) if args.server is None else _connect(args)
    from vpt.demo.page import serve

    serve(model, args.host, args.port, share=args.share)


def _connect(args: argparse.Namespace) -> Model:
    names = ("model", "revision", "device", "image_resolution", "depth_tokenizer", "anyway")
    defaults = {"detector": DEFAULT_DETECTOR, "segmenter": DEFAULT_SEGMENTER}
    for name in (*names, *defaults):
        if getattr(args, name) and getattr(args, name) != defaults.get(name):
            option = name.replace("_", "-")
            raise PromptError(f"--{option} is for a model that is loaded here; not with --server")
    from vpt.demo.remote import RemoteModel

    model = RemoteModel(args.server)
    print_status(f"asking {model.name} at {model.url}")
    return model


def _load(args: argparse.Namespace) -> Model | CheckpointError:
    try:
        check_model_arguments(args)
    except CheckpointError:
        if not args.anyway:  # else loading raises it again, for the page to show
            raise
    print_loading(args)
    try:
        return load_runtime(args)
    except CheckpointError as exc:
        if not args.anyway:
            raise
        print_err(f"error: {exc}")
        return exc


def check_port(host: str, port: int) -> None:
    """Listen for a moment: the server would find a busy port only once the model is loaded."""
    if port > 65535:
        raise PromptError(f"--port must be at most 65535, not {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), port), family=family).close()
    except OSError as exc:
        raise PromptError(
            f"cannot listen at {host}, port {port}: {exc.strerror or exc}; end the program that "
            "uses the port, or choose another with --port or --host"
        ) from exc


COMMAND = Command(
    help="see the model look again, in the browser",
    description=(
        "Serve a page on which the model answers questions about images, and shows each of\n"
        "its calls. Only this machine can open it, unless --host or --share say otherwise."
    ),
    examples="examples:\n  vpt demo\n  vpt demo --model ./my-model --device cuda --port 8000"
    "\n  vpt demo --server http://127.0.0.1:8000",
    add_arguments=_add_arguments,
    run=_run,
)
