"""Points of a depth map that a question can compare: far apart, at clearly different depths.

Points lie on a grid of 336 x 336 over the picture, whatever its size, as ``<PIXEL_n>`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
from numpy.typing import NDArray

from vpt.errors import DataError
from vpt.protocol.tokens import RELEASED_PIXELS

Floats = NDArray[np.float32]

LAYOUTS = ("spread", "centre")
"""Anywhere in the picture; or, as in HardBLINK, at similar heights around the middle."""

NUM_POINTS = (2, 5)

_MARGIN = 0.09  # of the side, for circle and letter to lie in the picture
_BAND = 0.15  # of the side, above and below the middle, for "centre"
_FLAT = 5  # pixels of the grid around a point ...
_MOST_SLOPE = 0.06  # ... within which the map differs by no more than this
_NUM_CANDIDATES = 250
_TRIES = 30  # for each place that the answer may have among the heights


@dataclass(frozen=True)
class Point:
    """A point of a question.

    Attributes:
        letter: by which it is called.
        x: column on the 336 grid.
        y: row on the 336 grid.
        depth: of the map there, 0 (farthest) to 1 (nearest).
    """

    letter: str
    x: int
    y: int
    depth: float


@dataclass(frozen=True)
class PointRule:
    """Which points may be compared.

    Attributes:
        layout: one of :data:`LAYOUTS`.
        min_distance: between two points, as a share of the picture's side.
        min_difference: between the depths of two points, 0 to 1.

    Raises:
        DataError: if a number is impossible.
    """

    layout: str = "spread"
    min_distance: float = 0.12
    min_difference: float = 0.06

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise DataError(f"unknown layout {self.layout!r}; available: {', '.join(LAYOUTS)}")
        for name in ("min_distance", "min_difference"):
            if not 0 < (value := getattr(self, name)) < 1:
                raise DataError(f"expected {name} between 0 and 1, got {value}")


def place_points(
    depth: Floats, num_points: int, rule: PointRule, rng: np.random.Generator
) -> tuple[Point, ...]:
    """Choose points at random.

    The nearest point is as often the lowest as the second lowest, and so on, as far as the picture
    permits, so that height in the picture gives little away.

    Args:
        depth: ``[H, W]``, 0 (farthest) to 1 (nearest).
        num_points: 2 to 5.
        rule: which points may be compared.
        rng: decides.

    Returns:
        Points in the order of their letters; letters are given by chance.

    Raises:
        DataError: if the picture has too few possible points.
    """
    if not NUM_POINTS[0] <= num_points <= NUM_POINTS[1]:
        raise DataError(f"expected {NUM_POINTS[0]} to {NUM_POINTS[1]} points, got {num_points}")
    candidates = _find_candidates(depth, rule, rng)
    for rank in rng.permutation(num_points):
        chosen = _draw(candidates, num_points, int(rank), rng)
        if chosen is not None:
            letters = ascii_uppercase[:num_points]
            columns, rows, depths = candidates.columns, candidates.rows, candidates.depths
            return tuple(
                Point(letter, int(columns[i]), int(rows[i]), round(float(depths[i]), 4))
                for letter, i in zip(letters, rng.permutation(chosen), strict=True)
            )
    raise DataError(
        f"too few possible points: no {num_points} that are {rule.min_distance:g} of the side "
        f"apart and differ by {rule.min_difference:g} in depth; ask for fewer points or less apart"
    )


def nearest(points: Sequence[Point]) -> Point:
    """The point nearest to the camera: the one with the greatest value."""
    return max(points, key=lambda point: point.depth)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Points that may be chosen.

    Attributes:
        columns: ``[N]`` on the 336 grid.
        rows: ``[N]`` on the 336 grid.
        depths: ``[N]``, 0 to 1.
        fits: ``[N, N]`` bool, whether two may stand in one question.
    """

    columns: NDArray[np.int64]
    rows: NDArray[np.int64]
    depths: Floats
    fits: NDArray[np.bool_]


def _find_candidates(depth: Floats, rule: PointRule, rng: np.random.Generator) -> _Candidates:
    """Find points where the map is flat enough to be read."""
    low, high = _MARGIN, 1 - _MARGIN
    top, bottom = (0.5 - _BAND, 0.5 + _BAND) if rule.layout == "centre" else (low, high)
    columns = rng.integers(
        round(low * RELEASED_PIXELS), round(high * RELEASED_PIXELS), _NUM_CANDIDATES
    )
    rows = rng.integers(
        round(top * RELEASED_PIXELS), round(bottom * RELEASED_PIXELS), _NUM_CANDIDATES
    )
    around = [
        _read(depth, columns + dx, rows + dy)
        for dx in (-_FLAT, 0, _FLAT)
        for dy in (-_FLAT, 0, _FLAT)
    ]
    flat = np.ptp(np.stack(around), axis=0) <= _MOST_SLOPE  # [N]
    columns, rows = columns[flat], rows[flat]
    depths = _read(depth, columns, rows)
    apart = rule.min_distance * RELEASED_PIXELS
    fits = np.hypot(columns[:, None] - columns, rows[:, None] - rows) >= apart
    fits &= np.abs(depths[:, None] - depths) >= rule.min_difference
    return _Candidates(columns, rows, depths, fits)


def _draw(
    candidates: _Candidates, num_points: int, rank: int, rng: np.random.Generator
) -> list[int] | None:
    """Draw points of which the nearest has ``rank`` others below it in the picture.

    Returns:
        Their indices, the nearest first; ``None`` if none were found.
    """
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


def _read(depth: Floats, columns: NDArray[np.int64], rows: NDArray[np.int64]) -> Floats:
    """As :func:`vpt.depth.reading.depth_at`, for many points of the 336 grid."""
    height, width = depth.shape
    at_row = ((rows + 0.5) * height / RELEASED_PIXELS).astype(int).clip(0, height - 1)
    at_column = ((columns + 0.5) * width / RELEASED_PIXELS).astype(int).clip(0, width - 1)
    return np.asarray(depth[at_row, at_column], np.float32)
