"""What the commands that draw scenes share: their arguments, and the writing of both splits."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vpt.cli.output import check_out_folder, print_err, progress
from vpt.cli.parser import whole_number
from vpt.errors import PromptError
from vpt.view.wording import count_words

WriteScenes = Callable[[Path, str, int, int, int], Iterator[int]]
"""Folder, split, number, seed and side in pixels -> the number of each scene, when it is done."""


def add_scene_arguments(
    parser: argparse.ArgumentParser, size_px: int, least_px: int, size_help: str
) -> None:
    """Add where to, how many, which seed and how large.

    Args:
        parser: of the command.
        size_px: side of the pictures unless told.
        least_px: the smallest.
        size_help: what the sides mean.
    """
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
        "--size", type=whole_number(least_px), default=size_px, metavar="PX", help=size_help
    )


def write_both_splits(
    args: argparse.Namespace, splits: Sequence[str], write: WriteScenes, described: str
) -> None:
    """Draw what is to train on and what is to measure on; what an earlier run has drawn is kept.

    Args:
        args: of :func:`add_scene_arguments`.
        splits: their names.
        write: draws one.
        described: name of the file, in each folder, that says what is in the pictures.

    Raises:
        PromptError: if a folder cannot be written or holds other scenes.
    """
    check_out_folder(args.out)
    for split, num_scenes in zip(splits, (args.num, args.heldout), strict=True):
        folder = args.out / split
        scenes = write(folder, split, num_scenes, args.seed, args.size)
        try:
            for _ in progress(scenes, num_scenes, f"{split} scenes"):
                pass
        except OSError as exc:
            raise PromptError(f"cannot write {folder}: {exc.strerror or exc}") from exc
        number = count_words(num_scenes, "scene")
        print_err(f"{number} in {folder}, described in {folder / described}")
