"""Arguments of the commands that draw scenes, and folders of scenes for training and held out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from vpt.cli.output import check_out_folder, print_err, progress
from vpt.cli.parser import add_path, add_value, whole_number
from vpt.errors import PromptError
from vpt.view.wording import count_text

WriteScenes = Callable[[Path, str, int, int, int, int], Iterator[int]]
"""Folder, split, how many, seed, side in pixels and processes -> the number of each scene done."""

_CHUNK = 32  # scenes per task of a process


def add_scene_arguments(
    parser: argparse.ArgumentParser, size_px: int, least_px: int, size_help: str
) -> None:
    """Add ``--out``, ``--num``, ``--heldout``, ``--seed``, ``--size`` and ``--workers``."""
    add_path(parser, "--out", "DIR", "folder to write", required=True)
    add_value(parser, "--num", "N", whole_number(1), "scenes for training", 3000)
    heldout = "scenes for evaluation, none of which is among those for training"
    add_value(parser, "--heldout", "N", whole_number(0), heldout, 300)
    add_value(parser, "--seed", "S", whole_number(0), "of all scenes", 0)
    add_value(parser, "--size", "PX", whole_number(least_px), size_help, size_px)
    add_value(parser, "--workers", "N", whole_number(1), "processes", os.cpu_count() or 1)


def write_both_splits(
    args: argparse.Namespace, splits: Sequence[str], write: WriteScenes, described: str
) -> None:
    """Draw the scenes of both splits; scenes of an earlier run are kept.

    Args:
        args: of :func:`add_scene_arguments`.
        splits: their names.
        write: draws one.
        described: name of the file, in each folder, that describes the pictures.

    Raises:
        PromptError: if a folder cannot be written or holds other scenes.
    """
    check_out_folder(args.out)
    for split, num_scenes in zip(splits, (args.num, args.heldout), strict=True):
        folder = args.out / split
        scenes = write(folder, split, num_scenes, args.seed, args.size, args.workers)
        try:
            for _ in progress(scenes, num_scenes, f"{split} scenes"):
                pass
        except OSError as exc:
            raise PromptError(f"cannot write {folder}: {exc.strerror or exc}") from exc
        number = count_text(num_scenes, "scene")
        print_err(f"{number} in {folder}, described in {folder / described}")


def write_split(
    folder: Path,
    recipe: Mapping[str, Any],
    subfolders: Sequence[str],
    num_scenes: int,
    write_scene: Callable[[int], Any],
    describe: Callable[[list[Any]], str],
    described: str,
    num_workers: int = 1,
) -> Iterator[int]:
    """Write the scenes of a folder, then the file that describes them.

    Args:
        folder: to write into; made if need be.
        recipe: what decides the scenes.
        subfolders: of the folder, to be made.
        num_scenes: how many.
        write_scene: writes the files of a scene that are missing, and returns a description; a
            function that other processes can be given.
        describe: all descriptions -> content of the file.
        described: name of the file.
        num_workers: processes; none are started for one.

    Yields:
        The number of each scene, when it is done.

    Raises:
        OSError: if a file cannot be written.
        PromptError: if the folder holds other scenes.
    """
    from vpt.data.making import keep_recipe
    from vpt.files import write_atomic

    keep_recipe(folder, recipe)
    for name in subfolders:
        (folder / name).mkdir(exist_ok=True)
    descriptions = []
    with ProcessPoolExecutor(num_workers) as pool:  # starts processes when it is given work
        numbers = range(num_scenes)
        if num_workers > 1:
            written = pool.map(write_scene, numbers, chunksize=_CHUNK)
        else:
            written = map(write_scene, numbers)
        for number, description in zip(numbers, written, strict=True):
            descriptions.append(description)
            yield number
    write_atomic(describe(descriptions), folder / described)
