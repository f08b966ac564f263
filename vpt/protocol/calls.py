"""The perception calls in what a model wrote: text to calls, and a region to text."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    """One request by the model to look again.

    Attributes:
        branch: ``"crop"`` or a key of :data:`BRANCH_TOKENS`.
        start: index of the call's first token in the parsed sequence.
        end: index after its last token.
        region: for ``"crop"`` the cells it names, else ``None``.
    """

    branch: str
    start: int
    end: int
    region: GridBox | None = None


@dataclass(frozen=True)
class MalformedCall:
    """Perception tokens that make no call, and why.

    Attributes:
        start: index of the first token concerned.
        end: index after the last one.
        text: the tokens as written.
        reason: what is wrong with them.
    """

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
    symbols: list[str] = []
    position = 0
    for match in _SYMBOL.finditer(text):
        if match.start() > position:
            symbols.append(text[position : match.start()])
        symbols.append(match.group())
        position = match.end()
    if position < len(text):
        symbols.append(text[position:])
    return symbols


def find_symbols(text: str) -> list[str]:
    """What in a text has the form of a control token, known or not."""
    return _SYMBOL.findall(text)


def parse_turn(turn: str | Sequence[str], grid_size: int = RELEASED_GRID_SIZE) -> ParsedTurn:
    """Find the perception calls in what the model wrote. Nothing is guessed.

    A region is one or more coordinate tokens between start and end, at least one per axis; it
    spans their extremes, in whatever order they come. A re-encoding is called by its start
    token; the two tokens behind it, if they are there, belong to the call. All else that holds
    perception tokens is reported as malformed.

    Args:
        turn: text, or a sequence of symbols (one string per token; plain text may be anything
            that is not a control token, the empty string included).
        grid_size: cells per side of the region grid.
    """
    symbols = split_symbols(turn) if isinstance(turn, str) else turn
    rows = BRANCH_TOKENS.values()
    row_of_start = {row.start: row for row in rows}
    stray = {REGION_END, *(token for row in rows for token in (row.action, row.end))}
    calls: list[PerceptionCall] = []
    malformed: list[MalformedCall] = []

    def is_stray(symbol: str) -> bool:
        return symbol in stray or is_coordinate(symbol)

    def report(start: int, end: int, reason: str) -> None:
        malformed.append(MalformedCall(start, end, "".join(symbols[start:end]), reason))

    position = 0
    while position < len(symbols):
        symbol, start = symbols[position], position
        if symbol == REGION_START:
            position = _end_of_coordinates(symbols, position + 1)
            if position < len(symbols) and symbols[position] == REGION_END:
                position += 1
                region, reason = _read_region(symbols[start + 1 : position - 1], grid_size)
                if region is not None:
                    calls.append(PerceptionCall("crop", start, position, region))
                else:
                    report(start, position, reason)
            else:
                report(start, position, "region is not closed")
        elif symbol in row_of_start:
            row = row_of_start[symbol]
            position += 1
            for rest in (row.action, row.end):
                if position < len(symbols) and symbols[position] == rest:
                    position += 1
            calls.append(PerceptionCall(row.branch, start, position))
        elif is_stray(symbol):
            while position < len(symbols) and is_stray(symbols[position]):
                position += 1
            report(start, position, "perception tokens outside a call")
        else:
            position += 1
    return ParsedTurn(tuple(calls), tuple(malformed))


def _end_of_coordinates(symbols: Sequence[str], position: int) -> int:
    while position < len(symbols) and is_coordinate(symbols[position]):
        position += 1
    return position


def _read_region(symbols: Sequence[str], grid_size: int) -> tuple[GridBox | None, str]:
    cells: dict[str, list[int]] = {"x": [], "y": []}
    if not symbols:
        return None, "region names no cell"
    for symbol in symbols:
        coordinate = read_coordinate(symbol)
        assert coordinate is not None  # the caller stops at the first other symbol
        axis, value = coordinate
        if value >= grid_size:
            return None, f"{symbol} lies outside the {grid_size}x{grid_size} grid"
        cells[axis].append(value)
    for axis in "xy":
        if not cells[axis]:
            return None, f"region has no {axis} coordinate"
    x, y = cells["x"], cells["y"]
    return GridBox(min(x), min(y), max(x), max(y)), ""
