"""Rows about boxes and numbers of objects, made of pictures annotated as in LVIS or COCO."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from vpt.boxes import ROUNDING_PX, Box, PixelBox, check_box_px
from vpt.data.content_rows import CategoryBoxes, counting_question, counting_rows
from vpt.data.making import RowMaking, digest, path_from
from vpt.data.rows import clean_cell, read_object
from vpt.errors import DataError, RegionError
from vpt.images import load_image
from vpt.protocol.tokens import RELEASED_PIXELS


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture and its annotations."""

    path: str  # relative to the folder of the pictures
    size_wh: tuple[int, int]  # as annotated
    categories: tuple[CategoryBoxes, ...]  # whose boxes are all known and sound


@dataclass
class Annotations:
    """Content of a file; ``left_out`` counts unusable categories of pictures, by reason."""

    pictures: list[AnnotatedPicture] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


# The format


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)


class _Category(_Entry):
    id: int
    name: str

    @property
    def words(self) -> str:
        """``"wine_bucket"`` -> ``"wine bucket"``, ``"bat_(animal)"`` -> ``"bat"``."""
        return self.name.split("_(")[0].replace("_", " ").strip()


class _Object(_Entry):
    id: Any = None
    image_id: int
    category_id: int
    bbox: Any = None
    iscrowd: Any = 0


class _Picture(_Entry):
    id: int
    width: PositiveInt
    height: PositiveInt
    file_name: Any = None
    coco_url: Any = None
    not_exhaustive_category_ids: list[int] | None = None

    @property
    def path(self) -> str:
        """``file_name``, or the end of LVIS's ``coco_url``: ``train2017/000000000009.jpg``."""
        if isinstance(self.file_name, str) and self.file_name:
            return self.file_name
        if isinstance(self.coco_url, str) and self.coco_url.count("/") > 1:
            return "/".join(self.coco_url.split("/")[-2:])
        raise DataError(f"image {self.id} has neither file_name nor coco_url")


class _File(_Entry):
    images: list[_Picture]
    annotations: list[_Object]
    categories: list[_Category]


def read_lvis(file: Path, *, max_boxes: int = 10, min_side: int = 4) -> Annotations:
    """Read annotations in the format of LVIS, which is COCO's with a few more keys.

    A category with more than ``max_boxes``, a box smaller than ``min_side`` on the 336 grid, or one
    that cannot be used, is left out of that picture, because its number is not known.

    Raises:
        DataError: if the file cannot be read, or has another format.
    """
    content = read_object(file, "images, annotations, categories")
    try:
        return _collect(_File.model_validate(clean_cell(content)), max_boxes, min_side)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"])
        got = "" if first["type"] == "missing" else f", got {first['input']!r:.60}"
        raise DataError(f"{file}: {where[1:]}: {first['msg']}{got}") from exc
    except DataError as exc:
        raise DataError(f"{file}: {exc}") from exc


def _collect(content: _File, max_boxes: int, min_side: int) -> Annotations:
    """Sort boxes by picture and category."""
    for key, entries in content:
        numbers = Counter(entry.id for entry in entries if isinstance(entry.id, int))
        if repeated := [number for number, times in numbers.items() if times > 1]:
            raise DataError(f"two of {key!r} have the id {repeated[0]}; keep one of each id")
    names = {category.id: category.words for category in content.categories}
    boxes: dict[int, dict[int, list[_Object]]] = {}
    for thing in content.annotations:
        if thing.category_id not in names:
            raise DataError(f"an annotation has category_id {thing.category_id}, which is none")
        boxes.setdefault(thing.image_id, {}).setdefault(thing.category_id, []).append(thing)
    read = Annotations()
    for picture in content.images:
        size_wh = picture.width, picture.height
        found = boxes.pop(picture.id, {})
        shared = Counter(names[category] for category in found)
        categories = []
        for category, things in found.items():
            if shared[names[category]] > 1:  # bat_(animal) and bat_(sports_equipment)
                problem = "a name that two categories of the picture share"
            elif category in (picture.not_exhaustive_category_ids or ()):
                problem = "annotation that is not exhaustive"
            else:
                problem = _problem(things, size_wh, max_boxes, min_side)
            if problem:
                read.left_out[problem] += 1
                continue
            scaled = sorted(to_pixel_grid(_corners(thing.bbox), size_wh) for thing in things)
            categories.append(CategoryBoxes(names[category], tuple(scaled)))
        read.pictures.append(AnnotatedPicture(picture.path, size_wh, tuple(categories)))
    if boxes:
        raise DataError(f"annotations name image {next(iter(boxes))}, which is none")
    return read


