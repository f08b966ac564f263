"""Rows whose answers contain perception content: their questions, answers and notes.

The question about points is HardBLINK's, word for word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vpt.boxes import PixelBox
from vpt.data.points import Point, nearest
from vpt.data.rows import Row, make_row
from vpt.depth.maps import Floats, depth_at
from vpt.errors import DataError
from vpt.protocol.calls import format_depth, format_pixel_box
from vpt.protocol.rows import KINDS

NOTE = "note"
"""Column with a JSON object as text.

It is text because a column of objects that differ between rows has no single type, and the
``datasets`` package, with which LLaMA-Factory reads rows, refuses a file whose later parts have
another type.
"""

EPOCH = "epoch"
"""Key of a row's note: its epoch in a curriculum, counted from 1."""

DEPTH_MAP, DEPTH_STEPS, DEPTH_DIRECT = "depth-map", "depth-steps", "depth-direct"
BOXES, COUNT_STEPS, COUNT_DIRECT = "boxes", "count-steps", "count-direct"

TASKS: dict[str, str] = {
    DEPTH_MAP: "depth map",
    DEPTH_STEPS: "nearest point by a depth map",
    DEPTH_DIRECT: "nearest point at once",
    BOXES: "boxes",
    COUNT_STEPS: "count by boxes",
    COUNT_DIRECT: "count at once",
}
"""Task of a row -> its name in reports."""

ATOMIC_TASKS = (DEPTH_MAP, BOXES)
"""Tasks whose answers are perception content alone."""

MAP_QUESTION = "What is the depth map of the image?"
POINT_QUESTION = (
    "Multiple points are circled on the image, labeled by letters beside each circle. "
    "Which point is the closest to the camera?"
)
ASK_POINT_STEPS = (
    "Write down where the points are, then the depth map, then how near each point is on it."
)
ASK_COUNT_STEPS = "Write down the box of each one first."
"""These two, after the question, ask for an answer in steps."""

_NUM_LEVELS = 100
_BEGINNING = '{"task": '
_LEVEL = re.compile(r"([A-E]) (\d\d)(?=[,.])")
_PLACE = re.compile(r"([A-E]) at x (\d+) y (\d+)")
_ANSWER = re.compile(r"\(([A-E])\)")
_NUMBER = re.compile(r"\d+")
_FEW = 4  # boxes; more are "many"
_PLURALS = (
    "child children, fish fish, foot feet, goose geese, half halves, knife knives, leaf leaves, "
    "loaf loaves, man men, mouse mice, person people, scissors scissors, sheep sheep, "
    "shelf shelves, tooth teeth, wolf wolves, woman women"
)
_IRREGULAR = dict(pair.split() for pair in _PLURALS.split(", "))


# Rows and notes


def build_content_row(question: str, answer: str, image: str, note: Mapping[str, Any]) -> Row:
    """A row with one picture, question and answer; the ``task`` of the note is one of `TASKS`."""
    row = make_row([f"{KINDS['image'].placeholder}\n{question}", answer], {"image": [image]})
    return {**row, NOTE: json.dumps(note, ensure_ascii=False)}


def read_note(row: Mapping[str, Any]) -> dict[str, Any]:
    """The note of a row; empty where there is none of ours. `DataError` for a damaged one."""
    text = row.get(NOTE)
    if not isinstance(text, str) or not text.startswith(_BEGINNING):
        return {}
    try:
        note: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"the {NOTE} of the row is no JSON: {exc}") from exc
    if (task := note.get("task")) not in TASKS:
        raise DataError(f"unknown task {task!r} in the {NOTE}; available: {', '.join(TASKS)}")
    return note


def with_note(row: Row, **changes: object) -> Row:
    """A copy of a row with keys added to its note; `DataError` if it has none."""
    note = read_note(row)
    if not note:
        raise DataError(f"the row has no {NOTE}; expected rows made by `vpt data make-...-rows`")
    return {**row, NOTE: json.dumps({**note, **changes}, ensure_ascii=False)}


# Depth


def map_row(image: str, codes: Sequence[int], note: dict[str, Any]) -> Row:
    """A row whose answer is the depth map of a photo."""
    return build_content_row(MAP_QUESTION, format_depth(codes), image, {"task": DEPTH_MAP, **note})


