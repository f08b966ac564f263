"""Depth maps in files: what is read as one, and how one is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.errors import DataError
from vpt.images import ImageLimits, open_image

Floats = NDArray[np.float32]

SUFFIXES = (".png", ".npy")
_PNG_LEVEL = 4  # of compression; more takes long and saves little on smooth maps
_MOST_PIXELS = 2**26


def find_maps(folder: Path) -> list[Path]:
    """Depth maps of a folder and all folders in it, in the order of their names.

    Raises:
        DataError: if there is no such folder, or no map in it.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; pass one that holds depth maps")
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not found:
        raise DataError(f"{folder} holds no depth maps; expected {' or '.join(SUFFIXES)} files")
    return found


def read_map(file: Path) -> Floats:
    """Read a depth map.

    PNG with 8 or 16 bits, grey or with three equal channels; ``.npy`` with uint8, uint16, or
    floats of 0 to 1.

    Args:
        file: to read.

    Returns:
        ``[H, W]`` float32, 0 (farthest) to 1 (nearest), in the size of the file.

    Raises:
        DataError: if it cannot be read, or is no depth map.
    """
    try:
        values = np.load(file, allow_pickle=False) if _is_array(file) else _read_png(file)
    except FileNotFoundError as exc:
        raise DataError(f"{file} does not exist; check the path") from exc
    except (OSError, ValueError, EOFError) as exc:  # an ImageError is a ValueError
        raise DataError(f"{file} cannot be read as a depth map: {exc}") from exc
    if not isinstance(values, np.ndarray):
        raise DataError(f"{file} holds several arrays; expected one depth map per file")
    return as_map(values, str(file))


def as_map(values: NDArray[np.generic], name: str = "the array") -> Floats:
    """Bring the values of a depth map to 0 to 1.

    Args:
        values: ``[H, W]``, ``[H, W, 1]``, ``[1, H, W]`` or ``[H, W, 3]`` with equal channels;
            uint8 and uint16 are taken as shares of their largest number.
        name: for messages.

    Returns:
        ``[H, W]`` float32.

    Raises:
        DataError: if this is no depth map.
    """
    flat = _one_channel(values, name)
    if flat.size == 0 or flat.size > _MOST_PIXELS:
        raise DataError(f"{name} has {flat.size} pixels; expected 1 to {_MOST_PIXELS}")
    if flat.dtype in (np.uint8, np.uint16):
        return (flat / np.float32(255 if flat.dtype == np.uint8 else 65535)).astype(np.float32)
    if flat.dtype.kind != "f":
        raise DataError(f"{name} has {flat.dtype} values; expected uint8, uint16 or floats")
    if not np.isfinite(flat).all():
        raise DataError(f"{name} has values that are not finite; fill them in first")
    low, high = float(flat.min()), float(flat.max())
    if low < 0 or high > 1:
        raise DataError(
            f"{name} has values from {low:g} to {high:g}; expected 0 (farthest) to 1 (nearest), "
            "so scale it first"
        )
    return flat.astype(np.float32)


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
    Image.fromarray(values).save(draft, "PNG", compress_level=_PNG_LEVEL)
    draft.replace(file)


def _is_array(file: Path) -> bool:
    return file.suffix.lower() == ".npy"


def _read_png(file: Path) -> NDArray[np.generic]:
    limits = ImageLimits(max_pixels=_MOST_PIXELS)
    with open_image(file, limits=limits, formats=("PNG",)) as picture:
        if picture.mode in ("1", "P", "LA", "RGBA", "PA"):
            picture = picture.convert("RGB")
        values = np.asarray(picture)
    # Older Pillows read 16-bit PNG as mode I.
    return values.astype(np.uint16) if values.dtype == np.int32 else values


def _one_channel(values: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 3 and values.shape[2] in (1, 3):
        if (values != values[:, :, :1]).any():
            raise DataError(f"{name} is coloured; expected grey: near is bright, far is dark")
        values = values[:, :, 0]
    if values.ndim != 2:
        raise DataError(f"{name} has shape {list(values.shape)}; expected [H, W]")
    return values
