"""``vpt serve``: the model over HTTP, for every client of OpenAI's API."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli.demo import check_port
from vpt.cli.model import (
    add_finders,
    add_model_arguments,
    check_model_arguments,
    load_options,
    load_runtime,
    print_loading,
)
from vpt.cli.output import print_err
from vpt.cli.parser import (
    EXIT_BUG,
    Command,
    add_flag,
    add_value,
    comma_list,
    number,
    whole_number,
)
from vpt.errors import PromptError

if TYPE_CHECKING:
    from vpt.runtime import Runtime

NO_FASTAPI = 'the server needs FastAPI; pip install -e ".[serve]"'
NO_RAY = '--replicas needs Ray; pip install -e ".[serve,ray]"'
LOG_LEVELS = ("debug", "info", "warning", "error")
ENV_KEY = "VPT_API_KEY"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    local = "127.0.0.1"
    http = parser.add_argument_group("server")
    add_value(http, "--host", "H", str, f"address to listen at (default: {local})", local)
    add_value(http, "--port", "N", whole_number(0), "port to listen at", 8000)
    key = f"key that clients must send (default: {ENV_KEY} of the environment, or none)"
    add_value(http, "--api-key", "KEY", str, key)
    name = "name of the model for clients (default: the last part of --model)"
    add_value(http, "--served-model-name", "NAME", str, name)
    origins = "origins of web pages that may call the server, with commas between, or * for all"
    add_value(http, "--cors-origins", "URLS", comma_list, origins, ())
    domains = "hosts from which images are fetched, with commas between (default: none)"
    add_value(http, "--allowed-media-domains", "HOSTS", comma_list, domains, ())
    add_value(http, "--max-body-mb", "N", whole_number(1), "largest body of a request, in MB", 32)
    traces = "number of the latest traces, with pictures, that clients may fetch"
    add_value(http, "--keep-traces", "N", whole_number(0), traces, 0)
    http.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="default: info")
    add_finders(parser, has_default=False)
    load = parser.add_argument_group("load")
    add_value(load, "--max-num-seqs", "N", whole_number(1), "requests that run at once", 16)
    longest = "tokens of a request with its images, looks and answer (default: as memory permits)"
    add_value(load, "--max-model-len", "N", whole_number(1), longest)
    add_value(load, "--max-queue", "N", whole_number(0), "requests that wait for their turn", 64)
    grace = "seconds for running requests after SIGTERM"
    add_value(load, "--grace", "S", number(0), grace, 30)
    _add_scaling_arguments(parser)
    add_flag(load, "--exit-on-error", "exit, with 1, if the model's thread ends with an error")


def _add_scaling_arguments(parser: argparse.ArgumentParser) -> None:
    scaling = parser.add_argument_group("scaling out, over Ray")
    number_of = "models, each on a device of its own, on this host or the cluster of RAY_ADDRESS"
    add_value(scaling, "--replicas", "N", whole_number(1), number_of)
    automatic = (
        "JSON of Ray Serve's AutoscalingConfig, in place of --replicas, such as "
        '\'{"min_replicas": 1, "max_replicas": 4}\''
    )
    add_value(scaling, "--autoscaling", "JSON", _json_object, automatic)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected an object of JSON such as {{}}, not {text!r}")
    return value


def _run(args: argparse.Namespace) -> int | None:
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client")):
        raise PromptError(NO_FASTAPI)
    check_port(args.host, args.port)
    check_model_arguments(args)
    key = os.environ.get(ENV_KEY) if args.api_key is None else args.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise PromptError("the API key must be printable ASCII without spaces at its ends")
    limits = {
        "max_num_seqs": args.max_num_seqs,
        "max_model_len": args.max_model_len,
        "allowed_media_domains": args.allowed_media_domains,
    }
    if args.replicas or args.autoscaling is not None:
        _serve_replicas(args, {**load_options(args), **limits}, _settings(args, key))
        return None
    print_loading(args)
    runtime = load_runtime(args, **limits)
    _start_logging(args.log_level)
    return _serve(runtime, args, _settings(args, key))


def _settings(args: argparse.Namespace, key: str | None) -> dict[str, Any]:
    """Arguments of :class:`vpt.serving.app.Settings`."""
    return {
        "served_model_name": args.served_model_name or "",
        "api_key": key,
        "max_queue": args.max_queue,
        "cors_origins": args.cors_origins,
        "max_body_bytes": args.max_body_mb * 2**20,
        "num_traces": args.keep_traces,
    }


def _serve_replicas(
    args: argparse.Namespace, load: dict[str, Any], settings: dict[str, Any]
) -> None:
    if find_spec("ray") is None or find_spec("ray.serve") is None:
        raise PromptError(NO_RAY)
    if args.replicas and args.autoscaling is not None:
        raise PromptError("--replicas and --autoscaling exclude each other; give one of them")
    if args.device and ":" in args.device:
        raise PromptError(f"each replica has a device of its own; --device {args.device} names one")
    from vpt.serving import replicas

    if args.model and Path(args.model).exists():
        load["path_or_id"] = str(Path(args.model).resolve())
    scaling = {"autoscaling": args.autoscaling} if args.replicas is None else {}
    options = {"load": load, "settings": settings, "replicas": args.replicas, **scaling}
    replicas.start({**options, "grace": args.grace}, args.host.strip("[]"), args.port)
    ended = threading.Event()
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda *_: ended.set())
    print_err(f"serving replicas at http://{args.host}:{args.port}/v1")
    ended.wait()
    replicas.stop()


def _start_logging(level: str) -> None:
    """Send our own log, and the server's, to stderr."""
    logging.disable(logging.NOTSET)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("vpt", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())


def _serve(runtime: Runtime, args: argparse.Namespace, settings: dict[str, Any]) -> int | None:
    import uvicorn

    from vpt.serving.app import Settings, create_app

    app = create_app(runtime, Settings(**settings))
    desk = app.state.server.desk

    class Draining(uvicorn.Server):
        """Refuses new requests after a signal, and ends when the running ones have."""

        _drained_at: float | None = None

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.force_exit = self._drained_at is not None  # the second signal
            desk.is_draining = True
            self._drained_at = self._drained_at or time.monotonic() + args.grace

        async def on_tick(self, counter: int) -> bool:
            has_failed = args.exit_on_error and desk.worker.error is not None
            if has_failed and self._drained_at is None:
                self._drained_at = time.monotonic() + 1
            if self._drained_at is not None:
                is_late = self.force_exit or time.monotonic() >= self._drained_at
                self.should_exit = is_late or not (desk.num_open or has_failed)
            return await super().on_tick(counter)

    config = uvicorn.Config(
        app,
        args.host.strip("[]"),
        args.port,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    print_err(f"serving {app.state.server.model_name} at http://{args.host}:{args.port}/v1")
    Draining(config).run()
    runtime.close()
    return EXIT_BUG if args.exit_on_error and desk.worker.error is not None else None


COMMAND = Command(
    help="serve the model over OpenAI's API",
    description=(
        "Answer requests of OpenAI's clients: chat completions and responses, streamed or not.\n"
        "Only this machine can reach the server, unless --host says otherwise."
    ),
    examples=(
        "examples:\n  vpt serve\n"
        "  vpt serve --model ./my-model --device cuda --host 0.0.0.0 --api-key SECRET"
    ),
    add_arguments=_add_arguments,
    run=_run,
)
