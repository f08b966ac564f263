"""Coordinate frames of boxes, and conversions between them.

========  =========================================================================
frame     meaning
========  =========================================================================
grid      cells of a square grid over the image, both ends included (`GridBox`)
original  pixels of the image as seen, that is after EXIF orientation
crop      pixels of a piece cut out of another image
resized   pixels of the same image at another size
unit      0 to 1 along each side
========  =========================================================================

Boxes are XYXY: left, top, right, bottom, the last two exclusive. Sizes are ``(W, H)``, PIL's
order. Every function here is pure and raises `RegionError` for a box outside its frame.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor, isfinite
from typing import NamedTuple

from vpt.errors import RegionError

Box = tuple[float, float, float, float]
PixelBox = tuple[int, int, int, int]

ROUNDING_PX = 1
"""Boxes of data may reach out of their image by as much."""

_MOST_AS_FRACTION = 1.5  # above 1 for what rounding adds


@dataclass(frozen=True)
class GridBox:
    """A rectangle of grid cells, both ends included: one cell has ``x_min == x_max``.

    Raises:
        RegionError: if an index is negative or a minimum lies beyond its maximum.
    """

    x_min: int
    y_min: int
    x_max: int
    y_max: int

    def __post_init__(self) -> None:
        if not (0 <= self.x_min <= self.x_max and 0 <= self.y_min <= self.y_max):
            raise RegionError(f"expected 0 <= min <= max on both axes, got {self}; order the cells")


def crop_box_px(
    region: GridBox, size_wh: tuple[int, int], *, grid_size: int = 8, margin: int = 1
) -> PixelBox:
    """Find the pixels of a region: widened by a margin, clamped, cut at whole pixels.

    Cell edges are rounded down as in the released implementation. Where an image has fewer pixels
    than the grid has cells, and the box would be empty there, it is one pixel wide or high instead.

    Args:
        region: cells of a ``grid_size`` x ``grid_size`` grid.
        size_wh: ``(W, H)`` of the original image.
        margin: cells to add on each side, as far as the grid goes.

    Returns:
        XYXY in original pixels, inside the image and never empty.

    Raises:
        RegionError: if the region reaches beyond the grid, or a size or the margin is impossible.
    """
    width, height = _checked_size(size_wh)
    if margin < 0:
        raise RegionError(f"expected a margin of at least 0 cells, got {margin}")
    if max(region.x_max, region.y_max) >= grid_size:
        raise RegionError(f"{region} does not fit a grid of {grid_size}x{grid_size} cells")

    def edges(low: int, high: int, length: int) -> tuple[int, int]:
        start = _cell_edge(max(low - margin, 0), length, grid_size)
        end = _cell_edge(min(high + 1 + margin, grid_size), length, grid_size)
        return start, max(end, start + 1)

    x0, x1 = edges(region.x_min, region.x_max, width)
    y0, y1 = edges(region.y_min, region.y_max, height)
    return x0, y0, x1, y1


def grid_box_covering(box_xyxy_px: Box, size_wh: tuple[int, int], *, grid_size: int = 8) -> GridBox:
    """Find the smallest region whose ``crop_box_px(region, size_wh, margin=0)`` covers a box.

    The box is XYXY in original pixels; parts outside the image are ignored.

    Raises:
        RegionError: if the box is empty, reversed, not finite or wholly outside the image.
    """
    width, height = _checked_size(size_wh)
    if grid_size < 1:
        raise RegionError(f"expected a grid of at least one cell, got grid_size={grid_size}")
    x0, y0, x1, y1 = clamp(box_xyxy_px, size_wh)
    if x0 >= x1 or y0 >= y1:
        raise RegionError(f"box {box_xyxy_px} covers nothing of an image of {width}x{height} px")

    def cells(low: float, high: float, length: int) -> tuple[int, int]:
        edges = [_cell_edge(index, length, grid_size) for index in range(grid_size + 1)]
        return bisect_right(edges, low) - 1, bisect_left(edges, high) - 1

    x_min, x_max = cells(x0, x1, width)
    y_min, y_max = cells(y0, y1, height)
    return GridBox(x_min, y_min, x_max, y_max)


def region_to_show(box_xyxy_px: Box, size_wh: tuple[int, int], *, grid_size: int = 8) -> GridBox:
    """Find the smallest region whose crop, as :func:`crop_box_px` cuts it, covers a box.

    The crop is wider than the region, so the region may be smaller than the box. Size is counted
    in cells, first of the crop, then of the region. Among equals, the crop whose centre is nearest
    to that of the box is chosen, then the one further left or up. Box and errors are those of
    :func:`grid_box_covering`.
    """
    grid_box_covering(box_xyxy_px, size_wh, grid_size=grid_size)  # refuses what covers nothing

    def smallest(low: float, high: float, length: int) -> tuple[int, int]:
        def rank(span: _Span) -> tuple[int, int, float, int]:
            off_centre = abs((span.start_px + span.end_px) - (low + high))
            return span.num_shown, span.last - span.first, off_centre, span.first

        spans = _spans(length, grid_size)
        best = min((s for s in spans if s.start_px <= low and high <= s.end_px), key=rank)
        return best.first, best.last

    x0, y0, x1, y1 = clamp(box_xyxy_px, size_wh)
    x_min, x_max = smallest(x0, x1, size_wh[0])
    y_min, y_max = smallest(y0, y1, size_wh[1])
    return GridBox(x_min, y_min, x_max, y_max)


def whole_px(box_xyxy_px: Box, size_wh: tuple[int, int]) -> PixelBox:
    """Round a box outwards to whole pixels inside its image, at least one wide and high."""
    edges = []
    for low, high, size in zip(box_xyxy_px[:2], box_xyxy_px[2:], size_wh, strict=True):
        start = min(max(floor(low), 0), size - 1)
        edges.append((start, min(max(ceil(high), start + 1), size)))
    (x0, x1), (y0, y1) = edges
    return x0, y0, x1, y1


class _Span(NamedTuple):
    """Cells of a region along one axis, and the extent of its crop."""

    first: int
    last: int
    start_px: int
    end_px: int
    num_shown: int  # cells


@lru_cache(maxsize=4096)
def _spans(length_px: int, grid_size: int) -> tuple[_Span, ...]:
    """Every region along an axis, taken from those of a square image."""
    square = (length_px, length_px)
    spans = []
    for first in range(grid_size):
        for last in range(first, grid_size):
            region = GridBox(first, first, last, last)
            crop = crop_box_px(region, square, grid_size=grid_size)
            shown = grid_box_covering(crop, square, grid_size=grid_size)
            spans.append(_Span(first, last, crop[0], crop[2], shown.x_max - shown.x_min + 1))
    return tuple(spans)


def check_box_px(box_xyxy_px: Box, size_wh: tuple[int, int] | None = None) -> None:
    """Refuse a box of data that cannot be meant in pixels of its image, if the size is known.

    A box within the first pixel or so is one of fractions, 0 to 1 along each side. Numbers of 0 to
    1000, which some models write, cannot be told from pixels unless they lie outside.

    Raises:
        RegionError: for fractions, and for a box that exceeds the image by more than
            ``ROUNDING_PX``.
    """
    if max(map(abs, box_xyxy_px)) < _MOST_AS_FRACTION:
        raise RegionError(
            f"box {list(box_xyxy_px)} has numbers of 0 to 1, as fractions of an image have; "
            "expected pixels, so multiply them by the width and height of the image"
        )
    if size_wh is None:
        return
    width, height = size_wh
    frame = (-ROUNDING_PX, -ROUNDING_PX, width + ROUNDING_PX, height + ROUNDING_PX)
    if not contains(frame, box_xyxy_px):
        raise RegionError(
            f"box {list(box_xyxy_px)} reaches out of the image of {width}x{height} px; expected "
            "x0, y0, x1, y1 in pixels of the image as seen, that is after EXIF orientation"
        )


def to_unit(box_px: Box, size_wh: tuple[int, int]) -> Box:
    """Turn pixels of an image of ``size_wh`` into unit coordinates."""
    width, height = _checked_size(size_wh)
    x0, y0, x1, y1 = box_px
    return x0 / width, y0 / height, x1 / width, y1 / height


def rescale(box_px: Box, from_size_wh: tuple[int, int], to_size_wh: tuple[int, int]) -> Box:
    """Turn pixels of an image into pixels, not rounded, of the same image at another size."""
    x0, y0, x1, y1 = to_unit(box_px, from_size_wh)
    width, height = _checked_size(to_size_wh)
    return x0 * width, y0 * height, x1 * width, y1 * height


def clamp(box_px: Box, size_wh: tuple[int, int]) -> Box:
    """Move each corner of a finite box into an image; a box wholly outside becomes empty."""
    width, height = _checked_size(size_wh)
    if not all(map(isfinite, box_px)):
        raise RegionError(f"expected four finite numbers, got {box_px}")
    x0, y0, x1, y1 = box_px
    x0, x1 = (min(max(x, 0), width) for x in (x0, x1))
    y0, y1 = (min(max(y, 0), height) for y in (y0, y1))
    return x0, y0, x1, y1


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes of one frame, in [0, 1]; 0 if both are empty."""
    shared = _area(_intersection(a, b))
    union = _area(a) + _area(b) - shared
    return shared / union if union > 0 else 0.0


