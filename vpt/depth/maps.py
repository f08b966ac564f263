"""Depth maps: in files, at points, and estimated from photos."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vpt.errors import CheckpointError, DataError, ImageError
from vpt.images import ImageLimits, open_image
from vpt.protocol.tokens import RELEASED_PIXELS

Floats = NDArray[np.float32]

SUFFIXES = (".png", ".npy")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
DEFAULT_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"

_PNG_LEVEL = 4  # of compression; more takes long and saves little on smooth maps
_MOST_PIXELS = 2**26
_MOST_AS_DISTANCE = 2**16 // 3  # of 16 bits: 21.8 m in millimetres, 85 m in KITTI's unit
_MARK = ("depth", "0 is farthest, 65535 nearest")  # text in the PNG of a dark map
_LEAST_RANGE = 1e-5  # of the output of a depth model, as a share of its largest value


# Files


def find_maps(folder: Path) -> list[Path]:
    """Depth maps of a folder and its subfolders, sorted; `DataError` if there is none."""
    return _find(folder, SUFFIXES, "depth maps")


def find_photos(folder: Path) -> list[Path]:
    """Photos of a folder and its subfolders, sorted; `DataError` if there is none."""
    return _find(folder, PHOTO_SUFFIXES, "photos")


def _find(folder: Path, suffixes: Sequence[str], noun: str) -> list[Path]:
    """Visible files; macOS leaves a hidden ``._NAME`` beside NAME."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; pass one that holds {noun}")
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    )
    if not found:
        raise DataError(f"{folder} holds no {noun}; expected {', '.join(suffixes)} files")
    return found


