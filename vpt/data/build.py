"""Rows of the released format, built from annotations: an image, a question, an answer, a box.

A row is the conversation that the runtime leads, with the calls and the answer that the model
shall write: the same prompt, the same crop (see :mod:`vpt.inference.conversation`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

from vpt.boxes import Box, PixelBox, check_box_px, crop_box_px, region_to_show, whole_px
from vpt.data.checks import ROW_KINDS
from vpt.data.rows import Images, Row, clean_cell, make_row
from vpt.errors import DataError, RegionError
from vpt.protocol.calls import find_symbols, format_found, format_region
from vpt.protocol.rows import KINDS, split_crop_suffix
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    GROUND_END,
    GROUND_START,
    GROUNDING,
    RELEASED_GRID_SIZE,
    branches_named,
    invite,
)

KEYS = ("image", "question", "answer", "box", "phrase", "kind")
"""Keys of an annotation that are read."""


@dataclass(frozen=True)
class Annotation:
    """One annotation.

    Attributes:
        image: path, relative to the folder of the images, or absolute.
        question: without invitation and placeholders.
        box: of the evidence, XYXY in pixels of the image as seen, that is after EXIF orientation.
        phrase: words for the box, by which a detector shall find it.
        kind: one of :data:`vpt.data.checks.ROW_KINDS`, if only a row of that kind is wanted.
    """

    image: str
    question: str
    answer: str
    box: Box | None = None
    kind: str | None = None
    phrase: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Options of the rows to build.

    Attributes:
        kinds: of :data:`vpt.data.checks.ROW_KINDS`, in the order of the rows.
        draw: choose one of the kinds at random for each annotation, instead of a row of each.
        first: build a row of the first kind alone that the annotation permits.
        invited: add the text that invites a call, as the runtime does for a named perception
            mode. Without it the model learns to choose by itself, as in mode ``auto``.
    """

    kinds: tuple[str, ...] = ("region", "direct")
    draw: bool = False
    first: bool = False
    seed: int = 0
    invited: bool = True
    grid_size: int = RELEASED_GRID_SIZE


@dataclass
class Built:
    """Rows built from annotations, in their order."""

    rows: list[Row] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)  # number of rows of each kind
    bad: list[tuple[int, str]] = field(default_factory=list)  # number from 0, and reason
    num_without_box: int = 0  # annotations with rows, but none with a region


# Annotations


def read_annotations(entries: Sequence[object]) -> list[Annotation | DataError]:
    """Read annotations; one that cannot be read is replaced by the error."""
    read: list[Annotation | DataError] = []
    for entry in entries:
        try:
            read.append(read_annotation(entry))
        except DataError as exc:
            read.append(exc)
    return read


