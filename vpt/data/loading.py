"""Whether the loader that LLaMA-Factory uses, of the datasets library, reads a file of rows.

Where LLaMA-Factory is installed, its loader is asked. Elsewhere a model of it decides, with the
rules of the version that LLaMA-Factory pins (datasets 4.0): a column has one type in the whole
file, and JSON lines are read in chunks, of which the first fixes the types.
"""

from __future__ import annotations

import importlib
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vpt.data.checks import Finding
from vpt.data.rows import BOM, SUFFIXES, is_list
from vpt.protocol.rows import KINDS

Found = tuple[int | None, Finding]
"""Number of a row, ``None`` for the file as a whole, and the finding."""

CHUNK_BYTES = 10 << 20  # datasets' packaged_modules/json/json.py, `chunksize`
_MOST_INT, _LEAST_INT = 2**64 - 1, -(2**63)
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_loading(file: Path, rows: Sequence[object]) -> list[Found]:
    """Find what prevents training from loading a file; ``rows`` are all of its entries."""
    if file.suffix not in SUFFIXES:
        endings = " or ".join(SUFFIXES)
        return [_found(None, f"expected a name that ends in {endings}, got {file.name}")]
    # A file of nothing but null kills pyarrow 26 without an exception.
    are_objects = all(isinstance(row, Mapping) for row in rows)
    if not has_loader() or not are_objects:
        return list(predict_loading(file.read_bytes(), rows))
    if not (said := ask_loader(file, rows)):
        return []
    return list(predict_loading(file.read_bytes(), rows)) or [said]


def has_loader() -> bool:
    """Whether the loader of the training is installed."""
    return find_spec("llamafactory") is not None and find_spec("datasets") is not None


def ask_loader(file: Path, rows: Sequence[object]) -> Found | None:
    """Let the loader read a file, and check that it reads texts as texts."""
    datasets = importlib.import_module("datasets")
    quiet, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = datasets.load_dataset(
                "json", data_files=[str(file)], split="train", cache_dir=cache
            )
            return _compare(rows, loaded)
    except (datasets.exceptions.DatasetGenerationError, ValueError, TypeError) as exc:
        cause: BaseException = exc
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return _found(None, f"the loader refuses the file: {cause}")
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not quiet:
            datasets.enable_progress_bars()


def _compare(rows: Sequence[object], loaded: Any) -> Found | None:
    if len(loaded) != len(rows):
        return _found(None, f"the loader reads {len(loaded)} rows, the file has {len(rows)}")
    for name, kind in _kinds_of_texts(loaded.features.arrow_schema):
        if kind not in ("string", "large_string", "null"):
            return _found(None, f"the loader takes the texts in {name} for {kind}")
    return None


def _kinds_of_texts(schema: Any) -> Iterator[tuple[str, str]]:
    """Types that the loader gives to the texts of rows, where their columns are lists."""
    for column in ("messages", *(kind.column for kind in KINDS.values())):
        one = schema.field(column).type if column in schema.names else None
        item: Any = getattr(one, "value_type", None)
        if column != "messages":
            yield column, str(item or "null")
            continue
        for number in range(getattr(item, "num_fields", 0)):
            part = item.field(number)
            if part.name in ("role", "content"):
                yield f"{column}[].{part.name}", str(part.type)


def predict_loading(data: bytes, rows: Sequence[object]) -> Iterator[Found]:
    """Find what the loader would refuse, without it; ``rows`` are the parsed ``data``."""
    in_list = is_list(data.decode("utf-8-sig"))
    if in_list and data.startswith(BOM):
        yield _found(None, "the file begins with a byte order mark; save it as UTF-8 without one")
    first: _Type | None = None
    start = 0
    for chunk in [rows] if in_list else _chunks(data, rows):
        types = _Type()
        for number, row in enumerate(chunk, start):
            if not isinstance(row, Mapping):
                yield _found(number, "the row is not a JSON object")
            elif problem := _value_problem(row, in_list) or types.take(row, "", number):
                yield _found(number, problem)
        start += len(chunk)
        if first is None:
            first = types
        else:
            yield from first.lacks(types, "")


def _chunks(data: bytes, rows: Sequence[object]) -> Iterator[Sequence[object]]:
    """Rows of a file of JSON lines in the loader's chunks: some bytes, to the end of the line."""
    start = number = 0
    while start < len(data):
        end = data.find(b"\n", min(start + CHUNK_BYTES, len(data))) + 1 or len(data)
        num_rows = sum(bool(line.strip()) for line in data[start:end].split(b"\n"))
        yield rows[number : number + num_rows]
        start, number = end, number + num_rows


@dataclass
class _Type:
    """Type of a column, or of a part of it."""

    kind: str = ""  # in words; empty as long as all values are missing
    row: int = 0  # the first with a value
    fraction_row: int | None = None  # the first with a number that has a fraction
    parts: dict[str, _Type] = field(default_factory=dict)  # by key; of a list under ``[]``

    def take(self, value: object, path: str, row: int) -> str:
        """Add a value; return how it contradicts earlier ones, or an empty text."""
        if value is None:
            return ""
        kind = _kind(value)
        if not self.kind:
            self.kind, self.row = kind, row
        if kind != self.kind:
            return (
                f"{path or 'the row'} is {kind}, in row {self.row} it is {self.kind}; "
                "write one type in all rows, or leave the column out"
            )
        if isinstance(value, float) and self.fraction_row is None:
            self.fraction_row = row
        items = value if isinstance(value, list) else ()
        parts = value.items() if isinstance(value, Mapping) else [("[]", one) for one in items]
        for key, one in parts:
            part = self.parts.setdefault(key, _Type(row=row))
            if problem := part.take(one, _join(path, key), row):
                return problem
        return ""

    def lacks(self, later: _Type, path: str) -> Iterator[Found]:
        """Find what in a later chunk does not fit the types of the first."""
        if later.kind and later.kind != self.kind:
            yield _late(path, later.kind, later.row)
            return
        if later.fraction_row is not None and self.fraction_row is None:
            yield _late(path, "a number with a fraction", later.fraction_row)
        for key, part in later.parts.items():
            where = _join(path, key)
            if key in self.parts or key == "[]":
                yield from self.parts.get(key, _Type()).lacks(part, where)
            else:
                yield _late(where, "there", part.row)


def _join(path: str, key: str) -> str:
    return f"{path}{key}" if key == "[]" or not path else f"{path}.{key}"


def _late(path: str, what: str, row: int) -> Found:
    return _found(
        row,
        f"{path} is {what}, which no row of the first {CHUNK_BYTES >> 20} MB has; move such a row "
        "to the beginning, or write a JSON list instead of JSON lines",
    )


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, list) else "an object"


def _value_problem(value: object, in_list: bool) -> str:
    """A rare value, anywhere in a row, that one of the two parsers cannot read."""
    if isinstance(value, Mapping):
        problems = (_value_problem(one, in_list) for pair in value.items() for one in pair)
        return next(filter(None, problems), "")
    if isinstance(value, list):
        return next(filter(None, (_value_problem(one, in_list) for one in value)), "")
    if isinstance(value, str) and not in_list and _SURROGATE.search(value):
        return "the row contains half of a surrogate pair"
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if is_int and not _LEAST_INT <= value <= _MOST_INT:  # type: ignore[operator]
        return f"the row contains a number of more than 64 bits: {str(value)[:30]}..."
    return ""


def _found(number: int | None, detail: str) -> Found:
    return number, Finding("not-loadable", detail)
