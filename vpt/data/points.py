"""Points that a question about depth compares: their choice, and the circles that mark them.

Coordinates are those of ``<PIXEL_n>``: a grid of 336 x 336 over the picture, whatever its size.
Circles and letters are HardBLINK's: red rings, white letters on black.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_uppercase

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vpt.boxes import Box
from vpt.depth.maps import Floats, depths_at
from vpt.errors import DataError
from vpt.protocol.tokens import RELEASED_PIXELS

LAYOUTS = ("spread", "centre")
"""Anywhere in the picture; or, as in HardBLINK, at similar heights around the middle."""

NUM_POINTS = (2, 5)

_MARGIN = 0.09  # of the side, for circle and letter to lie in the picture
_BAND = 0.15  # of the side, above and below the middle, for "centre"
_FLAT = 5  # pixels of the grid around a point ...
_MOST_SLOPE = 0.06  # ... within which the map differs by no more than this
_NUM_CANDIDATES = 250
_TRIES = 30  # for each rank that the answer may have among the heights

_RING_PX, _LINE_PX, _LETTER_PX, _LABEL_WH, _ABOVE_PX = 4.5, 1.8, 11.0, (10.5, 14.0), 17.0
"""In pixels of a picture of 336 px: radius, line width, letter, its background and its distance."""
_RED, _BLACK, _WHITE = (255, 0, 0), (0, 0, 0), (255, 255, 255)
_FINER = 4  # drawn at this multiple of the size, then averaged


@dataclass(frozen=True)
class Point:
    """A point of a question, on the 336 grid."""

    letter: str
    x: int
    y: int
    depth: float  # value of the map, 0 (farthest) to 1 (nearest)


@dataclass(frozen=True)
class PointRule:
    """Limits on the points of a question; `DataError` if a number is impossible."""

    layout: str = "spread"  # one of :data:`LAYOUTS`
    min_distance: float = 0.12  # between two points, as a share of the picture's side
    min_difference: float = 0.06  # between the depths of two points, 0 to 1

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise DataError(f"unknown layout {self.layout!r}; available: {', '.join(LAYOUTS)}")
        for name in ("min_distance", "min_difference"):
            if not 0 < (value := getattr(self, name)) < 1:
                raise DataError(f"expected {name} between 0 and 1, got {value}")


def place_points(
    depth: Floats, num_points: int, rule: PointRule, rng: np.random.Generator
) -> tuple[Point, ...]:
    """Choose points at random, in the order of their letters.

    The nearest point is equally often the lowest, the second lowest, and so on, as far as the
    picture permits, so that height in the picture reveals little. A `DataError` is raised if the
    picture has too few possible points.
    """
    if not NUM_POINTS[0] <= num_points <= NUM_POINTS[1]:
        raise DataError(f"expected {NUM_POINTS[0]} to {NUM_POINTS[1]} points, got {num_points}")
    candidates = _find_candidates(depth, rule, rng)
    columns, rows, depths = candidates.columns, candidates.rows, candidates.depths
    for rank in rng.permutation(num_points):
        if chosen := _draw(candidates, num_points, int(rank), rng):
            return tuple(
                Point(letter, int(columns[i]), int(rows[i]), round(float(depths[i]), 4))
                for letter, i in zip(ascii_uppercase, rng.permutation(chosen), strict=False)
            )
    raise DataError(
        f"too few possible points: no {num_points} with a distance of {rule.min_distance:g} of the "
        f"side and a difference of {rule.min_difference:g} in depth; ask for fewer, or for less"
    )


def nearest(points: Sequence[Point]) -> Point:
    """The point nearest to the camera: the one with the greatest value."""
    return max(points, key=lambda point: point.depth)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Points that may be chosen, on the 336 grid."""

    columns: NDArray[np.int64]  # [N]
    rows: NDArray[np.int64]  # [N]
    depths: Floats  # [N]
    fits: NDArray[np.bool_]  # [N, N], whether two may be in one question


def _find_candidates(depth: Floats, rule: PointRule, rng: np.random.Generator) -> _Candidates:
    """Find points where the map is flat enough to be read."""
    low, high = _MARGIN, 1 - _MARGIN
    top, bottom = (0.5 - _BAND, 0.5 + _BAND) if rule.layout == "centre" else (low, high)
    columns, rows = (
        rng.integers(round(a * RELEASED_PIXELS), round(b * RELEASED_PIXELS), _NUM_CANDIDATES)
        for a, b in ((low, high), (top, bottom))
    )
    near = (-_FLAT, 0, _FLAT)
    around = [depths_at(depth, columns + dx, rows + dy) for dx in near for dy in near]
    flat = np.ptp(np.stack(around), axis=0) <= _MOST_SLOPE  # [N]
    columns, rows = columns[flat], rows[flat]
    depths = depths_at(depth, columns, rows)
    apart = rule.min_distance * RELEASED_PIXELS
    fits = np.hypot(columns[:, None] - columns, rows[:, None] - rows) >= apart
    fits &= np.abs(depths[:, None] - depths) >= rule.min_difference
    return _Candidates(columns, rows, depths, fits)


def _draw(
    candidates: _Candidates, num_points: int, rank: int, rng: np.random.Generator
) -> list[int] | None:
    """Indices of points, the nearest first, which has ``rank`` others below it in the picture."""
    rows, depths, fits = candidates.rows, candidates.depths, candidates.fits
    behind = fits & (depths[:, None] > depths)  # [nearest, other]
    below, above = behind & (rows[:, None] < rows), behind & (rows[:, None] > rows)
    num_above = num_points - 1 - rank
    possible = np.flatnonzero((below.sum(1) >= rank) & (above.sum(1) >= num_above))
    for first in rng.permutation(possible)[:_TRIES]:
        chosen = [int(first)]
        open_ = fits[first]
        for side in (*[below] * rank, *[above] * num_above):
            left = np.flatnonzero(open_ & side[first])
            if not len(left):
                break
            chosen.append(int(rng.choice(left)))
            open_ = open_ & fits[chosen[-1]]
        if len(chosen) == num_points:
            return chosen
    return None


# Marks


def draw_points(photo: Image.Image, points: Iterable[Point], scale: float = 1.0) -> Image.Image:
    """Mark points on a copy of an RGB photo; ``scale`` is relative to HardBLINK's marks."""
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
    """Position ``(x, y)`` of a point in a picture of ``size_wh`` pixels."""
    width, height = size_wh
    return (point.x + 0.5) * width / RELEASED_PIXELS, (point.y + 0.5) * height / RELEASED_PIXELS


def label_box_px(point: Point, size_wh: tuple[int, int], scale: float = 1.0) -> Box:
    """Box of the letter of a point, XYXY in pixels: above the point, or else below it."""
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
    """Antialiased mask of a ring."""
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
    """A letter on a black background."""
    unit = unit_centi / 100
    width, height = (max(round(side * unit), 1) for side in _LABEL_WH)
    fine = Image.new("RGB", (width * _FINER, height * _FINER), _BLACK)
    font = ImageFont.load_default(_LETTER_PX * unit * _FINER)
    ImageDraw.Draw(fine).text(
        (fine.width / 2, fine.height / 2), letter, fill=_WHITE, font=font, anchor="mm"
    )
    return fine.resize((width, height), Image.Resampling.BOX)
