"""Rows of the released format, built of annotations: what a model shall say, and what it is shown.

A row is the conversation that the runtime leads, with the calls and the answer that the model
shall write: the same prompt, the same crop (see :mod:`vpt.inference.conversation`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vpt.boxes import GridBox, PixelBox, check_box_px, crop_box_px
from vpt.data.annotations import Annotation, read_annotation
from vpt.data.image_sizes import Images
from vpt.data.regions import region_to_show
from vpt.errors import DataError, RegionError
from vpt.protocol.calls import format_region
from vpt.protocol.rows import KINDS, ROLES, split_crop_suffix
from vpt.protocol.tokens import BRANCH_TOKENS, ENCODER_TO_BRANCH, RELEASED_GRID_SIZE, invite

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What rows to build.

    Attributes:
        kinds: out of :data:`vpt.data.row_kinds.ROW_KINDS`, in the order rows shall have.
        draw: one of the kinds for each annotation, by ``seed``, instead of a row for each.
        seed: of the drawing.
        invited: add the words that invite a call, as the runtime does for a named perception
            mode. Without them the model learns to choose by itself, as in mode ``auto``.
        grid_size: cells per side of the model's region grid.
    """

    kinds: tuple[str, ...] = ("region", "direct")
    draw: bool = False
    seed: int = 0
    invited: bool = True
    grid_size: int = RELEASED_GRID_SIZE


@dataclass
class Built:
    """What became of annotations.

    Attributes:
        rows: in the order of the annotations.
        kinds: how many rows of each kind.
        bad: ``(number of the annotation, counted from 0, why nothing was built of it)``.
        num_without_box: annotations that gave other rows, but none with a region.
    """

    rows: list[Row] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)
    num_without_box: int = 0


def read_annotations(entries: Sequence[object]) -> list[Annotation | DataError]:
    """Read annotations; in place of those that cannot be read stands what is wrong with them."""
    read: list[Annotation | DataError] = []
    for entry in entries:
        try:
            read.append(read_annotation(entry))
        except DataError as exc:
            read.append(exc)
    return read


def build_rows(
    annotations: Sequence[Annotation | DataError], images: Images, recipe: Recipe
) -> Built:
    """Build rows of annotations; one that cannot be used gives none, and is listed.

    Args:
        annotations: from :func:`read_annotations`.
        images: what is known of each image they name.
        recipe: what to build.
    """
    built = Built()
    for number, annotation in enumerate(annotations):
        try:
            if isinstance(annotation, DataError):
                raise annotation
            kinds = _kinds_of(annotation, recipe, number)
            rows = [_build_one(annotation, kind, images, recipe) for kind in kinds]
        except (DataError, RegionError) as exc:
            built.bad.append((number, str(exc)))
            continue
        built.rows += rows
        built.kinds.update(kinds)
        can_do_region = "region" in recipe.kinds and annotation.kind is None
        built.num_without_box += can_do_region and annotation.box is None
    return built


def build_row(
    annotation: Annotation,
    kind: str,
    size_wh: tuple[int, int],
    *,
    invited: bool = True,
    grid_size: int = RELEASED_GRID_SIZE,
) -> Row:
    """Build one row.

    Args:
        annotation: with a box, for kind ``"region"``.
        kind: one of :data:`vpt.data.row_kinds.ROW_KINDS`.
        size_wh: ``(W, H)`` of its image, after EXIF orientation.
        invited: see :class:`Recipe`.
        grid_size: see :class:`Recipe`.

    Raises:
        DataError: if there is no box, or the path of the image does not permit it.
        RegionError: if the box is not one in pixels of the image.
    """
    mode = "none" if kind == "direct" else kind if invited else "auto"
    placeholder = KINDS["image"].placeholder
    turns = [f"{placeholder}\n{invite(annotation.question, mode)}"]
    columns: dict[str, list[str]] = {image_kind.column: [] for image_kind in KINDS.values()}
    columns[KINDS["image"].column].append(annotation.image)
    if kind == "region":
        region = _region_of(annotation, size_wh, grid_size)
        crop = crop_box_px(region, size_wh, grid_size=grid_size)
        turns += [format_region(region, grid_size), placeholder]
        columns[KINDS["image"].column].append(_with_crop_suffix(annotation.image, crop))
    elif kind != "direct":
        branch = ENCODER_TO_BRANCH[kind]
        turns += [BRANCH_TOKENS[branch].call, KINDS[branch].placeholder]
        columns[KINDS[branch].column].append(annotation.image)
    turns.append(annotation.answer)
    messages = [{"role": ROLES[n % 2], "content": content} for n, content in enumerate(turns)]
    return {"messages": messages, **columns}


def _build_one(annotation: Annotation, kind: str, images: Images, recipe: Recipe) -> Row:
    facts = images[annotation.image]
    if facts.size_wh is None:
        raise DataError(facts.problem)
    return build_row(
        annotation, kind, facts.size_wh, invited=recipe.invited, grid_size=recipe.grid_size
    )


def _kinds_of(annotation: Annotation, recipe: Recipe, number: int) -> list[str]:
    """Kinds of rows to build of an annotation: what it wants itself, or what it permits."""
    if annotation.kind is not None:
        return [annotation.kind]
    kinds = [kind for kind in recipe.kinds if kind != "region" or annotation.box is not None]
    if not kinds:
        raise DataError("there is no box, and no other kind of row than 'region' is wanted")
    if recipe.draw:  # each by a generator of its own: none depends on the others
        return [random.Random(f"{recipe.seed} {number}").choice(kinds)]
    return kinds


def _region_of(annotation: Annotation, size_wh: tuple[int, int], grid_size: int) -> GridBox:
    """The region to name, for a box that lies in the image."""
    if (box := annotation.box) is None:
        raise DataError("a row of kind 'region' needs a box")
    check_box_px(box, size_wh)
    return region_to_show(box, size_wh, grid_size=grid_size)


def _with_crop_suffix(path: str, box: PixelBox) -> str:
    """The path of a box of an image, which ``split_crop_suffix`` takes apart again."""
    written = f"{path}_{','.join(map(str, box))}"
    if split_crop_suffix(written) != (path, box):
        raise DataError(f"image {path!r} needs an extension like .png, for a crop to be named")
    return written
