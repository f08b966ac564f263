"""Boxes as rows write them: four finite numbers, and the box around several."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from vpt.boxes import Box, check_box_px
from vpt.errors import DataError, RegionError


def read_box(value: object, *, is_xywh: bool = False) -> Box:
    """Read a box.

    Args:
        value: a list of four numbers, in pixels of the image as seen.
        is_xywh: whether they are left, top, width and height, not left, top, right and bottom.

    Returns:
        XYXY.

    Raises:
        DataError: if it is something else, empty or reversed, or in fractions of the image.
    """
    order = "x, y, width, height" if is_xywh else "x0, y0, x1, y1"
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(values) != 4 or not all(type(v) in (int, float) and isfinite(v) for v in values):
        raise DataError(f"expected a box to be four numbers {order} in pixels, got {value!r}")
    x0, y0, x1, y1 = values
    if is_xywh:
        x1, y1 = x0 + x1, y0 + y1
    if x0 >= x1 or y0 >= y1:
        raise DataError(f"box {values} is empty or reversed; expected {order} with an area")
    try:
        check_box_px((x0, y0, x1, y1))
    except RegionError as exc:
        raise DataError(str(exc)) from exc
    return x0, y0, x1, y1


def box_around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all; there must be one at least."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)
