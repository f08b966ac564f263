"""LVIS and COCO annotations: which boxes of which category are in which picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpt.boxes import ROUNDING_PX, Box, PixelBox, check_box_px
from vpt.data.cells import clean_cell
from vpt.data.row_files import parse_json
from vpt.errors import DataError, RegionError
from vpt.protocol.tokens import RELEASED_PIXELS


@dataclass(frozen=True)
class CategoryBoxes:
    """All objects of one category in a picture.

    Attributes:
        category: its name, in words.
        boxes: left, top, right, bottom on the 336 grid, all four pixels of the object; from left
            to right.
    """

    category: str
    boxes: tuple[PixelBox, ...]


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture and what is annotated in it.

    Attributes:
        path: within the folder of the pictures.
        size_wh: ``(W, H)``, as annotated.
        categories: whose boxes are all known and sound.
    """

    path: str
    size_wh: tuple[int, int]
    categories: tuple[CategoryBoxes, ...]


@dataclass
class Annotations:
    """What a file of annotations holds.

    Attributes:
        pictures: in the order of the file.
        left_out: why categories of pictures were left out -> how many.
    """

    pictures: list[AnnotatedPicture] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_lvis(file: Path, *, max_boxes: int = 10, min_side: int = 4) -> Annotations:
    """Read annotations in the format of LVIS, which is COCO's with a few keys more.

    A category of a picture counts as a whole: if one of its boxes cannot be used, its number is
    not known, and nothing is asked about it.

    Args:
        file: JSON with ``images``, ``annotations`` (``bbox`` is left, top, width, height in
            pixels) and ``categories``.
        max_boxes: categories with more in a picture are left out.
        min_side: of a box on the 336 grid; categories with smaller ones are left out.

    Raises:
        DataError: if the file is no such thing.
    """
    content = _read_json(file)
    names = {}
    for entry in _list(content, "categories", file):
        names[_value(entry, "id", int, file)] = _in_words(_value(entry, "name", str, file))
    boxes: dict[int, dict[int, list[Mapping[str, Any]]]] = {}
    for entry in _list(content, "annotations", file):
        category = _value(entry, "category_id", int, file)
        if category not in names:
            raise DataError(f"{file}: an annotation has category_id {category}, which is none")
        picture = _value(entry, "image_id", int, file)
        boxes.setdefault(picture, {}).setdefault(category, []).append(entry)
    read = Annotations()
    for entry in _list(content, "images", file):
        size_wh = _value(entry, "width", int, file), _value(entry, "height", int, file)
        if min(size_wh) < 1:
            raise DataError(f"{file}: an image has {size_wh[0]}x{size_wh[1]} px")
        unsure = set(entry.get("not_exhaustive_category_ids") or ())
        found = boxes.pop(_value(entry, "id", int, file), {})
        named = Counter(names[category] for category in found)
        categories = []
        for category, entries in found.items():
            if named[names[category]] > 1:  # bat_(animal) and bat_(sports_equipment)
                read.left_out["a name that two categories of the picture share"] += 1
                continue
            if problem := _problem(entries, size_wh, category in unsure, max_boxes, min_side):
                read.left_out[problem] += 1
                continue
            scaled = sorted(to_pixel_grid(_corners(one["bbox"]), size_wh) for one in entries)
            categories.append(CategoryBoxes(names[category], tuple(scaled)))
        read.pictures.append(AnnotatedPicture(_path(entry, file), size_wh, tuple(categories)))
    if boxes:
        raise DataError(f"{file}: annotations name image {next(iter(boxes))}, which is none")
    return read


