"""What is asked and answered about depth: the map alone, the nearest point in steps, or at once.

The question about points is HardBLINK's, word for word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vpt.data.aurora.points import Floats, Point, nearest
from vpt.data.aurora.rows import (
    DEPTH_DIRECT,
    DEPTH_MAP,
    DEPTH_STEPS,
    Row,
    build_content_row,
)
from vpt.depth.reading import depth_at
from vpt.errors import DataError
from vpt.protocol.content import format_depth

MAP_QUESTION = "What is the depth map of the image?"
POINT_QUESTION = (
    "Multiple points are circled on the image, labeled by letters beside each circle. "
    "Which point is the closest to the camera?"
)
STEPS = "Write down where the points are, then the depth map, then how near each point is on it."
"""What asks for the answer in steps."""

NUM_LEVELS = 100

_SAID = re.compile(r"([A-E]) (\d\d)(?=[,.])")
_PLACE = re.compile(r"([A-E]) at x (\d+) y (\d+)")
_ANSWER = re.compile(r"\(([A-E])\)")


def level(depth: float) -> int:
    """How near something is in the words of an answer: 0 (farthest) to 99 (nearest)."""
    return min(int(depth * NUM_LEVELS), NUM_LEVELS - 1)


def map_row(image: str, codes: Sequence[int], note: dict[str, Any]) -> Row:
    """The depth map as tokens, and nothing else.

    Args:
        image: of the plain photo.
        codes: of its map, 100 of 0 to 127.
        note: of the photo.

    Raises:
        DataError: for other codes.
    """
    return build_content_row(MAP_QUESTION, format_depth(codes), image, {"task": DEPTH_MAP, **note})


def point_rows(
    image: str, points: Sequence[Point], codes: Sequence[int], drawn: Floats, note: dict[str, Any]
) -> tuple[Row, Row]:
    """The same question answered in steps, and at once.

    Args:
        image: with the marked points.
        points: in the order of their letters.
        codes: of the depth map.
        drawn: ``[H, W]``, the map that these codes stand for: what the steps read.
        note: of the photo.

    Raises:
        DataError: if another point is nearest on the drawn map than on the true one.
    """
    answer = nearest(points).letter
    levels = {point.letter: level(depth_at(drawn, point.x, point.y)) for point in points}
    if leader_of(levels) != answer:
        raise DataError("the map that the codes stand for does not show which point is nearest")
    where = ", ".join(f"{p.letter} at x {p.x} y {p.y}" for p in points)
    said = ", ".join(f"{letter} {value:02}" for letter, value in levels.items())
    steps = (
        f"Points: {where}. Depth map: {format_depth(codes)} "
        f"Nearness: {said}. The answer is ({answer})."
    )
    about = {"points": [asdict(point) for point in points], "answer": answer, **note}
    return (
        build_content_row(
            f"{POINT_QUESTION} {STEPS}", steps, image, {"task": DEPTH_STEPS, **about}
        ),
        build_content_row(POINT_QUESTION, f"({answer})", image, {"task": DEPTH_DIRECT, **about}),
    )


def leader_of(levels: dict[str, int]) -> str | None:
    """The letter with the greatest level; ``None`` if there are two such, or no letter."""
    ordered = sorted(levels, key=lambda letter: -levels[letter])
    if not ordered or (len(ordered) > 1 and levels[ordered[0]] == levels[ordered[1]]):
        return None
    return ordered[0]


def read_levels(answer: str) -> dict[str, int]:
    """The levels that an answer in steps names, by letter."""
    return {letter: int(value) for letter, value in _SAID.findall(answer)}


def read_places(answer: str) -> dict[str, tuple[int, int]]:
    """Where an answer in steps says the points are on the 336 grid, by letter: ``(x, y)``."""
    return {letter: (int(x), int(y)) for letter, x, y in _PLACE.findall(answer)}


def read_letter(answer: str) -> str | None:
    """The letter that an answer ends with, ``None`` if it names none."""
    letters = _ANSWER.findall(answer)
    return letters[-1] if letters else None
