"""Files of rows: how they are read and written, their entry for LLaMA-Factory, their images."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt.errors import DataError, ImageError
from vpt.files import write_atomic
from vpt.protocol.rows import KINDS, ROLES

Row = dict[str, Any]

SUFFIXES = (".json", ".jsonl")
BOM = b"\xef\xbb\xbf"
DATASET_INFO = "dataset_info.json"

_EXACT = 2**53  # from here on a float no longer holds each integer
_CHUNK = 256  # paths handed to the threads at a time


# Reading and writing


def read_text(file: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark; `DataError` if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as exc:
        raise DataError(f"{file} does not exist; check the path") from exc
    except OSError as exc:
        raise DataError(f"cannot read {file}: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{file} is not in UTF-8 (byte {exc.start}); convert it") from exc


def read_entries(file: Path) -> list[Any]:
    """Read the entries of a JSON list, or of a file with one JSON value per line.

    The first character decides: a list begins with ``[``. Empty lines are skipped. A `DataError`
    names the line that cannot be read.
    """
    text = read_text(file)
    if is_list(text):
        try:
            return list(parse_json(text))
        except (ValueError, RecursionError) as exc:
            raise DataError(f"{file} is no whole JSON list: {exc}") from exc
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entries.append(parse_json(line))
        except (ValueError, RecursionError) as exc:
            raise DataError(
                f"{file}, line {number}: {exc}; expected a JSON list, or a JSON object per line"
            ) from exc
    return entries


def read_object(file: Path, expected: str = "one") -> dict[str, Any]:
    """Read a JSON object; the `DataError` for another file names ``expected`` keys."""
    text = read_text(file)
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"cannot read {file}: {exc}") from exc
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"{file} holds no JSON object but a {kind}; expected {expected}")
    return content


def is_list(text: str) -> bool:
    """Whether a file holds a JSON list, by its first character; else JSON lines are expected."""
    return text.lstrip().startswith("[")


def parse_json(text: str) -> Any:
    """Parse JSON in which each key of an object is given once; `ValueError` for other text."""
    return json.loads(text, object_pairs_hook=_without_repetition)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what `json` does silently: to drop all but the last of several equal keys."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} is given twice in one object; keep one")
    return content


def write_rows(rows: Iterable[Any], file: Path) -> None:
    """Write rows, one per line: a JSON list, or JSON lines if the name ends in ``.jsonl``."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if file.suffix == ".jsonl":
        text = "".join(f"{line}\n" for line in lines)
    else:
        text = "[\n" + ",\n".join(lines) + "\n]\n"
    write_atomic(text, file)


def make_row(turns: Sequence[str], images: Mapping[str, Sequence[str]]) -> Row:
    """A row of turns, the user's first, and of paths of images by key of ``KINDS``."""
    messages = [{"role": ROLES[n % 2], "content": content} for n, content in enumerate(turns)]
    columns = {kind.column: list(images.get(key, ())) for key, kind in KINDS.items()}
    return {"messages": messages, **columns}


def clean_cell(value: Any) -> Any:
    """Undo what pandas does to a column with gaps, in lists and mappings too.

    NaN becomes ``None``, a float without a fraction an int; everything else is unchanged.
    """
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() and abs(value) < _EXACT else value
    if isinstance(value, Mapping):
        return {key: clean_cell(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean_cell(item) for item in value]
    return value


# dataset_info.json of LLaMA-Factory


def dataset_entry(file_name: str) -> dict[str, Any]:
    """Entry of a file of rows in the ``dataset_info.json`` of its folder."""
    columns = ["messages", *(kind.column for kind in KINDS.values())]
    return {
        "file_name": file_name,
        "formatting": "vpt",
        "columns": {column: column for column in columns},
    }


def add_dataset_entry(info_file: Path, name: str, rows_file: Path) -> dict[str, Any]:
    """Return the content of a ``dataset_info.json`` with an entry added; nothing is written.

    Raises:
        DataError: if the file cannot be read, or another entry has that name.
    """
    info = read_object(info_file, "entries by name") if info_file.exists() else {}
    entry = dataset_entry(os.path.relpath(rows_file, info_file.parent))
    if info.get(name, entry) != entry:
        raise DataError(f"{info_file} has another entry {name!r} already; choose another name")
    return {**info, name: entry}


def write_dataset_info(info: Mapping[str, Any], info_file: Path) -> None:
    """Write a ``dataset_info.json``, whole or not at all."""
    write_atomic(json.dumps(info, indent=2, ensure_ascii=False) + "\n", info_file)


# Images


@dataclass(frozen=True)
class ImageFacts:
    """Result of opening an image file."""

    size_wh: tuple[int, int] | None  # after EXIF orientation; ``None`` if it cannot be used
    problem: str = ""  # the reason
    is_missing: bool = False


Images = Mapping[str, ImageFacts]
"""Path as in the data, without crop suffix -> facts of the file."""


def measure_images(
    paths: Iterable[str], root: Path | None = None
) -> Iterator[tuple[str, ImageFacts]]:
    """Open every distinct image on several threads, and decode it, so that damage is found.

    Yields ``(path, facts)``, in the order of their first mention; paths have no crop suffix.
    """
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(distinct), _CHUNK):
            chunk = distinct[start : start + _CHUNK]
            yield from zip(chunk, pool.map(lambda path: _measure(path, root), chunk), strict=True)


def _measure(path: str, root: Path | None) -> ImageFacts:
    from vpt.images import (  # needs Pillow, which `vpt --help` must not load
        load_image,
        locate_image,
    )

    try:
        return ImageFacts(load_image(locate_image(path, root)).size_wh)
    except ImageError as exc:
        return ImageFacts(None, str(exc), isinstance(exc.__cause__, FileNotFoundError))
