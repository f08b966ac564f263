"""``vpt depth-tokenizer decode``: the depth map that a text stands for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vpt.cli.depth_tokenizer_encode import add_tokenizer_argument
from vpt.cli.output import check_targets, print_err, write_file
from vpt.cli.parser import Command
from vpt.errors import PromptError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "text", metavar="TEXT", help="<DEPTH_START>...<DEPTH_END>, or - to read it from stdin"
    )
    add_tokenizer_argument(parser)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="to write: .png of 16 bits"
    )


def _decode(args: argparse.Namespace) -> None:
    """Parse, decode, write."""
    if args.out.suffix.lower() != ".png":
        raise PromptError(f"--out: expected a name that ends in .png, got {args.out}")
    check_targets({"--out": args.out})
    from vpt.depth.maps import write_map
    from vpt.depth.tokenizer import load_depth_tokenizer

    text = sys.stdin.read() if args.text == "-" else args.text
    tokenizer = load_depth_tokenizer(args.tokenizer)
    depth = tokenizer.from_text(text)
    write_file(lambda file: write_map(depth, file), args.out)
    print_err(f"wrote {args.out}, {tokenizer.config.size_px} pixels a side; near is bright")


COMMAND = Command(
    help="turn tokens into a depth map",
    description="Turn the tokens of a depth map, as a model writes them, into a picture of it.",
    examples=(
        "example:\n"
        "  vpt depth-tokenizer encode map.png --tokenizer data/depth-tokenizer |\n"
        "    vpt depth-tokenizer decode - --tokenizer data/depth-tokenizer --out back.png"
    ),
    add_arguments=_add_arguments,
    run=_decode,
)
