"""One row after another: of each a sample, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import inf
from typing import Any

from vpt.data.cells import clean_cell
from vpt.errors import DataError
from vpt.evaluation.samples import BadRow, Sample


def read_rows(
    rows: Iterable[object],
    read_row: Callable[[Mapping[str, Any], str], Sample],
    name_row: Callable[[Mapping[str, Any]], str] = lambda row: "",
) -> Iterator[Sample | BadRow]:
    """Make one thing of each row, in their order, without what pandas makes of gaps.

    Args:
        rows: as they stand in a file.
        read_row: ``(row, id)`` -> sample; raises ``DataError`` for a row that makes no sense.
        name_row: row -> id; empty where it has none, which then is its number, counted from 0.
    """
    for number, row in enumerate(rows):
        name = str(number)
        try:
            cells = cells_of(row)
            name = name_row(cells) or name
            yield read_row(cells, name)
        except DataError as exc:
            yield BadRow(name, f"row {number}: {exc}")


def cells_of(row: object) -> Mapping[str, Any]:
    """Return a row with its values as their author wrote them, see ``clean_cell``.

    Raises:
        DataError: if it is no JSON object, or nested too deeply.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"expected a JSON object, got {type(row).__name__}")
    try:
        cells: dict[str, Any] = clean_cell(row)
    except RecursionError as exc:
        raise DataError("its lists or objects are nested too deeply") from exc
    return cells


def text_of(row: Mapping[str, Any], key: str) -> str:
    """A text that a row must have; a number is taken as its digits.

    Raises:
        DataError: if there is none, or it is empty or no text.
    """
    value = row.get(key)
    if value is None:
        raise DataError(f"expected {key!r}, there is none")
    return as_text(value, key)


def name_of(row: Mapping[str, Any], key: str) -> str:
    """A text that a row may have; empty if there is none.

    Raises:
        DataError: if it is empty or no text.
    """
    return "" if row.get(key) is None else text_of(row, key)


def as_text(value: object, what: str) -> str:
    """A value that has to be a text; a number is taken as its digits.

    Args:
        value: out of a row.
        what: it is, for the error.

    Raises:
        DataError: if it is something else, or empty.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) != inf:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"expected {what!r} to be a text that is not empty, got {_short(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{what!r} is not valid text: it holds half of a surrogate pair")
    return value.strip()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}..."
