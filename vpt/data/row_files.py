"""Files of rows or annotations: a JSON list, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vpt.errors import DataError
from vpt.files import write_whole

SUFFIXES = (".json", ".jsonl")


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
    if not text.lstrip().startswith("["):
        return _read_lines(file, text)
    try:
        return list(json.loads(text))
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{file} is no whole JSON list: {exc}") from exc


def _read_lines(file: Path, text: str) -> list[Any]:
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError) as exc:
            raise DataError(
                f"{file}, line {number}: {exc}; expected a JSON list, or a JSON object per line"
            ) from exc
    return entries


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
