"""The perception calls in what a model wrote: text to calls, and a region to text."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vpt.boxes import GridBox
from vpt.errors import RegionError
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    REGION_END,
    REGION_START,
    RELEASED_GRID_SIZE,
    is_coordinate,
    read_coordinate,
)

_SYMBOL = re.compile(r"<\|[a-z_]+(?:_-?[0-9]+)?\|>")


@dataclass(frozen=True)
class PerceptionCall:
    """One request by the model to look again: symbols ``start`` to ``end`` (exclusive) of a turn.

    Attributes:
        branch: ``"crop"`` or a key of :data:`BRANCH_TOKENS`.
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
    """What in a text has the form of a control token, known or not."""
    return _SYMBOL.findall(text)


def parse_turn(turn: str | Sequence[str], grid_size: int = RELEASED_GRID_SIZE) -> ParsedTurn:
    """Find the perception calls in what the model wrote. Nothing is guessed.

    A region is one or more coordinate tokens between start and end, at least one per axis, in any
    order; it spans their extremes. A re-encoding is called by its start token; its action and end
    tokens, if they follow, belong to the call. All other perception tokens are malformed.

    Args:
        turn: text, or one string per token; plain text may be any string, the empty one included,
            that is not a control token.
    """
    symbols = split_symbols(turn) if isinstance(turn, str) else list(turn)
    rows = BRANCH_TOKENS.values()
    row_of_start = {row.start: row for row in rows}
    stray = {REGION_END, *(token for row in rows for token in (row.action, row.end))}
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
