"""``vpt data make-counting-scenes``: generated pictures whose boxes and numbers are known."""

from __future__ import annotations

import argparse
from pathlib import Path

from vpt.cli.parser import Command, whole_number
from vpt.cli.progress import with_bar
from vpt.cli.terminal import say
from vpt.errors import PromptError
from vpt.wording import count_words


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--num", type=whole_number(1), default=3000, metavar="N", help="to train on (default: 3000)"
    )
    parser.add_argument(
        "--heldout",
        type=whole_number(0),
        default=300,
        metavar="N",
        help="to measure on; none of them is among those to train on (default: 300)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="S", help="of all scenes (default: 0)"
    )
    parser.add_argument(
        "--size",
        type=whole_number(1),
        default=336,
        metavar="PX",
        help="side of the pictures, 96 to 1024 (default: 336, the grid of the boxes)",
    )
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")


def _make(args: argparse.Namespace) -> None:
    """Draw both splits; what an earlier run has drawn is kept."""
    from vpt.data.aurora.counting_scene_files import ANNOTATIONS, write_counting_scenes
    from vpt.data.aurora.counting_scenes import LEAST_SIZE_PX, MOST_SIZE_PX, SPLITS

    if not LEAST_SIZE_PX <= args.size <= MOST_SIZE_PX:
        raise PromptError(
            f"--size: expected {LEAST_SIZE_PX} to {MOST_SIZE_PX} pixels, got {args.size}"
        )
    for folder in (args.out, *args.out.parents):
        if folder.exists() and not folder.is_dir():
            raise PromptError(f"--out: {folder} is a file; expected a folder")
    for split, num_scenes in zip(SPLITS, (args.num, args.heldout), strict=True):
        folder = args.out / split
        scenes = write_counting_scenes(folder, split, num_scenes, args.seed, args.size)
        try:
            for _ in with_bar(scenes, num_scenes, f"{split} scenes"):
                pass
        except OSError as exc:
            raise PromptError(f"cannot write {folder}: {exc.strerror or exc}") from exc
        say(f"{count_words(num_scenes, 'scene')} in {folder}, annotated in {folder / ANNOTATIONS}")


COMMAND = Command(
    help="make pictures of things to count, annotated as LVIS annotates",
    description=(
        "Draw 1 to 8 things of one kind among others of other kinds, on drawn backgrounds. Writes\n"
        "DIR/train and DIR/heldout, each with images/*.jpg and annotations.json in the format of\n"
        "LVIS: images, annotations (bbox is left, top, width, height) and categories. The same\n"
        "command gives the same scenes; it goes on where it was stopped."
    ),
    examples=(
        "example:\n"
        "  vpt data make-counting-scenes --out data/counting --num 3000 --seed 0\n"
        "  vpt data make-counting-rows data/counting/train/annotations.json \\\n"
        "    --images data/counting/train/images --out data/counting-rows"
    ),
    add_arguments=_add_arguments,
    run=_make,
)