def read_annotation(entry: object) -> Annotation:
    """Read an annotation: a JSON object with the keys of :data:`KEYS`; `DataError` for a bad one.

    An answer may be a number, which is written as its digits. NaN is a missing value, as pandas
    writes it. Other keys are ignored.
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
    phrase = None if entry.get("phrase") is None else _text(entry, "phrase").strip()
    read = Annotation(image, question, answer, None if box is None else _box(box), kind, phrase)
    if kind is not None and (lacks := _lack(read, kind)):
        raise DataError(f"kind {kind!r} needs {lacks}")
    return read


def _lack(annotation: Annotation, kind: str) -> str:
    """What a row of a kind needs and the annotation does not have; empty if nothing."""
    if kind in ("region", GROUNDING) and annotation.box is None:
        return "a box"
    return "a phrase" if kind == GROUNDING and annotation.phrase is None else ""


def _text(entry: Mapping[str, Any], key: str) -> str:
    """A text that is not empty, without placeholders and control tokens."""
    text = entry.get(key)
    if not isinstance(text, str) or not text.strip():
        problem = "there is none" if text is None else f"got {text!r}"
        raise DataError(f"expected {key!r} to be a text that is not empty, {problem}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{key!r} is not valid text: it contains half of a surrogate pair")
    reserved = [kind.placeholder for kind in KINDS.values() if kind.placeholder in text]
    if reserved := reserved + find_symbols(text):
        raise DataError(
            f"{key!r} contains {reserved[0]}, which would be read as an image or a control token; "
            "rephrase it"
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


# Rows


def build_rows(
    annotations: Sequence[Annotation | DataError], images: Images, recipe: Recipe
) -> Built:
    """Build rows; ``images`` has the facts of every image that the annotations name."""
    built = Built()
    for number, annotation in enumerate(annotations):
        try:
            if isinstance(annotation, DataError):
                raise annotation
            kinds = _kinds_of(annotation, recipe, number)
            facts = images[annotation.image]
            if facts.size_wh is None:
                raise DataError(facts.problem)
            build = partial(build_row, invited=recipe.invited, grid_size=recipe.grid_size)
            rows = [build(annotation, kind, facts.size_wh) for kind in kinds]
        except (DataError, RegionError) as exc:
            built.bad.append((number, str(exc)))
            continue
        built.rows += rows
        built.kinds.update(kinds)
        can_do_region = "region" in recipe.kinds and annotation.kind is None
        built.num_without_box += can_do_region and annotation.box is None
    return built


def _kinds_of(annotation: Annotation, recipe: Recipe, number: int) -> list[str]:
    """Kinds of rows to build of an annotation: the one it asks for, or those it permits."""
    if annotation.kind is not None:
        return [annotation.kind]
    lacks = {kind: _lack(annotation, kind) for kind in recipe.kinds}
    kinds = [kind for kind, lack in lacks.items() if not lack]
    if not kinds:
        needs = ", ".join(f"{kind!r} needs {lack}" for kind, lack in lacks.items())
        raise DataError(f"no row of the kinds wanted can be built: {needs}")
    if recipe.draw:  # a generator for each, so that none depends on the others
        return [random.Random(f"{recipe.seed} {number}").choice(kinds)]
    return kinds[:1] if recipe.first else kinds


def build_row(
    annotation: Annotation,
    kind: str,
    size_wh: tuple[int, int],
    *,
    invited: bool = True,
    grid_size: int = RELEASED_GRID_SIZE,
) -> Row:
    """Build one row; ``size_wh`` is that of its image, after EXIF orientation.

    Raises:
        DataError: if a box or phrase is missing, or the path of the image permits no crop suffix.
        RegionError: if the box is not one in pixels of the image.
    """
    mode = "none" if kind == "direct" else kind if invited else "auto"
    placeholder = KINDS["image"].placeholder
    turns = [f"{placeholder}\n{invite(annotation.question, mode)}"]
    images = {"image": [annotation.image]}
    if lacks := _lack(annotation, kind):
        raise DataError(f"a row of kind {kind!r} needs {lacks}")
    if kind in ("region", GROUNDING):
        box = annotation.box
        assert box is not None
        check_box_px(box, size_wh)
        region = region_to_show(box, size_wh, grid_size=grid_size)
        crop = crop_box_px(region, size_wh, grid_size=grid_size)
        if kind == GROUNDING:
            whole = whole_px(box, size_wh)
            call = f"{GROUND_START}{annotation.phrase}{GROUND_END}"
            turns += [call, placeholder + format_found([whole], size_wh)]
        else:
            turns += [format_region(region, grid_size), placeholder]
        images["image"].append(_with_crop_suffix(annotation.image, crop))
    elif kind != "direct":
        (branch,) = branches_named([kind])
        turns += [BRANCH_TOKENS[branch].call, KINDS[branch].placeholder]
        images[branch] = [annotation.image]
    return make_row([*turns, annotation.answer], images)


def _with_crop_suffix(path: str, box: PixelBox) -> str:
    """The path of a crop, which ``split_crop_suffix`` splits again."""
    written = f"{path}_{','.join(map(str, box))}"
    if split_crop_suffix(written) != (path, box):
        raise DataError(f"image {path!r} needs an extension like .png, for a crop to be named")
    return written
