"""The depth maps a command works with: a folder of them, or what a depth model sees in photos."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.cli.model import quieten
from vpt.cli.output import progress, write_file
from vpt.errors import DataError, PromptError

if TYPE_CHECKING:
    from vpt.depth.estimation import DepthEstimator


def add_depth_model_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what :func:`load_estimator` reads, but for ``--verbose``."""
    add_distances_argument(group)
    group.add_argument(
        "--depth-model",
        metavar="ID_OR_FOLDER",
        help="with which depth is estimated (default: Depth Anything V2 Small)",
    )


def add_distances_argument(group: argparse._ActionsContainer) -> None:
    """Add the option that says what depth maps hold."""
    group.add_argument(
        "--distances",
        action="store_true",
        help="the maps hold distances, as depth cameras write them, or the depth model gives them, "
        "as ZoeDepth does; they are inverted",
    )


def load_estimator(args: argparse.Namespace) -> DepthEstimator:
    """Load the depth model that the arguments name.

    Raises:
        CheckpointError: if it cannot be loaded.
    """
    quieten(args)
    from vpt.depth.estimation import DEFAULT_MODEL, DepthEstimator

    return DepthEstimator.load(args.depth_model or DEFAULT_MODEL, gives_distances=args.distances)


def find_photos(folder: Path) -> list[Path]:
    """Photos of a folder and all folders in it, in the order of their names.

    Raises:
        DataError: if there is no such folder, or no photo in it.
    """
    from vpt.depth.estimation import SUFFIXES
    from vpt.depth.maps import find_visible

    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; pass one that holds photos")
    found = find_visible(folder, SUFFIXES)
    if not found:
        raise DataError(f"{folder} holds no photos; expected {', '.join(SUFFIXES)} files")
    return found


def estimate_maps(photos: Path, target: Path, args: argparse.Namespace) -> list[Path]:
    """Estimate the depth of photos and keep the maps; those that are there are left alone.

    Args:
        photos: folder.
        target: folder of the maps, which are named after the photos.
        args: name the depth model.

    Returns:
        The maps, in the order of the photos.

    Raises:
        DataError: if there are no photos.
        PromptError: if a map cannot be written.
        CheckpointError: if the depth model cannot be loaded.
        ImageError: if a photo cannot be used.
    """
    from vpt.depth.maps import write_map
    from vpt.images import load_image

    found = find_photos(photos)
    named = {photo: target / f"{photo.relative_to(photos)}.png" for photo in found}
    if missing := [photo for photo in found if not named[photo].exists()]:
        estimator = load_estimator(args)
        for photo in progress(missing, len(missing), "photos"):
            depth = estimator.estimate(load_image(photo).pixels)
            file = named[photo]
            write_file(lambda folder: folder.mkdir(parents=True, exist_ok=True), file.parent)
            write_file(lambda f, depth=depth: write_map(depth, f), file)  # type: ignore[misc]
    return list(named.values())


def check_source(args: argparse.Namespace) -> None:
    """Find out whether the options that name maps or photos fit each other.

    Raises:
        PromptError: if they do not.
    """
    if (args.maps is None) == (args.photos is None):
        raise PromptError("expected either --maps or --photos")
    if args.photos is None and args.depth_model:
        raise PromptError("--depth-model needs --photos; maps need no model")