def to_pixel_grid(box: Box, size_wh: tuple[int, int]) -> PixelBox:
    """Convert a box in pixels, the last two exclusive, to the 336 grid of ``<PIXEL_n>``.

    The result names the first and last pixels that it touches, all four in 0 to 335.
    """
    grid = []
    for start, end, side in zip(box[:2], box[2:], size_wh, strict=True):
        low = math.floor(start * RELEASED_PIXELS / side + 1e-6)
        high = math.ceil(end * RELEASED_PIXELS / side - 1e-6) - 1
        low = min(max(low, 0), RELEASED_PIXELS - 1)
        grid.append((low, min(max(high, low), RELEASED_PIXELS - 1)))
    (x0, x1), (y0, y1) = grid
    return x0, y0, x1, y1


def _problem(
    things: Sequence[_Object], size_wh: tuple[int, int], max_boxes: int, min_side: int
) -> str:
    """Why the objects of a category cannot be counted; empty if they can."""
    if any(thing.iscrowd for thing in things):
        return "a crowd"
    if len(things) > max_boxes:
        return f"more than {max_boxes} boxes"
    if not all(_is_sound(thing.bbox, size_wh) for thing in things):
        return "a box that is empty, not four numbers, or outside of the picture"
    for box in (_corners(thing.bbox) for thing in things):
        try:
            check_box_px(box)
        except RegionError:
            return "a box with numbers of 0 to 1, as fractions have; expected pixels"
        x0, y0, x1, y1 = to_pixel_grid(box, size_wh)
        if min(x1 - x0, y1 - y0) + 1 < min_side:
            return f"a box of less than {min_side} pixels on the 336 grid"
    return ""


def _is_sound(bbox: object, size_wh: tuple[int, int]) -> bool:
    if not isinstance(bbox, list) or len(bbox) != 4:
        return False
    if not all(type(value) in (int, float) and math.isfinite(value) for value in bbox):
        return False
    x, y, width, height = bbox
    room_x, room_y = size_wh[0] + ROUNDING_PX - x, size_wh[1] + ROUNDING_PX - y
    is_inside = min(x, y) >= -ROUNDING_PX and width <= room_x and height <= room_y
    return is_inside and width > 0 and height > 0


def _corners(bbox: Sequence[float]) -> Box:
    x, y, width, height = bbox
    return x, y, x + width, y + height


# Rows


@dataclass(frozen=True)
class CountingRecipe:
    """Options of rows about boxes and numbers."""

    seed: int = 0  # of the choice of categories
    num_categories: int = 1  # most to ask about in a picture
    skip_bad: bool = False  # skip pictures that are missing or have another size


def make_counting_rows(
    annotations: Annotations, pictures: Path, recipe: CountingRecipe, folder: Path
) -> RowMaking:
    """Prepare rows about boxes and numbers; `DataError` if there is nothing to ask about."""
    annotated = [one for one in annotations.pictures if one.categories]
    if not annotated:
        raise DataError("no picture has a category whose objects can be counted")
    content = {**vars(recipe), "annotations": digest(repr((annotated, str(pictures))).encode())}
    return RowMaking(
        folder,
        content,
        ("boxes", "count_steps", "count_direct"),
        [(one.path, one) for one in annotated],
        partial(_make_one, pictures, recipe, folder),
        "picture",
        recipe.skip_bad,
    )


def _make_one(
    pictures: Path,
    recipe: CountingRecipe,
    folder: Path,
    number: int,
    annotated: AnnotatedPicture,
    counts: Counter[str],
) -> Sequence[tuple[dict[str, Any], ...]]:
    """Entries of all files, for each category that is asked about."""
    file = pictures / annotated.path
    width, height = load_image(file).size_wh
    if (width, height) != annotated.size_wh:
        raise DataError(
            f"{file} has {width}x{height} px, annotated are "
            f"{annotated.size_wh[0]}x{annotated.size_wh[1]}"
        )
    path = path_from(folder, file)
    rng = np.random.default_rng([recipe.seed, number])
    made = []
    for index in rng.permutation(len(annotated.categories))[: recipe.num_categories]:
        found = annotated.categories[index]
        made.append((*counting_rows(path, found), *counting_question(number, path, found)))
        counts[str(len(found.boxes))] += 1
    return made
