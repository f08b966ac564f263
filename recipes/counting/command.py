"""``python -m recipes make-counting-scenes``: generated pictures of things to count."""

from __future__ import annotations

import argparse
from functools import partial

from recipes.splits import add_scene_arguments, write_both_splits
from vpt.cli.parser import Command
from vpt.errors import PromptError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_scene_arguments(
        parser, 336, 1, "side of the pictures, 96 to 1024; 336 is the grid of the boxes"
    )
    parser.add_argument(
        "--one-of-each",
        action="store_true",
        help="3 to 5 things, each of another kind, to learn to find things by name",
    )


def _make(args: argparse.Namespace) -> None:
    from recipes.counting.files import ANNOTATIONS, write_counting_scenes
    from recipes.counting.scenes import LEAST_SIZE_PX, MOST_SIZE_PX, SPLITS

    if not LEAST_SIZE_PX <= args.size <= MOST_SIZE_PX:
        raise PromptError(
            f"--size: expected {LEAST_SIZE_PX} to {MOST_SIZE_PX} pixels, got {args.size}"
        )
    write = partial(write_counting_scenes, one_of_each=args.one_of_each)
    write_both_splits(args, SPLITS, write, ANNOTATIONS)


COMMAND = Command(
    help="make pictures of things to count, annotated as LVIS annotates",
    description=(
        "Draw 2 to 9 things of one kind among others of other kinds, on drawn backgrounds. Writes\n"
        "DIR/train and DIR/heldout, each with images/*.jpg and annotations.json in the format of\n"
        "LVIS: images, annotations (bbox is left, top, width, height) and categories. The same\n"
        "command gives the same scenes; it resumes a stopped run."
    ),
    examples=(
        "example:\n"
        "  python -m recipes make-counting-scenes --out data/counting --num 3000 --seed 0\n"
        "  vpt data make-counting-rows data/counting/train/annotations.json \\\n"
        "    --images data/counting/train/images --out data/counting-rows"
    ),
    add_arguments=_add_arguments,
    run=_make,
)
