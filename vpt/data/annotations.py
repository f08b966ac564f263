"""Plain annotations: an image, a question, an answer and, if it is known, where the evidence is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from vpt.boxes import Box
from vpt.data.cells import clean_cell
from vpt.data.row_kinds import ROW_KINDS
from vpt.errors import DataError
from vpt.protocol.calls import find_symbols
from vpt.protocol.rows import KINDS, split_crop_suffix

KEYS = ("image", "question", "answer", "box", "kind")


@dataclass(frozen=True)
class Annotation:
    """One annotation.

    Attributes:
        image: path, relative to the images' folder or absolute.
        question: without invitation and placeholders.
        answer: as the model shall write it.
        box: of the evidence, XYXY in pixels of the image as seen, that is after EXIF orientation.
        kind: one of :data:`vpt.data.row_kinds.ROW_KINDS` if only that row shall be built of it.
    """

    image: str
    question: str
    answer: str
    box: Box | None = None
    kind: str | None = None


def read_annotation(entry: object) -> Annotation:
    """Read an annotation out of a file.

    Args:
        entry: a JSON object with ``image``, ``question`` and ``answer``, and optionally ``box``
            and ``kind``. An answer may be a number, which is taken as its digits. NaN is a missing
            value, as in all that pandas has written. What else the object has is ignored.

    Raises:
        DataError: if something is missing, or is not what it should be.
    """
    if not isinstance(entry, Mapping):
        raise DataError(f"expected a JSON object, got {type(entry).__name__}")
    entry = clean_cell(entry)
    assert isinstance(entry, Mapping)
    if type(answer := entry.get("answer")) in (int, float):
        entry = {**entry, "answer": str(answer)}
    image, question, answer = (_text(entry, key) for key in ("image", "question", "answer"))
    if split_crop_suffix(image)[1] is not None:
        raise DataError(f"image {image!r} names a crop; give the whole image")
    kind = entry.get("kind")
    if kind is not None and kind not in ROW_KINDS:
        raise DataError(f"unknown kind {kind!r}; available: {', '.join(ROW_KINDS)}")
    box = entry.get("box")
    if kind == "region" and box is None:
        raise DataError("kind 'region' needs a box")
    return Annotation(image, question, answer, None if box is None else _box(box), kind)


def _text(entry: Mapping[str, Any], key: str) -> str:
    """A text that is there, and holds nothing that a model or the format would read otherwise."""
    text = entry.get(key)
    if not isinstance(text, str) or not text.strip():
        problem = "there is none" if text is None else f"got {text!r}"
        raise DataError(f"expected {key!r} to be a text that is not empty, {problem}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{key!r} is not valid text: it holds half of a surrogate pair")
    reserved = [kind.placeholder for kind in KINDS.values() if kind.placeholder in text]
    if reserved := reserved + find_symbols(text):
        raise DataError(
            f"{key!r} holds {reserved[0]}, which would be read as an image or a control token; "
            "write it otherwise"
        )
    return text


def _box(box: object) -> Box:
    values = box if isinstance(box, list) else []
    numbers = [v for v in values if type(v) in (int, float) and abs(v) < inf]
    if len(values) != 4 or len(numbers) != 4:
        raise DataError(f"expected 'box' to be four numbers x0, y0, x1, y1 in pixels, got {box!r}")
    x0, y0, x1, y1 = numbers
    if x0 >= x1 or y0 >= y1:
        raise DataError(f"box {box} is empty or reversed; expected x0 < x1 and y0 < y1")
    return x0, y0, x1, y1