def to_pixel_grid(box: Box, size_wh: tuple[int, int]) -> PixelBox:
    """Bring a box to the 336 grid, as ``<PIXEL_n>`` names it.

    Args:
        box: XYXY in pixels, the last two exclusive; it may reach out of the picture.
        size_wh: ``(W, H)`` of the picture.

    Returns:
        Left, top, right, bottom: the first and last pixels that it touches, all four in 0 to 335.
    """
    grid = []
    for start, end, side in zip(box[:2], box[2:], size_wh, strict=True):
        low = math.floor(start * RELEASED_PIXELS / side + 1e-6)
        high = math.ceil(end * RELEASED_PIXELS / side - 1e-6) - 1
        low = min(max(low, 0), RELEASED_PIXELS - 1)
        grid.append((low, min(max(high, low), RELEASED_PIXELS - 1)))
    (x0, x1), (y0, y1) = grid
    return x0, y0, x1, y1


def say_plural(name: str) -> str:
    """The plural of a noun by rule: ``"star"`` -> ``"stars"``; the last word is changed."""
    head, space, noun = name.rpartition(" ")
    if noun in _IRREGULAR:
        return head + space + _IRREGULAR[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return f"{name}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


_IRREGULAR = {
    "child": "children",
    "fish": "fish",
    "foot": "feet",
    "goose": "geese",
    "half": "halves",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "man": "men",
    "mouse": "mice",
    "person": "people",
    "scissors": "scissors",
    "sheep": "sheep",
    "shelf": "shelves",
    "tooth": "teeth",
    "wolf": "wolves",
    "woman": "women",
}


def _problem(
    entries: list[Mapping[str, Any]],
    size_wh: tuple[int, int],
    is_unsure: bool,
    max_boxes: int,
    min_side: int,
) -> str:
    """Why the objects of a category cannot be counted; empty if they can."""
    if is_unsure:
        return "annotation that is not exhaustive"
    if any(entry.get("iscrowd") for entry in entries):
        return "a crowd"
    if len(entries) > max_boxes:
        return f"more than {max_boxes} boxes"
    if not all(_is_sound(entry.get("bbox"), size_wh) for entry in entries):
        return "a box that is empty, no four numbers, or outside of the picture"
    for entry in entries:
        try:
            check_box_px(_corners(entry["bbox"]))
        except RegionError:
            return "a box with numbers of 0 to 1, as fractions have; expected pixels"
        x0, y0, x1, y1 = to_pixel_grid(_corners(entry["bbox"]), size_wh)
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


def _corners(bbox: list[float]) -> Box:
    x, y, width, height = bbox
    return x, y, x + width, y + height


def _in_words(name: str) -> str:
    """``"wine_bucket"`` -> ``"wine bucket"``, ``"bat_(animal)"`` -> ``"bat"``."""
    return name.split("_(")[0].replace("_", " ").strip()


def _path(entry: Mapping[str, Any], file: Path) -> str:
    """``file_name``, or the end of LVIS's ``coco_url``: ``train2017/000000000009.jpg``."""
    if isinstance(name := entry.get("file_name"), str) and name:
        return name
    if isinstance(url := entry.get("coco_url"), str) and url.count("/") > 1:
        return "/".join(url.split("/")[-2:])
    raise DataError(f"{file}: image {entry.get('id')} has neither file_name nor coco_url")


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise DataError(f"{file} does not exist; check the path") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"cannot read {file}: {exc}") from exc
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no JSON object; expected images, annotations, categories")
    return content


def _list(content: Mapping[str, Any], key: str, file: Path) -> Iterator[Mapping[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise DataError(f"{file} has no list {key!r}; expected annotations as LVIS has them")
    ids = set()
    for entry in map(clean_cell, entries):
        if not isinstance(entry, dict):
            raise DataError(f"{file}: expected objects in {key!r}, got {type(entry).__name__}")
        if isinstance(number := entry.get("id"), int):
            if number in ids:
                raise DataError(f"{file}: two of {key!r} have the id {number}; keep one of each id")
            ids.add(number)
        yield entry


def _value(entry: Mapping[str, Any], key: str, kind: type, file: Path) -> Any:
    value = entry.get(key)
    if type(value) is not kind:
        raise DataError(f"{file}: expected {key!r} to be {kind.__name__}, got {value!r}")
    return value
