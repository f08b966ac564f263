"""Write the data of the embedded model: pictures, rows to train on, and held-out questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recipes.embedded.questions import (
    Question,
    caption,
    cell_of,
    easy_question,
    listing,
    reading_questions,
    side_questions,
)
from recipes.embedded.scenes import SIZE_PX, Scene, draw_scene
from vpt.boxes import crop_box_px
from vpt.data.making import save_picture
from vpt.data.rows import dataset_entry, write_dataset_info
from vpt.files import write_atomic
from vpt.protocol.calls import format_region
from vpt.protocol.tokens import BRANCH_TOKENS, branches_named, invite

Row = dict[str, Any]

_CHUNK = 250  # scenes per task of a worker
_NUM_EASY = 3  # questions about a scene that are easy whatever is in it
_NUM_SIDES = 4  # questions about what is left of what
_INVITED = 0.1  # share of calls that the question asks for in so many words


@dataclass(frozen=True)
class Stage:
    """One part of the data.

    Attributes:
        name: of the folder of its pictures.
        split: ``"train"`` or ``"heldout"``: whose backgrounds and handwriting.
        num_scenes: pictures.
        seed: the pictures of two seeds have nothing to do with each other.
        files: keys of ``WRITERS``; each gives a file of rows.
    """

    name: str
    split: str
    num_scenes: int
    seed: int
    files: tuple[str, ...]


_TRAIN = (
    *("captions", "instructions", "looks", "listings", "direct", "direct_listings"),
    *("easy", "sides"),
)
PARTS = (
    Stage("train", "train", 40_000, 3, (*_TRAIN, "questions")),
    Stage("heldout", "heldout", 1_000, 4, ("heldout",)),
)


def caption_rows(scene: Scene, path: str, rng: np.random.Generator) -> Iterator[Row]:
    """What listings teach of a scene: where things are, and to ask for a region."""
    told = caption(scene, rng)
    yield _row(told.text, told.answer, path)
    for question in reading_questions(scene, rng)[:2]:
        if question.mode == "region":
            assert question.item is not None
            yield _row(question.text, format_region(cell_of(question.item)), path)


def instruction_rows(scene: Scene, path: str, rng: np.random.Generator) -> Iterator[Row]:
    """Questions about a scene, answered with the look that it takes."""
    if rng.random() < 0.3:
        told = caption(scene, rng)
        yield _row(told.text, told.answer, path)
    for question in _asked(scene, rng):
        yield answering_row(question, path, invited=rng.random() < _INVITED)


def look_rows(scene: Scene, path: str, rng: np.random.Generator) -> Iterator[Row]:
    """Those of :func:`instruction_rows` that re-encode, which are rare among them."""
    columns = [f"{branch.released}_images" for branch in BRANCH_TOKENS.values()]
    for row in instruction_rows(scene, path, rng):
        if any(row[column] for column in columns):
            yield row


def listing_rows(scene: Scene, path: str, rng: np.random.Generator) -> Iterator[Row]:
    """All that a scene shows in one answer: several times what a question teaches."""
    for _ in range(2):
        if told := listing(scene, rng):
            yield answering_row(told, path)


def direct_rows(scene: Scene, path: str, rng: np.random.Generator) -> Iterator[Row]:
    """The same questions as :func:`instruction_rows`, to be answered from the first look."""
    if rng.random() < 0.3:
        told = caption(scene, rng)
        yield _row(told.text, told.answer, path)
    for question in _asked(scene, rng):
        rng.random()  # keeps the questions those of instruction_rows
        yield _row(question.text, question.answer, path)


def direct_listing_rows(scene: Scene, path: str, rng: np.random.Generator) -> Iterator[Row]:
    """Those of :func:`listing_rows`, to be answered from the first look."""
    for _ in range(2):
        if told := listing(scene, rng):
            yield _row(told.text, told.answer, path)


def easy_rows(scene: Scene, path: str, rng: np.random.Generator) -> Iterator[Row]:
    """What the first look shows: what can be read at once, counts, colors and sides."""
    asked = [question for question in reading_questions(scene, rng) if question.mode == "direct"]
    for question in (*asked[:2], *(easy_question(scene, rng) for _ in range(_NUM_EASY))):
        yield _row(question.text, question.answer, path)


def side_rows(scene: Scene, path: str, rng: np.random.Generator) -> Iterator[Row]:
    """What is left of what, of several pairs: a comparison takes many questions to be learned."""
    for question in side_questions(scene, rng)[:_NUM_SIDES]:
        yield _row(question.text, question.answer, path)


def question_entries(scene: Scene, path: str, rng: np.random.Generator) -> Iterator[Row]:
    """Questions as plain annotations: image, question, answer, evidence box, phrase and kind."""
    for question in _asked(scene, rng):
        entry: Row = {
            "image": path,
            "question": question.text,
            "answer": question.answer,
            "family": question.family,
            "mode": question.mode,
            "look": scene.look,
        }
        if question.item is not None:
            entry["box"] = [int(v) for v in question.item.tile]
            entry["look_for"] = question.item.phrase
        yield entry


def _asked(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Two readings and now and then an easy question."""
    asked = reading_questions(scene, rng)[:2]
    if rng.random() < 0.4:
        asked.append(easy_question(scene, rng))
    return asked


