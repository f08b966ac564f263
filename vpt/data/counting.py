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

from vpt.boxes import Box, PixelBox, check_box_px
from vpt.data.coco import AnnotatedObject, CocoFile, corners, is_sound, read_coco
from vpt.data.content_rows import CategoryBoxes, counting_question, counting_rows
from vpt.data.making import RowMaking, digest, path_from
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


def read_lvis(file: Path, *, max_boxes: int = 10, min_side: int = 4) -> Annotations:
    """Read annotations in the format of LVIS, which is COCO's with a few more keys.

    A category with more than ``max_boxes``, a box smaller than ``min_side`` on the 336 grid, or one
    that cannot be used, is left out of that picture, because its number is not known.

    Raises:
        DataError: if the file cannot be read, or has another format.
    """
    return _collect(read_coco(file), max_boxes, min_side)


def _collect(content: CocoFile, max_boxes: int, min_side: int) -> Annotations:
    """Sort boxes by picture and category."""
    names = content.names
    boxes: dict[int, dict[int, list[AnnotatedObject]]] = {}
    for thing in content.annotations:
        boxes.setdefault(thing.image_id, {}).setdefault(thing.category_id, []).append(thing)
    read = Annotations()
    for picture in content.images:
        size_wh = picture.width, picture.height
        found = boxes.get(picture.id, {})
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
            scaled = sorted(to_pixel_grid(corners(thing.bbox), size_wh) for thing in things)
            categories.append(CategoryBoxes(names[category], tuple(scaled)))
        read.pictures.append(AnnotatedPicture(picture.path, size_wh, tuple(categories)))
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
    things: Sequence[AnnotatedObject], size_wh: tuple[int, int], max_boxes: int, min_side: int
) -> str:
    """Why the objects of a category cannot be counted; empty if they can."""
    if any(thing.iscrowd for thing in things):
        return "a crowd"
    if len(things) > max_boxes:
        return f"more than {max_boxes} boxes"
    if not all(is_sound(thing.bbox, size_wh) for thing in things):
        return "a box that is empty, not four numbers, or outside of the picture"
    for box in (corners(thing.bbox) for thing in things):
        try:
            check_box_px(box)
        except RegionError:
            return "a box with numbers of 0 to 1, as fractions have; expected pixels"
        x0, y0, x1, y1 = to_pixel_grid(box, size_wh)
        if min(x1 - x0, y1 - y0) + 1 < min_side:
            return f"a box of less than {min_side} pixels on the 336 grid"
    return ""


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
