"""Values of rows, checked: texts, boxes, options of multiple choice; one sample per row."""

from __future__ import annotations

import dataclasses
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf, isfinite
from typing import Any

from vpt.boxes import Box, check_box_px
from vpt.data.rows import clean_cell
from vpt.errors import DataError, RegionError
from vpt.evaluation.samples import BadRow, Sample


def read_rows(
    rows: Iterable[object],
    read_row: Callable[[Mapping[str, Any], str], Sample],
    name_row: Callable[[Mapping[str, Any]], str] = lambda row: "",
) -> Iterator[Sample | BadRow]:
    """Make a sample or a bad row of each row, in order.

    ``read_row`` takes row and id, and raises ``DataError`` for a bad row. If the id of
    ``name_row`` is empty, it is the number of the row, counted from 0.
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
    """The values of a row, without pandas' marks of gaps; ``DataError`` if it is not an object."""
    if not isinstance(row, Mapping):
        raise DataError(f"expected a JSON object, got {type(row).__name__}")
    try:
        cells: dict[str, Any] = clean_cell(row)
    except RecursionError as exc:
        raise DataError("its lists or objects are nested too deeply") from exc
    return cells


def text_of(row: Mapping[str, Any], key: str) -> str:
    """A text that a row must have, see :func:`as_text`."""
    value = row.get(key)
    if value is None:
        raise DataError(f"expected {key!r}, there is none")
    return as_text(value, key)


def name_of(row: Mapping[str, Any], key: str) -> str:
    """A text that a row may have, see :func:`as_text`; empty if there is none."""
    return "" if row.get(key) is None else text_of(row, key)


def as_text(value: object, what: str) -> str:
    """A value that must be a text (a number becomes its digits), named ``what`` in the error."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) != inf:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        got = repr(value)
        got = got if len(got) <= 60 else f"{got[:50]}..."
        raise DataError(f"expected {what!r} to be a text that is not empty, got {got}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{what!r} is not valid text: it holds half of a surrogate pair")
    return value.strip()


def read_box(value: object, *, is_xywh: bool = False) -> Box:
    """Read a box, XYXY in pixels of the image as seen, from a list of four numbers.

    Raises ``DataError`` for anything else: empty, reversed, or in fractions of the image.
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


LETTERS = string.ascii_uppercase
"""Of options, in order."""

_OPTION = re.compile(r"\(([A-Z])\)\s*(\S.*?)\s*")
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")

ASK_OPTION = "Answer with the option's letter from the given choices directly."
"""As V*Bench and LLaVA's prompts have it."""
ASK_LETTER = "Answer with the letter directly."


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """Split V*Bench's text into the question and the texts of options, a line ``(A) red`` each.

    An instruction after them is dropped.
    """
    lines = text.split("\n")
    matches = [_OPTION.fullmatch(line.strip()) for line in lines]
    first = next((i for i, found in enumerate(matches) if found and found[1] == "A"), None)
    if first is None:
        return text.strip(), ()
    options = []
    for letter, found in zip(LETTERS, matches[first:], strict=False):
        if found is None or found[1] != letter:
            break
        options.append(found[2])
    return "\n".join(lines[:first]).strip(), tuple(options)


def ask_with_options(sample: Sample) -> str:
    """The prompt: the question, and its options if it has any."""
    if not sample.choices:
        return sample.question
    if sample.choices == tuple(LETTERS[: len(sample.choices)]):  # these stand in the picture
        return f"{sample.question}\n{ASK_LETTER}"
    options = zip(LETTERS, sample.choices, strict=False)
    lines = [f"({letter}) {choice}" for letter, choice in options]
    return "\n".join([sample.question, *lines, ASK_OPTION])


def letter_of(answer: str, choices: Sequence[str]) -> str:
    """The letter of the option that an answer names by letter or text; ``DataError`` if not one."""
    text = _fold(answer)
    found = _LETTER.fullmatch(text)
    named = {LETTERS[i] for i, choice in enumerate(choices) if _fold(choice) == text}
    if found and found[1].upper() in LETTERS[: len(choices)]:
        named.add(found[1].upper())
    if not named:
        raise DataError(f"answer {answer!r} is none of the choices: {', '.join(choices)}")
    if len(named) > 1:
        letters = " and ".join(sorted(named))
        raise DataError(f"answer {answer!r} may mean {letters}; write the letter in parentheses")
    return named.pop()


def _fold(text: str) -> str:
    """Fold case and full-width forms."""
    return unicodedata.normalize("NFKC", text).strip().casefold()


def offer(sample: Sample, choices: tuple[str, ...]) -> Sample:
    """The sample with choices, its answers as letters; ``DataError`` if one is not a choice."""
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"expected 2 to {len(LETTERS)} choices, got {len(choices)}")
    answers = tuple(letter_of(answer, choices) for answer in sample.answers)
    return dataclasses.replace(sample, choices=choices, answers=answers)
