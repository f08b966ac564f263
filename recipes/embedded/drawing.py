"""Rows in which the embedded model draws: it looks again by its own tower, then writes and answers.

Run ``python -m recipes.embedded.drawing --rows data/drawing/depth-train data/drawing/count-train
--out data/drawing/train`` on folders that ``vpt data make-depth-rows`` and ``make-counting-rows``
wrote. The first look has 16 tokens, too few to draw from; the second has one per depth code. With
``--counting data/perception/counting/train`` there are listings of every kind in a picture, several
answers per look: of their boxes, and in a second file of their numbers. Marked points are listed in
the same way.

Boxes follow the name of what they show, without a space, which would be a token: in a model of few
layers, the word that was just written is the query that finds it. Points are boxes of their circles
here, one token per coordinate in place of three digits, for the same reason.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from recipes.counting.files import ANNOTATIONS, IMAGES
from vpt.boxes import PixelBox
from vpt.data.coco import corners, read_coco
from vpt.data.content_rows import (
    ASK_COUNT_STEPS,
    ASK_POINT_STEPS,
    BOXES,
    COUNT_STEPS,
    NOTE,
    CategoryBoxes,
    ask_where,
    build_content_row,
    counting_rows,
    read_levels,
    read_note,
    read_places,
    say_levels,
    say_places,
    say_plural,
)
from vpt.data.counting import to_pixel_grid
from vpt.data.curriculum import read_rows
from vpt.data.making import path_from
from vpt.data.rows import DATASET_INFO, Row, dataset_entry, make_row, write_dataset_info, write_rows
from vpt.errors import DataError, VPTError
from vpt.protocol.calls import format_pixel_box
from vpt.protocol.tokens import BRANCH_TOKENS, PLAIN, RELEASED_PIXELS, TOWER

FILES = ("depth_maps", "depth_steps", "depth_direct", "boxes", "count_steps", "count_direct")
"""Files of rows that ``vpt data`` writes, and of the same names here."""

ALL_BOXES, ALL_COUNTS, ALL_POINTS = "all_boxes", "all_counts", "all_points"
"""Listings of all kinds of a picture, and of all its marked points; only here."""

ASK_ALL_BOXES = ask_where("things")
ASK_ALL_COUNTS = CategoryBoxes("thing", ()).question
ASK_ALL_POINTS = "Where are the points?"

_POINT_PX = 7  # half the side of the box of a point, about its circle, on the grid of boxes
_INVITED = 0.5  # share of the questions that ask for the steps


def looking_row(row: Row, *, invited: bool = True) -> Row:
    """The row with a call of the own tower before its answer.

    Args:
        row: one turn with one picture.
        invited: whether the question may go on to ask for the steps.
    """
    asked, answered = _turns(row)
    if not invited:
        for words in (ASK_POINT_STEPS, ASK_COUNT_STEPS):
            asked = asked.removesuffix(words).rstrip()
    tower = BRANCH_TOKENS[TOWER]
    turns = [asked, tower.call, tower.placeholder, answered]
    return {**row, **make_row(turns, {PLAIN: row["images"], TOWER: row["images"]})}


def _turns(row: Row) -> list[str]:
    return [message["content"] for message in row["messages"]]


def kind_rows(folder: Path, out: Path, seed: int) -> Iterator[tuple[Row, Row]]:
    """Two rows per counting scene with all its kinds: where their things are, how many.

    A scene without things has none.
    """
    rng = np.random.default_rng(seed)
    content = read_coco(folder / ANNOTATIONS)
    found: defaultdict[int, defaultdict[str, list[PixelBox]]]
    found = defaultdict(lambda: defaultdict(list))
    sizes = {image.id: (image.width, image.height) for image in content.images}
    for thing in content.annotations:
        box = to_pixel_grid(corners(thing.bbox), sizes[thing.image_id])
        found[thing.image_id][content.names[thing.category_id]].append(box)
    for image in content.images:
        kinds = rng.permutation(sorted(found[image.id])).tolist()
        path = path_from(out, folder / IMAGES / image.path)
        rows = [
            counting_rows(path, CategoryBoxes(kind, tuple(sorted(found[image.id][kind]))))
            for kind in kinds
        ]
        if rows:
            places = [_named(boxes) for boxes, _, _ in rows]
            numbers = [f"{_named(number, ' ')}." for _, _, number in rows]
            yield (
                looking_row(build_content_row(ASK_ALL_BOXES, " ".join(places), path, {})),
                looking_row(build_content_row(ASK_ALL_COUNTS, " ".join(numbers), path, {})),
            )


def _named(row: Row, gap: str = "") -> str:
    """The answer of a row about a category, after the name of the category."""
    return f"The {say_plural(read_note(row)['category'])}{gap}{_turns(row)[1]}"


def point_rows(file: Path, out: Path, seed: int) -> Iterator[Row]:
    """A row per row of depth steps with all its points: where they are, how near.

    They are in random order: the letters from A on can be written without finding them. A
    `DataError` is raised for a row that does not state both for the same points.
    """
    rng = np.random.default_rng(seed)
    for row in read_rows(file, out):
        answer, (image,) = _turns(row)[1], row["images"]
        places, levels = read_places(answer), read_levels(answer)
        if not places or set(places) != set(levels):
            raise DataError(
                f"{file}: expected the place and the nearness of each point, got {answer[:60]!r}; "
                "make the rows with vpt data make-depth-rows"
            )
        letters = rng.permutation(sorted(places)).tolist()
        listed = say_point_boxes({letter: places[letter] for letter in letters})
        near = say_levels({letter: levels[letter] for letter in letters})
        answer = f"Points: {listed}. Nearness: {near}."
        yield looking_row(build_content_row(ASK_ALL_POINTS, answer, image, {}))


def say_point_boxes(places: Mapping[str, tuple[int, int]]) -> str:
    """The box of each point after its letter, on the grid of boxes."""
    boxes = {
        letter: [
            min(max(at + off, 0), RELEASED_PIXELS - 1)
            for off in (-_POINT_PX, _POINT_PX)
            for at in place
        ]
        for letter, place in places.items()
    }
    return ", ".join(f"{letter}{format_pixel_box(box)}" for letter, box in boxes.items())


def add_calls(file: Path, out: Path, seed: int) -> Iterator[Row]:
    """Rows of a file with a call each, boxes named and points as boxes; paths are from ``out``."""
    rng = np.random.default_rng(seed)
    for row in read_rows(file, out):
        asked, answered = _turns(row)
        if read_note(row).get("task") in (BOXES, COUNT_STEPS):
            row = {**make_row([asked, _named(row)], {PLAIN: row["images"]}), NOTE: ""}
        elif places := read_places(answered):
            answered = answered.replace(say_places(places), say_point_boxes(places))
            row = {**make_row([asked, answered], {PLAIN: row["images"]}), NOTE: ""}
        yield looking_row(row, invited=rng.random() < _INVITED)


def main() -> None:
    """Write the files, and the index by which training configs name them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="folders of rows")
    parser.add_argument("--counting", type=Path, nargs="+", help="folders of make-counting-scenes")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = [
        file
        for folder in args.rows
        for name in FILES
        if (file := folder / f"{name}.jsonl").is_file()
    ]
    if not files:
        parser.error(f"--rows: no rows in {args.rows[0]}; make them with vpt data")
    made: dict[str, Iterable[Row]]
    made = {file.stem: add_calls(file, args.out, args.seed) for file in files}
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if args.counting:
            pairs = [
                pair for folder in args.counting for pair in kind_rows(folder, args.out, args.seed)
            ]
            made[ALL_BOXES] = [boxes for boxes, _ in pairs]
            made[ALL_COUNTS] = [counts for _, counts in pairs]
        for file in files:
            if file.stem == "depth_steps":
                made[ALL_POINTS] = point_rows(file, args.out, args.seed)
        for name, rows in made.items():
            write_rows(rows, args.out / f"{name}.jsonl")
    except VPTError as exc:
        parser.error(str(exc))
    info = {name: dataset_entry(f"{name}.jsonl") for name in made}
    write_dataset_info(info, args.out / DATASET_INFO)


if __name__ == "__main__":
    main()
