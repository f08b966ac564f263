"""Depth maps and boxes as text: codes and coordinates to tokens, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vpt.errors import DataError, RegionError
from vpt.protocol.tokens import (
    DEPTH_CODE,
    DEPTH_END,
    DEPTH_START,
    PIXEL,
    RELEASED_DEPTH_CELLS,
    RELEASED_DEPTH_CODES,
    RELEASED_PIXELS,
)


def format_depth(
    codes: Sequence[int],
    num_codes: int = RELEASED_DEPTH_CODES,
    num_cells: int = RELEASED_DEPTH_CELLS,
) -> str:
    """Write the codes of a depth map as tokens.

    Raises:
        DataError: for another number of codes, or an unknown one.
    """
    _check_depth_codes(codes, num_codes, num_cells)
    return "".join([DEPTH_START, *(f"<DEPTH_{code}>" for code in codes), DEPTH_END])


def parse_depth(
    text: str, num_codes: int = RELEASED_DEPTH_CODES, num_cells: int = RELEASED_DEPTH_CELLS
) -> tuple[int, ...]:
    """Read the codes of a text that is one depth map; space between tokens does not matter.

    Raises:
        DataError: for other text, another number of codes, or an unknown one.
    """
    inner = text.strip()
    if not (inner.startswith(DEPTH_START) and inner.endswith(DEPTH_END)):
        raise DataError(f"expected {DEPTH_START} ... {DEPTH_END}, got {_short(inner)}")
    inner = inner[len(DEPTH_START) : -len(DEPTH_END)]
    if rest := DEPTH_CODE.sub(" ", inner).split():
        raise DataError(f"expected only codes as <DEPTH_0> in a depth map, got {_short(rest[0])}")
    codes = tuple(int(code) for code in DEPTH_CODE.findall(inner))
    _check_depth_codes(codes, num_codes, num_cells)
    return codes


def _check_depth_codes(codes: Sequence[int], num_codes: int, num_cells: int) -> None:
    if len(codes) != num_cells:
        raise DataError(f"expected a depth map of {num_cells} codes, got {len(codes)}")
    if unknown := [code for code in codes if not 0 <= code < num_codes]:
        raise DataError(f"unknown depth code {unknown[0]}; the codebook has 0 to {num_codes - 1}")


def format_pixel_box(box: Sequence[int], num_pixels: int = RELEASED_PIXELS) -> str:
    """Write a box as four tokens.

    Args:
        box: left, top, right, bottom: pixels, ends included, of the image resized to
            ``num_pixels`` a side.

    Raises:
        RegionError: if this is no box of that image.
    """
    _check_pixel_box(box, num_pixels)
    return "".join(f"<PIXEL_{value}>" for value in box)


def parse_pixel_boxes(
    text: str, num_pixels: int = RELEASED_PIXELS
) -> tuple[tuple[int, int, int, int], ...]:
    """Find the boxes of a text, in reading order; space within a run of tokens does not matter.

    Raises:
        RegionError: if a run of pixel tokens is no whole number of boxes, or one lies outside the
            image.
    """
    boxes: list[tuple[int, int, int, int]] = []
    for run in re.finditer(rf"(?:{PIXEL.pattern}\s*)+", text):
        values = [int(value) for value in PIXEL.findall(run[0])]
        if len(values) % 4:
            raise RegionError(
                f"expected four pixel tokens per box, got {len(values)} in {_short(run[0])}"
            )
        for x0, y0, x1, y1 in zip(*(values[i::4] for i in range(4)), strict=True):
            _check_pixel_box((x0, y0, x1, y1), num_pixels)
            boxes.append((x0, y0, x1, y1))
    return tuple(boxes)


def _check_pixel_box(box: Sequence[int], num_pixels: int) -> None:
    if len(box) != 4:
        raise RegionError(f"expected left, top, right, bottom, got {len(box)} numbers")
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 < num_pixels and 0 <= y0 <= y1 < num_pixels):
        raise RegionError(
            f"expected a box within 0 to {num_pixels - 1}, left to right and top to bottom, "
            f"got {tuple(box)}"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:30]}...")
