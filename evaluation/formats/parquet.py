"""Rows of a Parquet file, one after another, with images as they are stored."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vpt.errors import DataError


def read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    """Read rows, without decoding images and without a copy on disk.

    Args:
        file: in Parquet.

    Yields:
        Column -> value; an image as ``{"bytes": ..., "path": ...}``.

    Raises:
        DataError: if it cannot be read, or the library for it is missing.
    """
    if not file.is_file():
        raise DataError(f"{file} does not exist; check the path")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as exc:
        raise DataError(
            f'{file} is Parquet, for which the datasets library is needed: pip install -e ".[eval]"'
        ) from exc
    try:
        rows = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        yield from rows.decode(False)
    except (OSError, ValueError) as exc:  # what pyarrow raises is one of these
        raise DataError(f"{file} is no whole Parquet file: {exc}") from exc
