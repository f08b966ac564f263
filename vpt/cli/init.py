"""``vpt init``: a VPT model made of a Qwen2-VL one, in a folder of its own."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from vpt.cli.files import write_file
from vpt.cli.model import DTYPES, quieten
from vpt.cli.parser import Command, whole_number, words
from vpt.cli.set import add_training_arguments, check_training_settings, training_settings
from vpt.cli.terminal import put
from vpt.errors import CheckpointError, PromptError
from vpt.tokens import ENCODER_TO_BRANCH, RELEASED_GRID_SIZE, branches_named, perception_tokens


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", required=True, metavar="ID_OR_FOLDER", help="a Qwen2-VL model to start from"
    )
    parser.add_argument(
        "--branches",
        required=True,
        type=_branches,
        metavar="LIST",
        help=f"out of {','.join(ENCODER_TO_BRANCH)}; regions can always be asked for, so an "
        "empty list is possible",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--dino", metavar="ID", help="DINOv2 encoder, if not the released one")
    parser.add_argument("--sam", metavar="ID_OR_PTH", help="SAM encoder, if not the released one")
    parser.add_argument(
        "--grid-size",
        type=whole_number(1),
        default=RELEASED_GRID_SIZE,
        metavar="K",
        help=f"cells per side of the region grid (default: {RELEASED_GRID_SIZE})",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights")
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="S", help="of what is drawn (default: 0)"
    )
    add_training_arguments(parser)
    parser.add_argument("--force", action="store_true", help="write into a folder that has files")
    parser.add_argument(
        "--verbose", action="store_true", help="show library messages and tracebacks"
    )


def _branches(text: str) -> tuple[str, ...]:
    names = words(text)
    try:
        branches_named(names)
    except CheckpointError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return names


def _init(args: argparse.Namespace) -> None:
    """Check the arguments, build, save, and say what was made."""
    encoders = _checked_encoders(args)
    settings = training_settings(args)
    check_training_settings(
        {"alignment": False, "para_mask_id": 0, **settings}, has_ratio=args.mask_ratio is not None
    )
    quieten(args)
    from vpt.building import build_from_base

    model, processor = build_from_base(
        args.base,
        args.branches,
        encoders=encoders,
        grid_size=args.grid_size,
        dtype=args.dtype,
        seed=args.seed,
    )
    for name, value in settings.items():
        setattr(model.config, name, value)
    write_file(model.save_pretrained, args.out)
    write_file(processor.save_pretrained, args.out)
    special, ordinary = perception_tokens(branches_named(args.branches), args.grid_size)
    num_all = sum(parameter.numel() for parameter in model.parameters())
    num_new = sum(parameter.numel() for parameter in model.projectors.parameters())
    put(f"made {args.out} of {args.base}")
    put(f"  branches    {', '.join(['region', *args.branches])}")
    put(f"  parameters  {num_all:,}, of which {num_new:,} in untrained projectors")
    put(f"  tokens      {len(special) + len(ordinary)} for perception, untrained")
    put(f'ask it:  vpt ask --model {shlex.quote(str(args.out))} photo.jpg "What is this?"')


def _checked_encoders(args: argparse.Namespace) -> dict[str, str]:
    """Encoders that are not the released ones, once folder and branches are found to be fine."""
    if args.out.exists() and not args.out.is_dir():
        raise PromptError(f"--out: {args.out} is a file; expected a folder")
    if args.out.is_dir() and any(args.out.iterdir()) and not args.force:
        raise PromptError(
            f"--out: {args.out} is not empty; choose another folder, or --force to write into it"
        )
    encoders = {name: source for name in ("dino", "sam") if (source := getattr(args, name))}
    if stray := [name for name in encoders if name not in args.branches]:
        raise PromptError(f"--{stray[0]} is given, but {stray[0]} is not among --branches")
    return encoders


COMMAND = Command(
    help="make a VPT model of a Qwen2-VL one",
    description=(
        "Make a VPT model of a Qwen2-VL one: add perception tokens, vision branches and\n"
        "projectors. What is added is untrained."
    ),
    examples=(
        "example:\n"
        "  vpt init --base Qwen/Qwen2-VL-2B-Instruct --branches clip,dino --out ./my-model"
    ),
    add_arguments=_add_arguments,
    run=_init,
)
