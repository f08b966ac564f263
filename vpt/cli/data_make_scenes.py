"""``vpt data make-scenes``: generated pictures whose depth is known."""

from __future__ import annotations

import argparse
from pathlib import Path

from vpt.cli.parser import Command, whole_number
from vpt.cli.progress import with_bar
from vpt.cli.terminal import say
from vpt.errors import PromptError
from vpt.wording import count_words

_LEAST_SIZE_PX = 64


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
        type=whole_number(_LEAST_SIZE_PX),
        default=320,
        metavar="PX",
        help="side of the pictures (default: 320, what the depth tokenizer reads)",
    )
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")


def _make(args: argparse.Namespace) -> None:
    """Draw both splits; what an earlier run has drawn is kept."""
    for folder in (args.out, *args.out.parents):
        if folder.exists() and not folder.is_dir():
            raise PromptError(f"--out: {folder} is a file; expected a folder")
    from vpt.depth.rendering import SPLITS
    from vpt.depth.scene_files import OBJECTS, write_scenes

    for split, num_scenes in zip(SPLITS, (args.num, args.heldout), strict=True):
        folder = args.out / split
        scenes = write_scenes(folder, split, num_scenes, args.seed, args.size)
        try:
            for _ in with_bar(scenes, num_scenes, f"{split} scenes"):
                pass
        except OSError as exc:
            raise PromptError(f"cannot write {folder}: {exc.strerror or exc}") from exc
        say(f"{count_words(num_scenes, 'scene')} in {folder}, described in {folder / OBJECTS}")


COMMAND = Command(
    help="make pictures whose depth is known",
    description=(
        "Draw scenes by casting rays: things of several shapes and colors that stand at several\n"
        "distances in rooms and yards. Writes DIR/train and DIR/heldout, each with images/*.jpg,\n"
        "depth/*.png (16 bits, near is bright) and objects.jsonl, one line per scene. The same\n"
        "command gives the same scenes; it goes on where it was stopped."
    ),
    examples=(
        "example:\n"
        "  vpt data make-scenes --out data/scenes --num 3000 --seed 0\n"
        "  vpt depth-tokenizer train --maps data/scenes/train/depth \\\n"
        "    --heldout data/scenes/heldout/depth --out data/depth-tokenizer"
    ),
    add_arguments=_add_arguments,
    run=_make,
)
