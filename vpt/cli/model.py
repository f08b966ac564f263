"""Arguments of several commands: which model, on what device, and how it answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vpt.cli.output import print_status
from vpt.cli.parser import add_path, add_value, number, path_or_other, whole_number
from vpt.errors import PromptError, is_out_of_memory
from vpt.inference.request import OPTIONS, Option
from vpt.model.folder import check_depth_tokenizer, check_model
from vpt.released import DEFAULT_DETECTOR, DEFAULT_SEGMENTER

if TYPE_CHECKING:
    from vpt.runtime import Runtime

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "mps", "xpu")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`load_options` reads."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        type=path_or_other,
        metavar="M",
        help="folder or hub id; by default the small embedded model, which knows its own kind of "
        "images only (`vpt --list-models` lists others)",
    )
    model.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    add_value(
        model, "--device", "D", _device, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )
    longest = (
        "longer side to which images are shrunk before the model sees them, 0 for no limit "
        "(default: as the model says; released models: 512)"
    )
    add_value(model, "--image-resolution", "N", whole_number(0), longest)
    decoder = "decoder of the depth maps that the model writes (default: the one in its folder)"
    add_path(model, "--depth-tokenizer", "DIR_OR_PTH", decoder)
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="data type of the weights")


def add_finders(parser: argparse.ArgumentParser, *, has_default: bool = True) -> None:
    """Add the detector that finds phrases, and the segmenter that finds objects."""
    group = parser.add_argument_group("phrases and objects")
    kinds = "a folder or hub id in transformers' format, or a file *.pth of released weights"
    finders = {
        "--detector": (f"GroundingDINO: {kinds}", DEFAULT_DETECTOR),
        "--segmenter": (f"SAM: {kinds}", DEFAULT_SEGMENTER),
    }
    for option, (which, source) in finders.items():
        default = source if has_default else None
        about = f"{which} (default: {default or 'none'})"
        add_value(group, option, "PATH_OR_ID", path_or_other, about, default)


def add_request_arguments(
    group: argparse._ArgumentGroup,
    names: Sequence[str],
    unset: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Add one argument per option of a request, by their names.

    Options in ``unset`` are ``None`` if not given; the help shows the text there as the default.
    """
    for name in names:
        option, words = OPTIONS[name], name.replace("_", "-")
        if option.kind is bool:
            flag, action = f"--{words}", "store_true"
            if option.default:
                flag, action = f"--no-{words}", "store_false"
            group.add_argument(flag, dest=name, action=action, help=option.help)
            continue
        shown = unset.get(name, f"{option.default:g}" if option.kind is float else option.default)
        group.add_argument(
            f"--{words}",
            default=None if name in unset else option.default,
            metavar=option.metavar,
            help=f"{option.help} (default: {shown})",
            choices=option.choices or None,
            type=_parser_of(option),
        )


def _parser_of(option: Option) -> Callable[[str], Any]:
    if option.choices:
        return option.canonical
    return number(option.least, option.most) if option.kind is float else whole_number(option.least)


def check_model_arguments(args: argparse.Namespace) -> None:
    """Check the arguments of :func:`add_model_arguments` as far as that needs no torch.

    Raises:
        PromptError: if they do not fit each other.
        CheckpointError: if a folder or file that they name is missing or of another kind.
    """
    if args.revision and not args.model:
        raise PromptError("--revision needs --model; the embedded model has no revisions")
    if args.model:
        check_model(args.model)
    if args.depth_tokenizer:
        check_depth_tokenizer(args.depth_tokenizer)


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of :func:`vpt.loading.load`."""
    names = ("device", "dtype", "image_resolution", "depth_tokenizer")
    options = {"path_or_id": args.model, **{name: getattr(args, name) for name in names}}
    options |= {name: getattr(args, name) for name in ("detector", "segmenter") if name in args}
    return {**options, "revision": args.revision} if args.revision else options


def print_loading(args: argparse.Namespace) -> None:
    """Name, on a terminal, the model that is about to be loaded; importing torch takes seconds."""
    print_status(f"loading {args.model or 'the embedded model'} ...")


def load_runtime(args: argparse.Namespace, **options: Any) -> Runtime:
    """Load the model that the arguments name, if its device exists, with further options."""
    import vpt

    quieten(args)
    if args.device:
        _check_device(args.device)
    return vpt.load(**load_options(args), **options)


def quieten(args: argparse.Namespace) -> None:
    """Keep transformers' bars and messages out of the way, unless ``--verbose`` asks for them."""
    from transformers.utils import logging

    if not args.verbose:
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in DEVICES or not (index.isdigit() if ":" in text else not index):
        raise argparse.ArgumentTypeError(
            f"unknown device {text!r}; expected {', '.join(DEVICES)}, or one with an index "
            "as in cuda:1"
        )
    return text


def _check_device(name: str) -> None:
    import torch

    kind = name.partition(":")[0]
    try:
        if kind == "cuda" and not torch.cuda.is_available():  # asking is quieter than trying
            raise RuntimeError("torch finds no CUDA device")
        torch.empty(1, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as exc:
        if is_out_of_memory(exc):
            raise
        reason = str(exc).strip().splitlines()[0]
        raise PromptError(f"device {name} is not there: {reason}; try --device cpu") from exc