def read_map(file: Path, *, distances: bool = False) -> Floats:
    """Read a depth map as ``[H, W]`` float32, 0 far to 1 near, in the size of the file.

    PNG with 8 or 16 bits, grey or with three equal channels; ``.npy`` with uint8, uint16, or floats
    of 0 to 1. With ``distances`` it contains distances, in any unit, as depth cameras write them;
    they are inverted and stretched to 0 to 1.

    Raises:
        DataError: if it cannot be read, is not a depth map, or seems to contain distances
            although ``distances`` is false.
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
    return as_map(values, str(file), may_be_dark=is_marked)


def as_map(
    values: NDArray[np.generic], name: str = "the array", *, may_be_dark: bool = False
) -> Floats:
    """Scale the values of a depth map to ``[H, W]`` float32 of 0 to 1.

    Accepts ``[H, W]``, ``[H, W, 1]``, ``[1, H, W]``, and ``[H, W, 3]`` with equal channels; uint8
    and uint16 are divided by their largest number.

    Raises:
        DataError: if this is not a depth map, or seems to contain distances: 16 bits of which
            only the lowest third is used, unless it ``may_be_dark``.
    """
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
    """Turn distances into inverse depth, as depth models predict it, stretched to 0 to 1."""
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
    """Stretch a map ``[H, W]`` to a square ``[size_px, size_px]``, as Aurora does.

    A map of that size is returned itself.
    """
    if depth.shape == (size_px, size_px):
        return depth
    picture = Image.fromarray(depth)  # mode F
    resized = picture.resize((size_px, size_px), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(resized, np.float32), 0, 1)


def write_map(depth: Floats, file: Path) -> None:
    """Write a map ``[H, W]``, clipped to 0 to 1, as PNG with 16 bits, whole or not at all."""
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


# Points


@dataclass(frozen=True)
class MapAnswer:
    """Values of a map at the points of a question."""

    depths: Mapping[str, float]  # name of a point -> value, 0 (farthest) to 1 (nearest)
    nearest: str | None  # name of the point with the greatest value; ``None`` if two share it
    lead: float  # its difference from the second greatest


def depth_at(depth: Floats, x: float, y: float, num_pixels: int = RELEASED_PIXELS) -> float:
    """Value of a map ``[H, W]`` at column and row of a square grid over the whole image."""
    return float(depths_at(depth, np.asarray(x), np.asarray(y), num_pixels))


def depths_at(
    depth: Floats, x: NDArray[Any], y: NDArray[Any], num_pixels: int = RELEASED_PIXELS
) -> Floats:
    """As :func:`depth_at`, for points ``[N]``; those outside the image are moved into it."""
    height, width = depth.shape
    rows = ((y + 0.5) * height / num_pixels).astype(int).clip(0, height - 1)
    columns = ((x + 0.5) * width / num_pixels).astype(int).clip(0, width - 1)
    return np.asarray(depth[rows, columns], np.float32)


def answer_from_map(
    depth: Floats, points: Mapping[str, tuple[float, float]], num_pixels: int = RELEASED_PIXELS
) -> MapAnswer:
    """Find the nearest of several points on a map.

    Args:
        depth: ``[H, W]`` of any size, 0 (farthest) to 1 (nearest).
        points: name -> ``(x, y)``, column and row on a grid over the whole image.
        num_pixels: side of that grid; by default that of box tokens.

    Raises:
        DataError: for fewer than two points, or one outside the image.
    """
    if len(points) < 2:
        raise DataError(f"expected at least two points to compare, got {len(points)}")
    depths = {}
    for name, (x, y) in points.items():
        if not (0 <= x < num_pixels and 0 <= y < num_pixels):
            raise DataError(f"point {name} is at {x}, {y}; expected 0 to {num_pixels - 1}")
        depths[name] = depth_at(depth, x, y, num_pixels)
    first, second = sorted(depths, key=lambda name: -depths[name])[:2]
    lead = depths[first] - depths[second]
    return MapAnswer(depths, first if lead > 0 else None, lead)


# Photos


class DepthEstimator:
    """A depth model of transformers that predicts inverse depth, such as Depth Anything or DPT.

    With ``gives_distances`` it predicts distances, as ZoeDepth does; they are inverted.
    """

    def __init__(self, model: Any, processor: Any, *, gives_distances: bool = False) -> None:
        self._model = model.eval()
        self._processor = processor
        self._gives_distances = gives_distances

    @classmethod
    def load(
        cls,
        path_or_id: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        gives_distances: bool = False,
        **hub_kwargs: Any,
    ) -> DepthEstimator:
        """Load a depth model from a folder or the hub; ``hub_kwargs`` are those of transformers.

        Raises:
            CheckpointError: if it cannot be loaded, or is no depth model.
        """
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        try:
            processor = AutoImageProcessor.from_pretrained(path_or_id, **hub_kwargs)
            model = AutoModelForDepthEstimation.from_pretrained(path_or_id, **hub_kwargs)
        except (OSError, ValueError) as exc:
            raise CheckpointError(
                f"cannot load the depth model {str(path_or_id)!r}: {str(exc).splitlines()[0]}"
            ) from exc
        return cls(model, processor, gives_distances=gives_distances)

    def estimate(self, image: Image.Image) -> Floats:
        """Predict the depth of an RGB photo, stretched to its own range as Depth Anything does.

        Returns ``[H, W]`` float32 in the size of the photo, 0 far to 1 near. An `ImageError` is
        raised if the prediction is constant or not finite.
        """
        import torch

        inputs = self._processor(images=image, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            predicted = self._model(**inputs).predicted_depth  # [1, h, w]
            if self._gives_distances:
                predicted = 1 / predicted.clamp_min(1e-6)
            resized = torch.nn.functional.interpolate(
                predicted[:, None].float(), image.size[::-1], mode="bilinear", align_corners=False
            )[0, 0]
        depth = resized.cpu().numpy()
        low, high = float(depth.min()), float(depth.max())
        clear = high - low > _LEAST_RANGE * max(abs(low), abs(high))  # above rounding errors
        if not (np.isfinite(low) and np.isfinite(high) and clear):
            raise ImageError("the depth model finds no depth in the picture; try another picture")
        return ((depth - low) / (high - low)).astype(np.float32)
