"""Circles with letters on a photo, as HardBLINK draws them: red rings, white letters on black."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from vpt.boxes import Box
from vpt.data.aurora.points import Point
from vpt.protocol.tokens import RELEASED_PIXELS

_RING_PX, _LINE_PX, _LETTER_PX, _LABEL_WH, _ABOVE_PX = 4.5, 1.8, 11.0, (10.5, 14.0), 17.0
"""On a picture of 336 px: radius, line, letter, its ground, and how far that is above the point."""
_RED, _BLACK, _WHITE = (255, 0, 0), (0, 0, 0), (255, 255, 255)
_FINER = 4  # drawn at this multiple of the size, then averaged


def draw_points(photo: Image.Image, points: Iterable[Point], scale: float = 1.0) -> Image.Image:
    """Mark points on a copy of a photo.

    Args:
        photo: RGB.
        points: to mark.
        scale: of circles and letters; with 1 they are as large in the picture as HardBLINK's.

    Returns:
        RGB, in the size of the photo.
    """
    unit = scale * min(photo.size) / RELEASED_PIXELS
    marked = photo.copy()
    for point in points:
        x, y = position_px(point, photo.size)
        ring = _ring(round(_RING_PX * unit * 100), round(max(_LINE_PX * unit, 1.2) * 100))
        marked.paste(_RED, (round(x - ring.width / 2), round(y - ring.height / 2)), ring)
        label = _label(point.letter, round(unit * 100))
        left, top, _, _ = label_box_px(point, photo.size, scale)
        marked.paste(label, (round(left), round(top)))
    return marked


def position_px(point: Point, size_wh: tuple[int, int]) -> tuple[float, float]:
    """Where a point lies in a picture of ``size_wh`` pixels: ``(x, y)``."""
    return tuple(  # type: ignore[return-value]
        (at + 0.5) * side / RELEASED_PIXELS
        for at, side in zip((point.x, point.y), size_wh, strict=True)
    )


def label_box_px(point: Point, size_wh: tuple[int, int], scale: float = 1.0) -> Box:
    """What the letter of a point covers: XYXY in pixels; above the point, or else below it."""
    unit = scale * min(size_wh) / RELEASED_PIXELS
    x, y = position_px(point, size_wh)
    width, height = (side * unit for side in _LABEL_WH)
    middle = y - _ABOVE_PX * unit
    if middle - height / 2 < 0:
        middle = y + _ABOVE_PX * unit
    left = min(max(x - width / 2, 0), size_wh[0] - width)
    return left, middle - height / 2, left + width, middle + height / 2


@lru_cache(maxsize=64)
def _ring(radius_centipx: int, line_centipx: int) -> Image.Image:
    """Mask of a ring, smooth at its edges."""
    radius, line = radius_centipx / 100, line_centipx / 100
    side = round(2 * (radius + line)) + 1
    fine = Image.new("L", (side * _FINER, side * _FINER))
    middle = side * _FINER / 2
    outer = (radius + line / 2) * _FINER
    ImageDraw.Draw(fine).ellipse(
        (middle - outer, middle - outer, middle + outer, middle + outer),
        outline=255,
        width=max(round(line * _FINER), 1),
    )
    return fine.resize((side, side), Image.Resampling.BOX)


@lru_cache(maxsize=256)
def _label(letter: str, unit_centi: int) -> Image.Image:
    """A letter on black ground."""
    unit = unit_centi / 100
    width, height = (max(round(side * unit), 1) for side in _LABEL_WH)
    fine = Image.new("RGB", (width * _FINER, height * _FINER), _BLACK)
    font = ImageFont.load_default(_LETTER_PX * unit * _FINER)
    ImageDraw.Draw(fine).text(
        (fine.width / 2, fine.height / 2), letter, fill=_WHITE, font=font, anchor="mm"
    )
    return fine.resize((width, height), Image.Resampling.BOX)