def point_rows(
    image: str, points: Sequence[Point], codes: Sequence[int], drawn: Floats, note: dict[str, Any]
) -> tuple[Row, Row]:
    """The same question about marked points, in the order of their letters, in steps and at once.

    The steps read ``drawn`` ``[H, W]``, the map decoded from the codes. A `DataError` is raised if
    another point is nearest on it than on the true map.
    """
    answer = nearest(points).letter
    levels = {point.letter: level(depth_at(drawn, point.x, point.y)) for point in points}
    if leader_of(levels) != answer:
        raise DataError("the map that the codes stand for does not show which point is nearest")
    places = say_places({point.letter: (point.x, point.y) for point in points})
    steps = (
        f"Points: {places}. Depth map: {format_depth(codes)} "
        f"Nearness: {say_levels(levels)}. The answer is ({answer})."
    )
    about = {"points": [asdict(point) for point in points], "answer": answer, **note}
    question = f"{POINT_QUESTION} {ASK_POINT_STEPS}"
    return (
        build_content_row(question, steps, image, {"task": DEPTH_STEPS, **about}),
        build_content_row(POINT_QUESTION, f"({answer})", image, {"task": DEPTH_DIRECT, **about}),
    )


def level(depth: float) -> int:
    """Nearness as answers write it: 0 (farthest) to 99 (nearest)."""
    return min(int(depth * _NUM_LEVELS), _NUM_LEVELS - 1)


def leader_of(levels: dict[str, int]) -> str | None:
    """The letter with the greatest level; ``None`` if there are two such, or no letter."""
    ordered = sorted(levels, key=lambda letter: -levels[letter])
    if not ordered or (len(ordered) > 1 and levels[ordered[0]] == levels[ordered[1]]):
        return None
    return ordered[0]


def say_places(places: Mapping[str, tuple[int, int]]) -> str:
    """Where points are, ``(x, y)`` on the 336 grid by letter; three digits each."""
    return ", ".join(f"{letter} at x {x:03} y {y:03}" for letter, (x, y) in places.items())


def say_levels(levels: Mapping[str, int]) -> str:
    """How near points are, by letter; two digits each."""
    return ", ".join(f"{letter} {value:02}" for letter, value in levels.items())


def read_levels(answer: str) -> dict[str, int]:
    """The levels in an answer in steps, by letter."""
    return {letter: int(value) for letter, value in _LEVEL.findall(answer)}


def read_places(answer: str) -> dict[str, tuple[int, int]]:
    """The points in an answer in steps, on the 336 grid, by letter: ``(x, y)``."""
    return {letter: (int(x), int(y)) for letter, x, y in _PLACE.findall(answer)}


def read_letter(answer: str) -> str | None:
    """The last letter in an answer; ``None`` if it names none."""
    letters = _ANSWER.findall(answer)
    return letters[-1] if letters else None


# Boxes and numbers


@dataclass(frozen=True)
class CategoryBoxes:
    """All objects of one category in a picture.

    Boxes are left, top, right, bottom on the 336 grid, all four pixels of the object, from left to
    right.
    """

    category: str
    boxes: tuple[PixelBox, ...]

    @property
    def question(self) -> str:
        """The question how many there are."""
        return f"How many {say_plural(self.category)} are in the image?"


def counting_rows(image: str, found: CategoryBoxes) -> tuple[Row, Row, Row]:
    """Rows about a category of a picture: boxes, count in steps, count at once."""
    written = _say_boxes(found)
    count, boxes = len(found.boxes), [list(box) for box in found.boxes]
    note = {"category": found.category, "count": count, "boxes": boxes}
    objects = say_plural(found.category)
    where = ask_where(objects)
    in_steps = f"{found.question} {ASK_COUNT_STEPS}"
    steps = f"{written}. The answer is {count}."
    return (
        build_content_row(where, f"{written}.", image, {"task": BOXES, **note}),
        build_content_row(in_steps, steps, image, {"task": COUNT_STEPS, **note}),
        build_content_row(found.question, str(count), image, {"task": COUNT_DIRECT, **note}),
    )


def ask_where(objects: str) -> str:
    """The question for the boxes of objects, which are named in the plural."""
    return f"Where are the {objects} in the image? Write down the box of each one."


def counting_question(
    number: int, image: str, found: CategoryBoxes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Question and answer in HardBLINK's layout, to evaluate a model with."""
    name = {"question_id": f"{number} {found.category}"}
    category = {"category": "few" if len(found.boxes) <= _FEW else "many"}
    boxes = {"boxes": [list(box) for box in found.boxes], "content": _say_boxes(found)}
    question = {**name, "image": image, "text": found.question, **category, **boxes}
    return question, {**name, "text": str(len(found.boxes)), **category}


def _say_boxes(found: CategoryBoxes) -> str:
    return ", ".join(format_pixel_box(box) for box in found.boxes)


def read_count(answer: str) -> int | None:
    """The last number in an answer outside of tokens; ``None`` if there is none."""
    numbers = _NUMBER.findall(re.sub(r"<[^<>]*>", " ", answer))
    return int(numbers[-1]) if numbers else None


def say_plural(name: str) -> str:
    """The plural of a noun by rule, ``"star"`` -> ``"stars"``; of several words, of the last."""
    head, space, noun = name.rpartition(" ")
    if noun in _IRREGULAR:
        return head + space + _IRREGULAR[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return f"{name}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"
