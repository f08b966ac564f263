"""``python -m recipes make-scenes``: generated pictures whose depth is known."""

from __future__ import annotations

import argparse

from recipes.splits import add_scene_arguments, write_both_splits
from vpt.cli.parser import Command

_LEAST_SIZE_PX = 64


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_scene_arguments(
        parser, 320, _LEAST_SIZE_PX, "side of the pictures; 320 is that of the depth tokenizer"
    )


def _make(args: argparse.Namespace) -> None:
    from recipes.scenes.files import write_scenes
    from recipes.scenes.rendering import SPLITS
    from vpt.data.depth_rows import OBJECTS

    write_both_splits(args, SPLITS, write_scenes, OBJECTS)


COMMAND = Command(
    help="make pictures whose depth is known",
    description=(
        "Draw scenes by casting rays: things of several shapes and colors that stand at several\n"
        "distances in rooms and yards. Writes DIR/train and DIR/heldout, each with images/*.jpg,\n"
        "depth/*.png (16 bits, near is bright) and objects.jsonl, one line per scene. The same\n"
        "command gives the same scenes; it resumes a stopped run."
    ),
    examples=(
        "example:\n"
        "  python -m recipes make-scenes --out data/scenes --num 3000 --seed 0\n"
        "  vpt depth-tokenizer train --maps data/scenes/train/depth \\\n"
        "    --heldout data/scenes/heldout/depth --out data/depth-tokenizer"
    ),
    add_arguments=_add_arguments,
    run=_make,
)
