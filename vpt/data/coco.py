"""Annotation files in COCO's format, as LVIS and RefCOCO have it too."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from vpt.boxes import ROUNDING_PX, Box
from vpt.data.rows import clean_cell, read_object
from vpt.errors import DataError


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)


class Category(_Entry):
    """A kind of object."""

    id: int
    name: str

    @property
    def words(self) -> str:
        """``"wine_bucket"`` -> ``"wine bucket"``, ``"bat_(animal)"`` -> ``"bat"``."""
        return self.name.split("_(")[0].replace("_", " ").strip()


class AnnotatedObject(_Entry):
    """An object in a picture; its ``bbox`` is left, top, width and height, unchecked."""

    id: Any = None
    image_id: int
    category_id: int
    bbox: Any = None
    iscrowd: Any = 0


class Picture(_Entry):
    """A picture; of RefCOCO in MDETR's form, its ``caption`` describes its one object."""

    id: int
    width: PositiveInt
    height: PositiveInt
    file_name: Any = None
    coco_url: Any = None
    caption: str | None = None
    not_exhaustive_category_ids: list[int] | None = None

    @property
    def path(self) -> str:
        """``file_name``, or the end of LVIS's ``coco_url``: ``train2017/000000000009.jpg``."""
        if isinstance(self.file_name, str) and self.file_name:
            return self.file_name
        if isinstance(self.coco_url, str) and self.coco_url.count("/") > 1:
            return "/".join(self.coco_url.split("/")[-2:])
        raise DataError(f"image {self.id} has neither file_name nor coco_url")


class Sentence(_Entry):
    """One expression for an object."""

    sent: str


class Reference(_Entry):
    """Expressions for an object, as RefCOCO has them."""

    ann_id: int
    sentences: list[Sentence]


class CocoFile(_Entry):
    """Content of a file; RefCOCO's ``refs`` are optional."""

    images: list[Picture]
    annotations: list[AnnotatedObject]
    categories: list[Category]
    refs: list[Reference] = []

    @property
    def names(self) -> dict[int, str]:
        """Words of each category."""
        return {category.id: category.words for category in self.categories}


def read_coco(file: Path, content: dict[str, Any] | None = None) -> CocoFile:
    """Read a file whose ids are unique and whose annotations name what exists.

    Args:
        content: of the file, if it was parsed already.

    Raises:
        DataError: if the file cannot be read, or has another format.
    """
    if content is None:
        content = read_object(file, "images, annotations, categories")
    try:
        return _checked(CocoFile.model_validate(clean_cell(content)))
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"])
        got = "" if first["type"] == "missing" else f", got {first['input']!r:.60}"
        raise DataError(f"{file}: {where[1:]}: {first['msg']}{got}") from exc
    except DataError as exc:
        raise DataError(f"{file}: {exc}") from exc


def _checked(content: CocoFile) -> CocoFile:
    for key in ("images", "annotations", "categories"):
        entries = getattr(content, key)
        numbers = Counter(entry.id for entry in entries if isinstance(entry.id, int))
        if repeated := [number for number, times in numbers.items() if times > 1]:
            raise DataError(f"two of {key!r} have the id {repeated[0]}; keep one of each id")
    pictures, names = {picture.id for picture in content.images}, content.names
    for thing in content.annotations:
        if thing.category_id not in names:
            raise DataError(f"an annotation has category_id {thing.category_id}, which is none")
        if thing.image_id not in pictures:
            raise DataError(f"annotations name image {thing.image_id}, which is none")
    return content


def is_sound(bbox: object, size_wh: tuple[int, int]) -> bool:
    """Whether a ``bbox`` is four numbers, not empty, and within its picture but for rounding."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return False
    if not all(type(value) in (int, float) and math.isfinite(value) for value in bbox):
        return False
    x, y, width, height = bbox
    room_x, room_y = size_wh[0] + ROUNDING_PX - x, size_wh[1] + ROUNDING_PX - y
    is_inside = min(x, y) >= -ROUNDING_PX and width <= room_x and height <= room_y
    return is_inside and width > 0 and height > 0


def corners(bbox: Sequence[float]) -> Box:
    """Turn left, top, width and height into XYXY."""
    x, y, width, height = bbox
    return x, y, x + width, y + height