def answering_row(question: Question, path: str, *, invited: bool = False) -> Row:
    """A row in which a question is answered with the look that it takes.

    Args:
        question: about the picture.
        path: of the picture, as rows name it.
        invited: whether the question says how to look.
    """
    mode = question.mode
    asked = invite(question.text, mode) if invited and mode != "direct" else question.text
    if mode == "direct":
        return _row(asked, question.answer, path)
    if mode == "region":
        assert question.item is not None
        cell = cell_of(question.item)
        box = crop_box_px(cell, (SIZE_PX, SIZE_PX))
        cropped = f"{path}_{','.join(str(v) for v in box)}"
        row = _row(asked, format_region(cell), path)
        row["images"].append(cropped)
        seen = "<image>"
    else:
        branch = BRANCH_TOKENS[branches_named([mode])[0]]
        row = _row(asked, branch.call, path)
        row[f"{branch.released}_images"] = [path]
        seen = branch.placeholder
    row["messages"] += [
        {"role": "user", "content": seen},
        {"role": "assistant", "content": question.answer},
    ]
    return row


def _row(question: str, answer: str, path: str) -> Row:
    row: Row = {
        "messages": [
            {"role": "user", "content": f"<image>\n{question}"},
            {"role": "assistant", "content": answer},
        ],
        "images": [path],
    }
    return {**row, **{f"{branch.released}_images": [] for branch in BRANCH_TOKENS.values()}}


WRITERS: dict[str, Callable[[Scene, str, np.random.Generator], Iterator[Row]]] = {
    "captions": caption_rows,
    "instructions": instruction_rows,
    "looks": look_rows,
    "listings": listing_rows,
    "direct": direct_rows,
    "direct_listings": direct_listing_rows,
    "easy": easy_rows,
    "sides": side_rows,
    "questions": question_entries,
    "heldout": question_entries,
}


def make_part(part: Stage, folder: Path, num_workers: int) -> Iterator[int]:
    """Draw the scenes of a part and write its files. Pictures that are there are left alone.

    Args:
        part: what to draw.
        folder: to write into.
        num_workers: processes.

    Yields:
        How many more scenes are done.
    """
    chunks = range(0, part.num_scenes, _CHUNK)
    (folder / part.name).mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {name: [] for name in part.files}
    with ProcessPoolExecutor(num_workers) as pool:
        made_chunks = pool.map(partial(_make_chunk, part, folder), chunks)
        for first, made in zip(chunks, made_chunks, strict=True):
            for name in part.files:
                lines[name] += made[name]
            yield min(_CHUNK, part.num_scenes - first)
    for name in part.files:
        write_atomic("".join(lines[name]), folder / f"{name}.jsonl")


def write_index(folder: Path) -> None:
    """Write the ``dataset_info.json`` by which training configs name the files of rows."""
    names = [name for part in PARTS for name in part.files if WRITERS[name] != question_entries]
    info = {name: dataset_entry(f"{name}.jsonl") for name in names}
    write_dataset_info(info, folder / "dataset_info.json")


def _make_chunk(part: Stage, folder: Path, first: int) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = {name: [] for name in part.files}
    for number in range(first, min(first + _CHUNK, part.num_scenes)):
        rng = np.random.default_rng([part.seed, number])
        scene = draw_scene(rng, part.split)
        path = f"{part.name}/{number:06d}.jpg"
        if not (folder / path).exists():
            save_picture(scene.image, folder / path)
        asking_seed = int(rng.integers(2**32))
        for name in part.files:
            rows = WRITERS[name](scene, path, np.random.default_rng(asking_seed))
            lines[name] += [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return lines
