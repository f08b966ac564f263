"""Questions about scenes, and how each is best answered.

The words never tell how: "which way do the lines run on the red one" is answered from the first
look, from a crop or from a re-encoding, as the picture demands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from recipes.embedded.drawing import ASK_ALL_BOXES, ASK_ALL_COUNTS, ASK_ALL_POINTS
from recipes.embedded.marks import COLORS, LINES, PATTERNS, SHAPES
from recipes.embedded.scenes import SIZE_PX, Item, Scene, is_crowded
from vpt.boxes import GridBox
from vpt.data.content_rows import (
    ASK_COUNT_STEPS,
    ASK_POINT_STEPS,
    MAP_QUESTION,
    POINT_QUESTION,
    CategoryBoxes,
    counting_rows,
    say_levels,
    say_plural,
)
from vpt.protocol.tokens import INVITE_REENCODE, INVITE_REGION, RELEASED_GRID_SIZE

_ASKED = {
    "lines": (
        "Which way do the lines run on the {color} one?",
        "In which direction do the lines of the {color} one go?",
    ),
    "pattern": (
        "What pattern is on the {color} one?",
        "Which pattern does the {color} one have?",
    ),
    "number": (
        "What number is on the {color} one?",
        "Which digit does the {color} one show?",
    ),
    "shape": (
        "What shape is the {color} one?",
        "Which shape has the {color} one?",
    ),
    "count": ("How many are there?", "How many do you count?"),
    "presence": ("Is there a {color} one?", "Do you see anything {color}?"),
    "side": (
        "Is the {color} one left or right of the {other} one?",
        "Left or right: where is the {color} one, seen from the {other} one?",
    ),
}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
_CAPTION = ("Where is everything?", "List what you see and where it is.")
_LISTING = ("What is everything?", "List what you see and what it is.")  # of words of the others


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        family: key of the wording: ``lines``, ``pattern``, ``number``, ``shape``, ``count``,
            ``presence``, ``side``, ``caption`` or ``listing``.
        mode: how it is best answered: ``direct``, ``region``, ``clip``, ``dino`` or ``sam``.
        text: in words.
        answer: in words.
        item: what it is about, if one thing.
    """

    family: str
    mode: str
    text: str
    answer: str
    item: Item | None = None

    @property
    def name(self) -> str:
        """Mode and family, as results are reported: ``region-lines``."""
        return f"{self.mode}-{self.family}"


def mode_of(scene: Scene, item: Item) -> str:
    """How what an item shows is best read."""
    if item.kind == "tag":
        return "region"
    if item.kind == "thing":
        return "clip" if is_crowded(scene) else "direct"
    if not item.fine:
        return "direct"
    return {"lines": "dino", "pattern": "sam"}[item.family]


def reading_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """What each item shows, one question per item, in random order."""
    return [
        Question(
            item.family,
            mode_of(scene, item),
            _word(item.family, rng, color=item.color),
            item.value,
            item,
        )
        for item in _shuffled(scene, rng)
    ]


def easy_question(scene: Scene, rng: np.random.Generator) -> Question:
    """A question that the first look answers."""
    kind = str(rng.choice(("count", "presence", "side")))
    items = _shuffled(scene, rng)
    if kind == "count" and len(items) < len(_NUMBERS):
        return Question("count", "direct", _word("count", rng), _NUMBERS[len(items)])
    if kind == "side" and len(items) > 1 and _apart(items[0], items[1]):
        return _side_question(items[0], items[1], rng)
    present = {item.color for item in items}
    absent = [color for color in COLORS if color not in present]
    is_there = rng.random() < 0.5
    color = str(rng.choice(sorted(present) if is_there else absent or sorted(present)))
    text = _word("presence", rng, color=color)
    return Question("presence", "direct", text, "yes" if color in present else "no")


def side_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Which of two items is left of the other, for every pair of which that is plain."""
    pairs = [(a, b) for a, b in permutations(scene.items, 2) if _apart(a, b)]
    order = rng.permutation(len(pairs)).tolist()
    return [_side_question(a, b, rng) for a, b in (pairs[i] for i in order)]


def _side_question(item: Item, other: Item, rng: np.random.Generator) -> Question:
    text = _word("side", rng, color=item.color, other=other.color)
    answer = "left" if item.center[0] < other.center[0] else "right"
    return Question("side", "direct", text, answer)


def caption(scene: Scene, rng: np.random.Generator) -> Question:
    """Every item with its cell of the region grid, in random order; no space, as before boxes."""
    listed = []
    for item in _shuffled(scene, rng):
        cell = cell_of(item)
        listed.append(f"{item.color}<|x_{cell.x_min}|><|y_{cell.y_min}|>")
    return Question("caption", "direct", str(rng.choice(_CAPTION)), ", ".join(listed))


def listing(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Every item with what it shows, in random order, from one look at the whole picture.

    Returns:
        ``None`` for tags, which take a region each.
    """
    modes = sorted({mode_of(scene, item) for item in scene.items} - {"direct"})
    if "region" in modes:
        return None
    items = ", ".join(f"{item.color} {item.value}" for item in _shuffled(scene, rng))
    mode = str(rng.choice(modes)) if modes else "direct"
    return Question("listing", mode, str(rng.choice(_LISTING)), items)


def cell_of(item: Item) -> GridBox:
    """The cell that holds the middle of what there is to read."""
    x, y = (int(value * RELEASED_GRID_SIZE / SIZE_PX) for value in item.center)
    return GridBox(x, y, x, y)


def all_texts() -> Iterator[str]:
    """Every word that questions and answers are made of, for the tokenizer."""
    for color in COLORS:
        for wordings in (*_ASKED.values(), _CAPTION):
            for wording in wordings:
                yield wording.format(color=color, other=color)
        yield f"{color} , {color}"
    for word in (*LINES, *PATTERNS, *SHAPES, *_NUMBERS, *"0123456789", "yes", "no", "left"):
        yield from (word, f"the {word}")
    yield from ("right", INVITE_REGION, INVITE_REENCODE)
    yield from ("the red tag", "the blue board", "the green thing", "sign card label box")
    yield from _content_texts()


def _content_texts() -> Iterator[str]:
    """Of answers in which a depth map or boxes are written."""
    yield from (MAP_QUESTION, f"{POINT_QUESTION} {ASK_POINT_STEPS}", ASK_COUNT_STEPS)
    levels = say_levels(dict.fromkeys("ABCDE", 12))
    yield f"Points: {', '.join('ABCDE')}. Depth map: Nearness: {levels}. The answer is (A)."
    yield from (ASK_ALL_BOXES, ASK_ALL_COUNTS, ASK_ALL_POINTS)
    for kind in SHAPES:
        yield f"The {say_plural(kind)} 2."
        for row in counting_rows("", CategoryBoxes(kind, ())):
            yield from (message["content"] for message in row["messages"])


def _word(family: str, rng: np.random.Generator, **names: str) -> str:
    return str(rng.choice(_ASKED[family])).format(**names)


def _shuffled(scene: Scene, rng: np.random.Generator) -> list[Item]:
    return [scene.items[i] for i in rng.permutation(len(scene.items))]


def _apart(a: Item, b: Item) -> bool:
    """Whether two items differ enough in x that left and right are plain."""
    return abs(a.center[0] - b.center[0]) > SIZE_PX / 6
