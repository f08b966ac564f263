"""Results of calls: what a call shows of an image, or what an experiment shows in its place.

A :data:`Show` takes an image, the box of a region call in its pixels (``None`` for a re-encoding)
and the seed of the request. It returns the image to append and the box that this image shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt.boxes import PixelBox
from vpt.branches import crop
from vpt.images import LoadedImage, from_pixels

Mask = NDArray[np.bool_]
"""``[H, W]``: whether a pixel belongs to an object."""

Place = PixelBox | tuple[int, int]
"""Where an object is: a box, or a point in pixels."""

_BLANK_RGB = (127, 127, 127)


@dataclass(frozen=True)
class Part:
    """A part of an image, as a call shows it.

    Attributes:
        box_xyxy_px: in pixels of the image.
        object_share: of a part narrowed to an object, the share of its pixels that are of it.
    """

    image: LoadedImage
    box_xyxy_px: PixelBox
    object_share: float | None = None


Shown = tuple[LoadedImage, PixelBox | None]
Show = Callable[[LoadedImage, PixelBox | None, int], Shown]


def show(image: LoadedImage, box: PixelBox | None, seed: int) -> Shown:
    """The result that the call asks for: the crop, or the image itself for a re-encoding."""
    if box is None:
        return image, None
    return from_pixels(crop(image.pixels, box), image.source), box


def show_blank(image: LoadedImage, box: PixelBox | None, seed: int) -> Shown:
    """A gray image of the same size."""
    shown, box = show(image, box, seed)
    return from_pixels(Image.new("RGB", shown.size_wh, _BLANK_RGB), shown.source), box


def show_elsewhere(image: LoadedImage, box: PixelBox | None, seed: int) -> Shown:
    """A crop of the same size from a random place, which image, box and seed determine."""
    if box is not None:
        draw = random.Random(f"{image.digest} {box} {seed}")
        (width, height), (x0, y0, x1, y1) = image.size_wh, box
        x, y = draw.randint(0, width - (x1 - x0)), draw.randint(0, height - (y1 - y0))
        box = x, y, x + x1 - x0, y + y1 - y0
    return show(image, box, seed)


def dim_rest(crop: Image.Image, mask: Mask) -> Image.Image:
    """Darken what does not belong to the object to a quarter; all stays if nothing belongs to it.

    Args:
        crop: RGB.
        mask: ``[H, W]`` of the crop.
    """
    if not mask.any():
        return crop
    pixels = np.asarray(crop)
    return Image.fromarray(np.where(mask[..., None], pixels, pixels // 4))


REPLACEMENTS: dict[str | None, Show] = {None: show, "blank": show_blank, "random": show_elsewhere}
"""By ``Request.replace_looks``."""
