"""Photos and the depth maps that belong to them, in folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vpt.data.row_files import read_entries
from vpt.depth.maps import SUFFIXES, Floats, read_map
from vpt.errors import DataError
from vpt.images import load_image

OBJECTS = "objects.jsonl"
"""File that names the pictures and maps of generated scenes."""

_MOST_STRETCH = 0.02  # by which the shapes of photo and map may differ


@dataclass(frozen=True)
class DepthSource:
    """A photo and its depth map.

    Attributes:
        photo: file.
        depth: file of the map.
        distances: whether the map holds distances, see :func:`vpt.depth.maps.read_map`.
    """

    photo: Path
    depth: Path
    distances: bool = False


def scene_sources(folder: Path) -> list[DepthSource]:
    """Pictures and maps of a folder that ``python -m recipes make-scenes`` wrote.

    Raises:
        DataError: if it is none.
    """
    file = folder / OBJECTS
    if not file.is_file():
        raise DataError(
            f"{folder} holds no {OBJECTS}; expected a folder as `python -m recipes make-scenes` "
            "writes, such as scenes/train"
        )
    entries = read_entries(file)
    if not entries:
        raise DataError(f"{file} names no scenes")
    try:
        return [DepthSource(folder / entry["image"], folder / entry["depth"]) for entry in entries]
    except (KeyError, TypeError) as exc:
        raise DataError(f"{file} has lines without 'image' and 'depth'; make it anew") from exc


def photo_sources(
    photos: list[Path], root: Path, maps: Path, distances: bool = False
) -> list[DepthSource]:
    """Photos with their maps in another folder, named after them.

    The map of ``a/b.jpg`` is ``a/b.jpg.png``, as ``vpt depth-tokenizer train --photos`` keeps it,
    or ``a/b.png`` or ``a/b.npy``.

    Args:
        photos: files in ``root``.
        root: their folder.
        maps: folder of the maps.
        distances: whether the maps hold distances.

    Raises:
        DataError: if a map is missing.
    """
    sources = []
    for photo in photos:
        within = photo.relative_to(root)
        names = [f"{within}.png", *(str(within.with_suffix(suffix)) for suffix in SUFFIXES)]
        found = next((maps / name for name in names if (maps / name).is_file()), None)
        if found is None:
            raise DataError(
                f"there is no depth map of {photo}; expected {maps / names[0]} or {maps / names[1]}"
            )
        sources.append(DepthSource(photo, found, distances))
    return sources


def open_source(source: DepthSource) -> tuple[Image.Image, Floats]:
    """Read photo and map.

    Returns:
        RGB, and ``[H, W]``, 0 (farthest) to 1 (nearest), in a size of its own.

    Raises:
        DataError: if the map cannot be read, or is not of the photo's shape.
        ImageError: if the photo cannot be read.
    """
    photo = load_image(source.photo).pixels
    depth = read_map(source.depth, distances=source.distances)
    stretch = (photo.width / photo.height) / (depth.shape[1] / depth.shape[0])
    if abs(stretch - 1) > _MOST_STRETCH:
        raise DataError(
            f"{source.depth} has {depth.shape[1]}x{depth.shape[0]} px, {source.photo} has "
            f"{photo.width}x{photo.height}; expected the same shape, after EXIF orientation"
        )
    return photo, depth


def describe(sources: list[DepthSource]) -> str:
    """One text that differs between different lists of files."""
    held = [["distances"]] if any(source.distances for source in sources) else []
    return json.dumps([[str(source.photo), str(source.depth)] for source in sources] + held)
