"""Files of rows or annotations: a JSON list, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vpt.errors import DataError
from vpt.files import write_whole

SUFFIXES = (".json", ".jsonl")
BOM = b"\xef\xbb\xbf"


def read_entries(file: Path) -> list[Any]:
    """Read a JSON list, or a file with one JSON value per line.

    Args:
        file: in UTF-8. What it is shows in its first character: a list begins with ``[``.

    Returns:
        The entries as they are, in order; empty lines are left out.

    Raises:
        DataError: if it cannot be read, naming the line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as exc:
        raise DataError(f"{file} does not exist; check the path") from exc
    except OSError as exc:
        raise DataError(f"cannot read {file}: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{file} is not in UTF-8 (byte {exc.start}); convert it") from exc
    if not is_list(text):
        return _read_lines(file, text)
    try:
        return list(parse_json(text))
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{file} is no whole JSON list: {exc}") from exc


def is_list(text: str) -> bool:
    """Whether a file holds a JSON list, by its first character; else JSON lines are expected."""
    return text.lstrip().startswith("[")


def _read_lines(file: Path, text: str) -> list[Any]:
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


def parse_json(text: str) -> Any:
    """Parse JSON in which each key of an object is given once.

    Raises:
        ValueError: for other text, and if one key of an object is given twice.
    """
    return json.loads(text, object_pairs_hook=_without_repetition)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; one of two values under the same key would be lost without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} is given twice in one object; keep one")
    return content


def write_rows(rows: Iterable[Any], file: Path) -> None:
    """Write rows, one per line: a JSON list, or JSON lines if the name ends in ``.jsonl``.

    Raises:
        OSError: if it cannot be written; the file is then as it was before.
    """
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if file.suffix == ".jsonl":
        text = "".join(f"{line}\n" for line in lines)
    else:
        text = "[\n" + ",\n".join(lines) + "\n]\n"
    write_whole(text, file)
