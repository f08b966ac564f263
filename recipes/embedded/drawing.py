"""Rows in which the embedded model draws: it looks again by its own tower, then writes and answers.

Run ``python -m recipes.embedded.drawing --rows data/drawing/depth-train data/drawing/count-train
--out data/drawing/train`` on folders that ``vpt data make-depth-rows`` and ``make-counting-rows``
wrote. The first look has 16 tokens, too few to draw from; the second has one per depth code. With
``--counting data/perception/counting/train`` every kind in a picture is asked about, one after the
other, several answers per look: for its boxes, and in a second file for its number at once. Marked
points are asked about in the same way, letter by letter.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from recipes.counting.files import ANNOTATIONS, IMAGES
from vpt.boxes import PixelBox
from vpt.data.coco import corners, read_coco
from vpt.data.content_rows import (
    ASK_COUNT_STEPS,
    ASK_POINT_STEPS,
    CategoryBoxes,
    build_content_row,
    counting_rows,
    read_levels,
    read_places,
)
from vpt.data.counting import to_pixel_grid
from vpt.data.curriculum import read_rows
from vpt.data.making import path_from
from vpt.data.rows import DATASET_INFO, Row, dataset_entry, make_row, write_dataset_info, write_rows
from vpt.errors import VPTError
from vpt.protocol.rows import KINDS
from vpt.protocol.tokens import BRANCH_TOKENS, PLAIN, TOWER

FILES = ("depth_maps", "depth_steps", "depth_direct", "boxes", "count_steps", "count_direct")
"""Files of rows that ``vpt data`` writes, and of the same names here."""

ALL_BOXES, ALL_COUNTS, ALL_POINTS = "all_boxes", "all_counts", "all_points"
"""Rows about all kinds of a picture, and about all its marked points; only here."""

_INVITED = 0.5  # share of the questions that ask for the steps


def looking_row(row: Row, *, invited: bool = True, others: Sequence[Row] = ()) -> Row:
    """The row with a call of the own tower before its answer.

    Args:
        row: one turn with one picture.
        invited: whether the question may go on to ask for the steps.
        others: rows about the same picture, asked in further turns.
    """
    asked, answered = _turns(row)
    if not invited:
        for words in (ASK_POINT_STEPS, ASK_COUNT_STEPS):
            asked = asked.removesuffix(words).rstrip()
    tower = BRANCH_TOKENS[TOWER]
    turns = [asked, tower.call, tower.placeholder, answered]
    for other in others:
        asked, answered = _turns(other)
        turns += [asked.removeprefix(KINDS[PLAIN].placeholder).lstrip(), answered]
    return {**row, **make_row(turns, {PLAIN: row["images"], TOWER: row["images"]})}


def _turns(row: Row) -> list[str]:
    return [message["content"] for message in row["messages"]]


def kind_rows(folder: Path, out: Path, seed: int) -> Iterator[tuple[Row, Row]]:
    """Two rows per counting scene, each with a turn per kind: where its things are, how many.

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
        by_kind = rng.permutation(sorted(found[image.id])).tolist()
        if not by_kind:
            continue
        path = path_from(out, folder / IMAGES / image.path)
        rows = [
            counting_rows(path, CategoryBoxes(kind, tuple(sorted(found[image.id][kind]))))
            for kind in by_kind
        ]
        boxes, _, counts = zip(*rows, strict=True)
        yield looking_row(boxes[0], others=boxes[1:]), looking_row(counts[0], others=counts[1:])


def point_rows(file: Path, out: Path, seed: int) -> Iterator[Row]:
    """A row per row of depth steps, with a turn per point, in any order: its place, how near it is.

    A model that is asked for the letters from A on can write the next one without finding it.
    """
    rng = np.random.default_rng(seed)
    for row in read_rows(file, out):
        answer, (image,) = _turns(row)[1], row["images"]
        places, levels = read_places(answer), read_levels(answer)
        rows = []
        for letter in rng.permutation(sorted(places)).tolist():
            x, y = places[letter]
            said = f"{letter} at x {x} y {y}. Nearness: {letter} {levels[letter]:02}."
            rows.append(build_content_row(f"Where is {letter}?", said, image, {}))
        yield looking_row(rows[0], others=rows[1:])


def add_calls(file: Path, out: Path, seed: int) -> Iterator[Row]:
    """Rows of a file with a call each; their paths are relative to ``out``."""
    rng = np.random.default_rng(seed)
    for row in read_rows(file, out):
        yield looking_row(row, invited=rng.random() < _INVITED)


def main() -> None:
    """Write the files, and the index by which training configs name them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="folders of rows")
    parser.add_argument("--counting", type=Path, help="folder of make-counting-scenes")
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
            pairs = list(kind_rows(args.counting, args.out, args.seed))
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
