"""Perception calls, depth maps and boxes as text: written, and found in what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vpt.boxes import GridBox, PixelBox
from vpt.errors import DataError, RegionError
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    DEPTH_CODE,
    DEPTH_END,
    DEPTH_START,
    GROUND_END,
    GROUND_START,
    GROUNDING,
    PIXEL,
    REGION_END,
    REGION_START,
    RELEASED_DEPTH_CELLS,
    RELEASED_DEPTH_CODES,
    RELEASED_GRID_SIZE,
    RELEASED_PIXELS,
    is_coordinate,
    read_coordinate,
)

_SYMBOL = re.compile(r"<\|[a-z_]+(?:_-?[0-9]+)?\|>")


@dataclass(frozen=True)
class PerceptionCall:
    """One request by the model to look again: symbols ``start`` to ``end`` (exclusive) of a turn.

    Attributes:
        branch: ``"crop"``, ``"grounding"`` or a key of :data:`BRANCH_TOKENS`.
        region: cells of a ``"crop"``.
    """

    branch: str
    start: int
    end: int
    region: GridBox | None = None


@dataclass(frozen=True)
class MalformedCall:
    """Perception tokens ``start`` to ``end`` (exclusive) that make no call, as written, and why."""

    start: int
    end: int
    text: str
    reason: str


@dataclass(frozen=True)
class ParsedTurn:
    """The calls of one assistant turn, well-formed and malformed, each in reading order."""

    calls: tuple[PerceptionCall, ...]
    malformed: tuple[MalformedCall, ...]


def format_region(region: GridBox, grid_size: int = RELEASED_GRID_SIZE) -> str:
    """Write a region as tokens: ``x_min y_min x_max y_max`` between start and end.

    Raises:
        RegionError: if the region does not fit the grid.
    """
    if max(region.x_max, region.y_max) >= grid_size:
        raise RegionError(f"{region} does not fit a {grid_size}x{grid_size} grid")
    corners = f"<|x_{region.x_min}|><|y_{region.y_min}|><|x_{region.x_max}|><|y_{region.y_max}|>"
    return REGION_START + corners + REGION_END


def split_symbols(text: str) -> list[str]:
    """Cut text into control tokens and the runs of plain text between them."""
    return [part for part in re.split(f"({_SYMBOL.pattern})", text) if part]


def find_symbols(text: str) -> list[str]:
    """Find what has the form of a control token, known or not."""
    return _SYMBOL.findall(text)


def parse_turn(turn: str | Sequence[str], grid_size: int = RELEASED_GRID_SIZE) -> ParsedTurn:
    """Find the perception calls in what the model wrote. Nothing is guessed.

    A region is one or more coordinate tokens between start and end, at least one per axis, in any
    order; it spans their extremes. A phrase is plain text between its start and end. A re-encoding
    is called by its start token; its action and end tokens, if they follow, belong to the call.
    All other perception tokens are malformed.

    Args:
        turn: text, or one string per token; plain text may be any string, the empty one included,
            that is not a control token.
    """
    symbols = split_symbols(turn) if isinstance(turn, str) else list(turn)
    rows = BRANCH_TOKENS.values()
    row_of_start = {row.start: row for row in rows}
    stray = {REGION_END, GROUND_END, *(one for row in rows for one in (row.action, row.end))}
    calls: list[PerceptionCall] = []
    malformed: list[MalformedCall] = []

    def skip(position: int, others: Collection[str] = ()) -> int:
        """Index after the coordinates, or tokens of ``others``, from a position on."""
        while position < len(symbols) and (
            is_coordinate(symbols[position]) or symbols[position] in others
        ):
            position += 1
        return position

    def report(start: int, end: int, reason: str) -> None:
        malformed.append(MalformedCall(start, end, "".join(symbols[start:end]), reason))

    position = 0
    while position < len(symbols):
        symbol, start = symbols[position], position
        if symbol == REGION_START:
            position = end = skip(start + 1)
            region: GridBox | str = "region is not closed"
            if symbols[end : end + 1] == [REGION_END]:
                position += 1
                region = _read_region(symbols[start + 1 : end], grid_size)
            if isinstance(region, str):
                report(start, position, region)
            else:
                calls.append(PerceptionCall("crop", start, position, region))
        elif symbol == GROUND_START:
            position += 1
            while position < len(symbols) and not _SYMBOL.fullmatch(symbols[position]):
                position += 1
            is_closed = symbols[position : position + 1] == [GROUND_END]
            position += is_closed
            if not is_closed:
                report(start, position, "phrase is not closed")
            elif position == start + 2:
                report(start, position, "phrase is empty")
            else:
                calls.append(PerceptionCall(GROUNDING, start, position))
        elif symbol in row_of_start:
            row = row_of_start[symbol]
            position += 1
            for rest in (row.action, row.end):
                position += symbols[position : position + 1] == [rest]
            calls.append(PerceptionCall(row.branch, start, position))
        elif (position := skip(start, stray)) > start:
            report(start, position, "perception tokens outside a call")
        else:
            position += 1
    return ParsedTurn(tuple(calls), tuple(malformed))


def _read_region(symbols: Sequence[str], grid_size: int) -> GridBox | str:
    """The cells that coordinate tokens span, or why they span none."""
    cells: dict[str, list[int]] = {"x": [], "y": []}
    if not symbols:
        return "region names no cell"
    for symbol in symbols:
        coordinate = read_coordinate(symbol)
        assert coordinate is not None  # the caller stops at the first other symbol
        axis, value = coordinate
        if value >= grid_size:
            return f"{symbol} lies outside the {grid_size}x{grid_size} grid"
        cells[axis].append(value)
    for axis in "xy":
        if not cells[axis]:
            return f"region has no {axis} coordinate"
    x, y = cells["x"], cells["y"]
    return GridBox(min(x), min(y), max(x), max(y))


# --- what a phrase found ---


NOT_FOUND = "not found"
"""Text of the result of a call with a phrase that the detector does not find."""


def format_found(boxes_xyxy_px: Sequence[PixelBox], size_wh: tuple[int, int]) -> str:
    """Write the boxes of a found phrase as Qwen2-VL does: ``"(110,235),(352,871)"``.

    Corners are in thousandths of the image, rounded down; boxes are separated by spaces.
    """

    def corner(x: int, y: int) -> str:
        places = (1000 * at // size for at, size in zip((x, y), size_wh, strict=True))
        return "({},{})".format(*(min(place, 999) for place in places))

    return " ".join(f"{corner(*box[:2])},{corner(*box[2:])}" for box in boxes_xyxy_px) or NOT_FOUND


# --- depth maps and boxes ---------------------------------------------------------------------


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
        RegionError: if it is not a box of that image.
    """
    _check_pixel_box(box, num_pixels)
    return "".join(f"<PIXEL_{value}>" for value in box)


def parse_pixel_boxes(
    text: str, num_pixels: int = RELEASED_PIXELS
) -> tuple[tuple[int, int, int, int], ...]:
    """Find the boxes of a text, in reading order; space within a run of tokens does not matter.

    Raises:
        RegionError: if a run of pixel tokens is not four per box, or a box is not in the image.
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