def contains(outer: Box, inner: Box) -> bool:
    """Whether ``inner`` lies in ``outer``, touching edges allowed; both in one frame."""
    return (
        outer[0] <= inner[0] <= inner[2] <= outer[2]
        and outer[1] <= inner[1] <= inner[3] <= outer[3]
    )


def coverage(outer: Box, inner: Box) -> float:
    """Share of ``inner``'s area that lies in ``outer``, in [0, 1]; both in one frame.

    Raises:
        RegionError: if ``inner`` has no area.
    """
    if (area := _area(inner)) <= 0:
        raise RegionError(f"expected an inner box with an area, got {inner}")
    return _area(_intersection(outer, inner)) / area


def compose(outer: PixelBox, inner: PixelBox) -> PixelBox:
    """Turn a crop of a crop, in pixels of the ``outer`` one, into pixels of the image.

    Raises:
        RegionError: if ``inner`` is reversed or reaches beyond the crop it was cut from.
    """
    left, top, right, bottom = outer
    if not contains((0, 0, right - left, bottom - top), inner):
        raise RegionError(f"box {inner} does not lie in a crop of {right - left}x{bottom - top} px")
    x0, y0, x1, y1 = inner
    return left + x0, top + y0, left + x1, top + y1


def _cell_edge(index: int, length_px: int, grid_size: int) -> int:
    # The released code takes int(index * (length / grid_size)). For its grid of 8 that division is
    # exact and so equals this; for other grids this keeps the last edge at the image's.
    return index * length_px // grid_size


def _checked_size(size_wh: tuple[int, int]) -> tuple[int, int]:
    if min(size_wh) < 1:
        raise RegionError(f"expected a size (W, H) of at least 1x1 px, got {size_wh}")
    return size_wh


def _intersection(a: Box, b: Box) -> Box:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _area(box: Box) -> float:
    x0, y0, x1, y1 = box
    return max(x1 - x0, 0) * max(y1 - y0, 0)
