"""What is asked and answered about objects: their boxes, their number in steps, or at once."""

from __future__ import annotations

import re
from typing import Any

from vpt.data.aurora.lvis import CategoryBoxes, say_plural
from vpt.data.aurora.rows import BOXES, COUNT_DIRECT, COUNT_STEPS, Row, build_content_row
from vpt.protocol.content import format_pixel_box

STEPS = "Write down the box of each one first."
"""What asks for the answer in steps."""

_NUMBER = re.compile(r"\d+")


def box_question(category: str) -> str:
    """What asks for the boxes of a category."""
    return f"Where are the {say_plural(category)} in the image? Write down the box of each one."


def count_question(category: str) -> str:
    """What asks for the number of a category."""
    return f"How many {say_plural(category)} are in the image?"


def counting_rows(image: str, found: CategoryBoxes) -> tuple[Row, Row, Row]:
    """Rows about a category of a picture: boxes, count in steps, count at once.

    Args:
        image: path, as the rows shall name it.
        found: one box at least.

    Raises:
        RegionError: if a box does not lie on the 336 grid.
    """
    written = ", ".join(format_pixel_box(box) for box in found.boxes)
    count = len(found.boxes)
    note: dict[str, Any] = {
        "category": found.category,
        "count": count,
        "boxes": [list(box) for box in found.boxes],
    }
    question = count_question(found.category)
    steps = f"{written}. The answer is {count}."
    return (
        build_content_row(
            box_question(found.category), f"{written}.", image, {"task": BOXES, **note}
        ),
        build_content_row(f"{question} {STEPS}", steps, image, {"task": COUNT_STEPS, **note}),
        build_content_row(question, str(count), image, {"task": COUNT_DIRECT, **note}),
    )


def counting_question(
    number: int, image: str, found: CategoryBoxes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Question and answer in HardBLINK's layout, to measure a model with.

    Args:
        number: of the picture.
        image: path, as the question shall name it.
        found: what is asked about.
    """
    name = {"question_id": f"{number} {found.category}"}
    category = {"category": "few" if len(found.boxes) <= _FEW else "many"}
    question = {"image": image, "text": count_question(found.category), **category}
    boxes = {"boxes": [list(box) for box in found.boxes]}
    return {**name, **question, **boxes}, {**name, "text": str(len(found.boxes)), **category}


_FEW = 4


def read_count(answer: str) -> int | None:
    """The number that an answer ends with, boxes aside; ``None`` if it names none."""
    numbers = _NUMBER.findall(re.sub(r"<[^<>]*>", " ", answer))
    return int(numbers[-1]) if numbers else None
