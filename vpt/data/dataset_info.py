"""The entry by which LLaMA-Factory finds a file of rows: ``dataset_info.json``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vpt.data.row_files import parse_json
from vpt.errors import DataError
from vpt.files import write_whole
from vpt.protocol.rows import KINDS

FORMATTING = "vpt"


def dataset_entry(file_name: str) -> dict[str, Any]:
    """What stands in ``dataset_info.json`` for a file of rows.

    Args:
        file_name: relative to the folder of ``dataset_info.json``, or absolute.
    """
    columns = ["messages", *(kind.column for kind in KINDS.values())]
    return {
        "file_name": file_name,
        "formatting": FORMATTING,
        "columns": {column: column for column in columns},
    }


def read_dataset_info(info_file: Path) -> dict[str, Any]:
    """Content of a ``dataset_info.json``; empty if there is none yet.

    Raises:
        DataError: if it cannot be read, or holds no JSON object.
    """
    try:
        content = parse_json(info_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise DataError(f"cannot read {info_file}: {exc}") from exc
    if not isinstance(content, dict):
        raise DataError(f"expected a JSON object in {info_file}, got {type(content).__name__}")
    return content


def with_entry(info: dict[str, Any], info_file: Path, name: str, rows_file: Path) -> dict[str, Any]:
    """A ``dataset_info.json`` with an entry more.

    Args:
        info: its content so far.
        info_file: where it lies or will lie.
        name: of the data set, as ``dataset:`` in a training config names it.
        rows_file: of the data set.

    Raises:
        DataError: if another entry has that name.
    """
    entry = dataset_entry(os.path.relpath(rows_file, info_file.parent))
    if info.get(name, entry) != entry:
        raise DataError(f"{info_file} has another entry {name!r} already; choose another name")
    return {**info, name: entry}


def write_dataset_info(info: dict[str, Any], info_file: Path) -> None:
    """Write a ``dataset_info.json``, wholly or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    write_whole(json.dumps(info, indent=2, ensure_ascii=False) + "\n", info_file)
