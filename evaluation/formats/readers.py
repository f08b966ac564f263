"""The formats by name: which reader a file needs, and a guess from its first row."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vpt.errors import DataError, PromptError
from vpt.evaluation.formats.image_roots import ImageRoots
from vpt.evaluation.samples import BadRow, Sample

Reader = Callable[[Path, ImageRoots], Iterator[Sample | BadRow]]
"""``(file, where its images are)`` -> a sample or a bad row for each row, in order."""

FORMATS: Mapping[str, frozenset[str]] = {
    "released": frozenset({"messages"}),
    "vstar": frozenset({"question_id", "text", "image", "label"}),
    "aurora": frozenset({"question_id", "text", "image"}),
    "embedded": frozenset({"image", "question", "mode", "family", "look"}),
    "plain": frozenset({"question"}),
}
"""Formats, and the keys by which a row shows its own: the first that fits is it."""

_NUM_READ = 2**20  # characters in which a first row has to end


def find_reader(name: str) -> Reader:
    """The reader of a format; only now is it imported, for some need much.

    Raises:
        PromptError: for an unknown format.
    """
    if name not in FORMATS:
        raise PromptError(f"unknown format {name!r}; available: {', '.join(FORMATS)}")
    reader: Reader = importlib.import_module(f"vpt.evaluation.formats.{name}").read
    return reader


def guess_format(file: Path) -> str | None:
    """Tell the format by the name of a file or its first row; ``None`` if that does not show.

    Raises:
        DataError: if there is no such file.
    """
    if file.suffix == ".parquet":
        return "plain"
    try:
        with file.open(encoding="utf-8-sig", errors="replace") as stream:
            start = stream.read(_NUM_READ).lstrip()
    except OSError as exc:
        raise DataError(f"cannot read {file}: {exc.strerror or exc}") from exc
    try:
        row, _ = json.JSONDecoder().raw_decode(start.removeprefix("[").lstrip())
    except (ValueError, RecursionError):
        return None
    keys = set(row) if isinstance(row, dict) else set()
    return next((name for name, needed in FORMATS.items() if needed <= keys), None)
