"""One's own questions: JSON lines, a JSON list or Parquet, with image, question and answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vpt.data.row_files import read_entries
from vpt.errors import DataError
from vpt.evaluation.formats.boxes import read_box
from vpt.evaluation.formats.choices import offer
from vpt.evaluation.formats.image_roots import ImageRoots
from vpt.evaluation.formats.parquet import read_parquet
from vpt.evaluation.formats.rows import as_text, name_of, read_rows, text_of
from vpt.evaluation.samples import BadRow, ImageRef, Sample

_READ = ("id", "image", "images", "question", "answer", "answers", "choices", "box", "group")
"""Keys that become attributes of a sample; the others are its ``facts``."""

_PART: Mapping[type, str] = {str: "path", bytes: "bytes"}


def read(file: Path, images: ImageRoots) -> Iterator[Sample | BadRow]:
    """Read questions of one's own.

    Keys of a row are ``image`` (or ``images``, a list), ``question``, ``answer`` (or ``answers``,
    a list), and if one likes ``choices``, ``box`` (XYXY, pixels of the first image as seen),
    ``group`` (or ``family``) and ``id`` (else the number of the row). An image is a path, or in
    Parquet bytes, or both as ``{"bytes", "path"}``. Of choices the answer may be the text or the
    letter; it becomes the letter.

    Args:
        file: in Parquet if its name ends so, else a JSON list or JSON lines.
        images: where they are; relative paths are in the folder of the file.

    Raises:
        DataError: if the file cannot be read.
    """
    is_parquet = file.suffix == ".parquet"
    rows: Iterable[object] = read_parquet(file) if is_parquet else read_entries(file)
    find = partial(images.find, folder=file.parent)
    return read_rows(
        rows, lambda row, name: _read_row(row, name, find), lambda row: name_of(row, "id")
    )


def _read_row(row: Mapping[str, Any], name: str, find: Callable[[str], str]) -> Sample:
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
    """Values of a key; none if it is not there."""
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
