"""Which region to name, so that the crop which the runtime cuts for it shows a box."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from vpt.boxes import Box, GridBox, clamp, crop_box_px, grid_box_covering
from vpt.protocol.tokens import RELEASED_GRID_SIZE


def region_to_show(
    box_xyxy_px: Box, size_wh: tuple[int, int], *, grid_size: int = RELEASED_GRID_SIZE
) -> GridBox:
    """Find the smallest region whose crop covers a box.

    The crop is wider than the region by what :func:`vpt.boxes.crop_box_px` adds, so the region
    may be smaller than the box. Size is counted in cells: first those of the crop, then those of
    the region. Of equals that one is taken whose crop has its middle nearest to the box's, then
    the one further left or up.

    Args:
        box_xyxy_px: XYXY in original pixels; what lies outside the image is ignored.
        size_wh: ``(W, H)`` of the original image.
        grid_size: cells along each side.

    Returns:
        The region; ``crop_box_px`` of it contains the box.

    Raises:
        RegionError: if the box is empty, reversed, not finite or wholly outside the image.
    """
    grid_box_covering(box_xyxy_px, size_wh, grid_size=grid_size)  # refuses what covers nothing
    x0, y0, x1, y1 = clamp(box_xyxy_px, size_wh)
    across = _smallest(x0, x1, size_wh[0], grid_size)
    down = _smallest(y0, y1, size_wh[1], grid_size)
    return GridBox(across.first, down.first, across.last, down.last)


class _Span(NamedTuple):
    """Cells of a region along one axis, and what its crop shows there."""

    first: int
    last: int
    start_px: int
    end_px: int
    num_shown: int  # cells


def _smallest(low_px: float, high_px: float, length_px: int, grid_size: int) -> _Span:
    def rank(span: _Span) -> tuple[int, int, float, int]:
        off_middle = abs((span.start_px + span.end_px) - (low_px + high_px))
        return span.num_shown, span.last - span.first, off_middle, span.first

    spans = _spans(length_px, grid_size)
    return min((s for s in spans if s.start_px <= low_px and high_px <= s.end_px), key=rank)


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
