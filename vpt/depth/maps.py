"""Depth maps in files: what is read as one, and how one is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vpt.errors import DataError
from vpt.images import ImageLimits, open_image

Floats = NDArray[np.float32]

SUFFIXES = (".png", ".npy")
_PNG_LEVEL = 4  # of compression; more takes long and saves little on smooth maps
_MOST_PIXELS = 2**26
_MOST_AS_DISTANCE = 2**16 // 3  # of 16 bits: 21.8 m in millimetres, 85 m in KITTI's unit
_MARK = ("depth", "0 is farthest, 65535 nearest")  # text in the PNG of a dark map


def find_maps(folder: Path) -> list[Path]:
    """Depth maps of a folder and all folders in it, in the order of their names.

    Raises:
        DataError: if there is no such folder, or no map in it.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; pass one that holds depth maps")
    found = find_visible(folder, SUFFIXES)
    if not found:
        raise DataError(f"{folder} holds no depth maps; expected {' or '.join(SUFFIXES)} files")
    return found


def find_visible(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files of a folder and all folders in it, in the order of their names.

    Hidden files and folders are left out, among them the ``._NAME`` that macOS leaves beside NAME.

    Args:
        folder: to search.
        suffixes: of the names, in lower case.
    """
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    )


def read_map(file: Path, *, distances: bool = False) -> Floats:
    """Read a depth map.

    PNG with 8 or 16 bits, grey or with three equal channels; ``.npy`` with uint8, uint16, or
    floats of 0 to 1.

    Args:
        file: to read.
        distances: whether it holds distances, in any unit, as depth cameras write them; they are
            inverted and stretched to 0 to 1.

    Returns:
        ``[H, W]`` float32, 0 (farthest) to 1 (nearest), in the size of the file.

    Raises:
        DataError: if it cannot be read, is not a depth map, or seems to hold distances although
            ``distances`` is false.
    """
    is_marked = False
    try:
        if file.suffix.lower() == ".npy":
            values = np.load(file, allow_pickle=False)
        else:
            values, is_marked = _read_png(file)
    except FileNotFoundError as exc:
        raise DataError(f"{file} does not exist; check the path") from exc
    except (OSError, ValueError, EOFError) as exc:  # an ImageError is a ValueError
        raise DataError(f"{file} cannot be read as a depth map: {exc}") from exc
    if not isinstance(values, np.ndarray):
        raise DataError(f"{file} holds several arrays; expected one depth map per file")
    if distances:
        return _invert(_one_channel(values, str(file)), str(file))
    return _scale(values, str(file), may_be_dark=is_marked)


def as_map(values: NDArray[np.generic], name: str = "the array") -> Floats:
    """Bring the values of a depth map to 0 to 1.

    Args:
        values: ``[H, W]``, ``[H, W, 1]``, ``[1, H, W]`` or ``[H, W, 3]`` with equal channels;
            uint8 and uint16 are taken as shares of their largest number.
        name: for messages.

    Returns:
        ``[H, W]`` float32.

    Raises:
        DataError: if this is not a depth map, or seems to hold distances: 16 bits of which only
            the lowest third is used.
    """
    return _scale(values, name, may_be_dark=False)


def _scale(values: NDArray[np.generic], name: str, *, may_be_dark: bool) -> Floats:
    flat = _one_channel(values, name)
    if flat.dtype in (np.uint8, np.uint16):
        largest = int(flat.max())
        if flat.dtype == np.uint16 and 0 < largest < _MOST_AS_DISTANCE and not may_be_dark:
            raise DataError(
                f"{name} has 16-bit values up to {largest}, as distances in millimetres have; "
                "expected 0 (farthest) to 65535 (nearest). Pass --distances (in Python "
                "`distances=True`) if far is bright, or else stretch it to the whole range"
            )
        return (flat / np.float32(255 if flat.dtype == np.uint8 else 65535)).astype(np.float32)
    if flat.dtype.kind != "f":
        raise DataError(f"{name} has {flat.dtype} values; expected uint8, uint16 or floats")
    _check_finite(flat, name)
    low, high = float(flat.min()), float(flat.max())
    if low < 0 or high > 1:
        raise DataError(
            f"{name} has values from {low:g} to {high:g}; expected 0 (farthest) to 1 (nearest), "
            "so scale it first, or pass --distances if it holds distances"
        )
    return flat.astype(np.float32)


def _invert(flat: NDArray[Any], name: str) -> Floats:
    """Turn distances into nearness, as depth models give it: inverted, stretched to 0 to 1."""
    _check_finite(flat, name)
    if (unknown := float((flat <= 0).mean())) > 0:
        raise DataError(
            f"{name} has no distance in {unknown:.1%} of its pixels (0 or less); fill them in first"
        )
    nearness = 1 / flat.astype(np.float64)
    low, high = nearness.min(), nearness.max()
    if low == high:
        raise DataError(f"{name} has the same distance everywhere; expected near and far things")
    return ((nearness - low) / (high - low)).astype(np.float32)


def _check_finite(flat: NDArray[Any], name: str) -> None:
    if not np.isfinite(flat).all():
        raise DataError(f"{name} has values that are not finite; fill them in first")


def fit_map(depth: Floats, size_px: int) -> Floats:
    """Bring a map to a square, as Aurora does: stretched, whatever its shape.

    Args:
        depth: ``[H, W]``.
        size_px: side of the result.

    Returns:
        ``[size_px, size_px]``, averaged where it shrinks. The very same object if it fits.
    """
    if depth.shape == (size_px, size_px):
        return depth
    picture = Image.fromarray(depth)  # mode F
    resized = picture.resize((size_px, size_px), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(resized, np.float32), 0, 1)


def write_map(depth: Floats, file: Path) -> None:
    """Write a map as PNG with 16 bits, wholly or not at all.

    Args:
        depth: ``[H, W]``, 0 to 1; what lies beyond is cut off.
        file: to write.

    Raises:
        OSError: if it cannot be written.
    """
    values = np.rint(np.clip(depth, 0, 1) * 65535).astype(np.uint16)
    draft = file.with_name(f".{file.name}.part")
    info = PngInfo()
    if values.max() < _MOST_AS_DISTANCE:  # or it would be taken for distances
        info.add_text(*_MARK)
    Image.fromarray(values).save(draft, "PNG", compress_level=_PNG_LEVEL, pnginfo=info)
    draft.replace(file)


def _read_png(file: Path) -> tuple[NDArray[np.generic], bool]:
    """Values of a picture, and whether :func:`write_map` marked it as dark."""
    limits = ImageLimits(max_pixels=_MOST_PIXELS)
    with open_image(file, limits=limits, formats=("PNG",)) as picture:
        is_marked = picture.info.get(_MARK[0]) == _MARK[1]
        if picture.mode in ("1", "P", "LA", "RGBA", "PA"):
            picture = picture.convert("RGB")
        values = np.asarray(picture)
    # Older Pillows read 16-bit PNG as mode I.
    return (values.astype(np.uint16) if values.dtype == np.int32 else values), is_marked


def _one_channel(values: NDArray[np.generic], name: str) -> NDArray[Any]:
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 3 and values.shape[2] in (1, 3):
        if (values != values[:, :, :1]).any():
            raise DataError(f"{name} is coloured; expected grey: near is bright, far is dark")
        values = values[:, :, 0]
    if values.ndim != 2:
        raise DataError(f"{name} has shape {list(values.shape)}; expected [H, W]")
    if values.size == 0 or values.size > _MOST_PIXELS:
        raise DataError(f"{name} has {values.size} pixels; expected 1 to {_MOST_PIXELS}")
    return values
