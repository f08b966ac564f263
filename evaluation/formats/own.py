"""A user's own questions: JSON lines, a JSON list or Parquet; the embedded model's tests."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vpt.data.rows import read_entries
from vpt.errors import DataError
from vpt.evaluation.formats.rows import as_text, name_of, offer, read_box, read_rows, text_of
from vpt.evaluation.samples import BadRow, ImageRef, ImageRoots, Sample

_READ = ("id", "image", "images", "question", "answer", "answers", "choices", "box", "group")
"""Keys that become attributes of a sample; the others are its ``facts``."""

_PART: Mapping[type, str] = {str: "path", bytes: "bytes"}


def read_plain(file: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """Read a user's questions.

    Keys of a row are ``image`` (or ``images``, a list), ``question``, ``answer`` (or ``answers``,
    a list), and optionally ``choices``, ``box`` (XYXY, pixels of the first image as seen),
    ``group`` (or ``family``) and ``id`` (else the number of the row). An image is a path, or in
    Parquet bytes, or both as ``{"bytes", "path"}``. Of choices the answer may be the text or the
    letter; it becomes the letter. Other keys become ``facts``.
    """
    is_parquet = file.suffix == ".parquet"
    rows: Iterable[object] = read_parquet(file) if is_parquet else read_entries(file)
    find = partial(images.find, folder=file.parent)
    return read_rows(
        rows, lambda row, name: _plain_sample(row, name, find), lambda row: name_of(row, "id")
    )


def _plain_sample(row: Mapping[str, Any], name: str, find: Callable[[str], str]) -> Sample:
    sample = Sample(
        id=name,
        images=tuple(_image(value, name, find) for value in _one_or_list(row, "image", "images")),
        question=text_of(row, "question"),
        answers=tuple(as_text(a, "answer") for a in _one_or_list(row, "answer", "answers")),
        box=None if row.get("box") is None else read_box(row["box"]),
        group=name_of(row, "group") or name_of(row, "family"),
        facts={key: value for key, value in row.items() if key not in _READ},
    )
    for key, values in (("image", sample.images), ("answer", sample.answers)):
        if not values:
            raise DataError(f"expected {key!r}, there is none")
    choices = tuple(as_text(choice, "choices") for choice in _list(row, "choices"))
    return offer(sample, choices) if choices else sample


def _one_or_list(row: Mapping[str, Any], one: str, several: str) -> Sequence[Any]:
    if row.get(one) is None:
        return _list(row, several)
    if row.get(several) is not None:
        raise DataError(f"there are both {one!r} and {several!r}; keep one")
    return [row[one]]


def _list(row: Mapping[str, Any], key: str) -> Sequence[Any]:
    """Values of a key; empty if it is missing."""
    value = row.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not value:
        raise DataError(f"expected {key!r} to be a list that is not empty, got {value!r}")
    return value


def _image(value: object, name: str, find: Callable[[str], str]) -> ImageRef:
    stored = value if isinstance(value, Mapping) else {_PART.get(type(value), ""): value}
    path, data = stored.get("path"), stored.get("bytes")
    if isinstance(data, bytes) and data:
        return ImageRef(data, path if isinstance(path, str) and path else f"image of {name}")
    if data is None and isinstance(path, str) and path.strip():
        return ImageRef(source := find(path), source)
    raise DataError(
        'expected an image to be a path, or in Parquet bytes or {"bytes", "path"}, '
        f"got {type(value).__name__}"
    )


def read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    """Yield rows without decoding their images, which are ``{"bytes": ..., "path": ...}``."""
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


def read_embedded(file: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """Read held-out questions; the group is ``mode-family``, such as ``"region-lines"``."""
    for number, sample in enumerate(read_plain(file, images)):
        if isinstance(sample, BadRow):
            yield sample
            continue
        names = [sample.facts.get(key) for key in ("mode", "family")]
        if all(isinstance(name, str) and name for name in names):
            yield dataclasses.replace(sample, group="-".join(map(str, names)))
        else:
            yield BadRow(sample.id, f"row {number}: expected 'mode' and 'family', got {names}")
