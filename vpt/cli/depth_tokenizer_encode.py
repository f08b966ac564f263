"""``vpt depth-tokenizer encode``: depth maps as the text that a model writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vpt.cli.depth_tokenizer_maps import add_depth_model_arguments, load_estimator
from vpt.cli.output import print_out
from vpt.cli.parser import Command
from vpt.errors import PromptError
from vpt.protocol.content import format_depth


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the tokenizer."""
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=Path,
        metavar="FOLDER_OR_PTH",
        help="as `train` wrote it, or released weights",
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="depth maps: PNG of 8 or 16 bits, .npy"
    )
    add_tokenizer_argument(parser)
    photos = parser.add_argument_group("photos")
    photos.add_argument(
        "--estimate", action="store_true", help="the files are photos; estimate their depth first"
    )
    add_depth_model_arguments(photos)
    parser.add_argument("--json", action="store_true", help="codes and text, one object per file")


def _encode(args: argparse.Namespace) -> None:
    """Read, encode, print."""
    if not args.estimate and args.depth_model:
        raise PromptError("--depth-model needs --estimate; depth maps need no model")
    from vpt.depth.maps import read_map
    from vpt.depth.tokenizer import load_depth_tokenizer
    from vpt.images import load_image

    tokenizer = load_depth_tokenizer(args.tokenizer)
    estimator = load_estimator(args) if args.estimate else None
    for file in args.files:
        if estimator:
            depth = estimator.estimate(load_image(file).pixels)
        else:
            depth = read_map(file, distances=args.distances)
        codes = tokenizer.encode(depth)
        text = format_depth(codes, tokenizer.config.num_codes, tokenizer.config.num_cells)
        row = {"file": str(file), "codes": codes, "text": text}
        print_out(json.dumps(row, ensure_ascii=False) if args.json else text)


COMMAND = Command(
    help="turn depth maps, or the depth of photos, into tokens",
    description=(
        "Turn depth maps, or the depth that a model sees in photos, into tokens: a line\n"
        "<DEPTH_START><DEPTH_12>...<DEPTH_END> on stdout for each file. Maps of any shape are\n"
        "stretched to a square; near is bright, unless they hold --distances."
    ),
    examples=(
        "examples:\n"
        "  vpt depth-tokenizer encode map.png --tokenizer data/depth-tokenizer\n"
        "  vpt depth-tokenizer encode photo.jpg --estimate --tokenizer vae-final.pt --json"
    ),
    add_arguments=_add_arguments,
    run=_encode,
)
