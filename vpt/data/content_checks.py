"""Checks of perception content in a row: depth maps and boxes, and agreement with its note."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from vpt.data.checks import Finding, RowView
from vpt.data.content_rows import (
    BOXES,
    COUNT_DIRECT,
    COUNT_STEPS,
    DEPTH_DIRECT,
    DEPTH_MAP,
    DEPTH_STEPS,
    leader_of,
    read_count,
    read_letter,
    read_levels,
    read_note,
    read_places,
)
from vpt.errors import DataError, RegionError
from vpt.protocol.calls import parse_depth, parse_pixel_boxes
from vpt.protocol.tokens import DEPTH_END, DEPTH_START

Note = Mapping[str, Any]

_LIKE_CONTENT = re.compile(r"<(?:DEPTH|PIXEL)_[^<>\s]*>")
_NUMBERED = re.compile(r"<(?:DEPTH|PIXEL)_(?:0|[1-9][0-9]*)>")
_MAP = re.compile(f"{DEPTH_START}(?:(?!{DEPTH_START}).)*?{DEPTH_END}", re.DOTALL)
_POINT_KEYS: Mapping[str, Any] = {"letter": str, "x": int, "y": int, "depth": (int, float)}


def check_content(view: RowView, added_tokens: Collection[str] | None = None) -> Iterator[Finding]:
    """Find malformed depth maps and boxes, and tokens of them that are unknown or misplaced."""
    for turn in view.turns:
        asked, answered = turn.names
        if found := _LIKE_CONTENT.findall(turn.asked):
            yield Finding("misplaced-token", f"{asked} contains {found[0]}")
        tokens = dict.fromkeys(_LIKE_CONTENT.findall(turn.answered))
        for token in tokens:
            if token not in (DEPTH_START, DEPTH_END) and not _NUMBERED.fullmatch(token):
                yield Finding("unknown-token", f"{answered} contains {token}")
        if added_tokens is not None and (lacking := [t for t in tokens if t not in added_tokens]):
            yield Finding("missing-content", f"{answered} contains {lacking[0]}")
        for text in _MAP.findall(turn.answered):
            try:
                parse_depth(text)
            except DataError as exc:
                yield Finding("bad-depth-map", f"{answered}: {exc}")
        outside = _MAP.sub(" ", turn.answered)
        if stray := re.findall(f"{DEPTH_START}|{DEPTH_END}|<DEPTH_(?:0|[1-9][0-9]*)>", outside):
            yield Finding("bad-depth-map", f"{answered}: {stray[0]} is outside a complete map")
        try:
            parse_pixel_boxes(outside)
        except RegionError as exc:
            yield Finding("bad-box", f"{answered}: {exc}")


def check_note(row: Mapping[str, Any], view: RowView) -> Iterator[Finding]:
    """Find answers that disagree with the row's note, and notes that contradict themselves."""
    try:
        note, answer = read_note(row), view.turns[-1].answered
        checks = _CHECKS[note["task"]] if note else ()
        problems = [problem for check in checks for problem in check(note, answer)]
    except (DataError, RegionError) as exc:
        yield Finding("bad-note", str(exc))
        return
    for problem in problems:
        yield Finding("answer-mismatch", problem)


def _only_a_map(note: Note, answer: str) -> Iterator[str]:
    if not _MAP.fullmatch(answer.strip()):
        yield "expected one depth map and nothing else"


def _only_boxes(note: Note, answer: str) -> Iterator[str]:
    if _LIKE_CONTENT.sub("", answer).strip(" ,."):
        yield "expected boxes and nothing else"


def _no_content(note: Note, answer: str) -> Iterator[str]:
    if _LIKE_CONTENT.search(answer):
        yield "expected no depth map and no boxes"


def _letter(note: Note, answer: str) -> Iterator[str]:
    nearest = max(_points(note), key=lambda point: point["depth"])["letter"]
    if nearest != note.get("answer"):
        raise DataError(f"the note's answer is {note.get('answer')!r}, its nearest point {nearest}")
    if (letter := read_letter(answer)) != nearest:
        yield f"the answer is {letter}, the nearest point is {nearest}"


def _steps(note: Note, answer: str) -> Iterator[str]:
    points = _points(note)
    if (number := len(_MAP.findall(answer))) != 1:
        yield f"expected one depth map, got {number}"
    if read_places(answer) != {p["letter"]: (p["x"], p["y"]) for p in points}:
        yield "the points of the answer are not those of the note"
    levels = read_levels(answer)
    if set(levels) != {point["letter"] for point in points}:
        yield f"the answer states the nearness of {', '.join(levels) or 'no point'}"
    elif (leader := leader_of(levels)) != note["answer"]:
        yield f"by the stated nearness {leader or 'no single point'} is nearest"


def _same_boxes(note: Note, answer: str) -> Iterator[str]:
    boxes = _boxes(note)
    try:
        written = parse_pixel_boxes(answer)
    except RegionError:
        return  # `check_content` reports it
    if sorted(written) != sorted(boxes):
        yield f"the answer has {len(written)} boxes, not the {len(boxes)} of the note"


def _same_count(note: Note, answer: str) -> Iterator[str]:
    expected = len(_boxes(note))
    if (count := read_count(answer)) != expected:
        yield f"the answer is {count}, the note says {expected}"


_CHECKS: Mapping[str, tuple[Callable[[Note, str], Iterator[str]], ...]] = {
    DEPTH_MAP: (_only_a_map,),
    DEPTH_STEPS: (_letter, _steps),
    DEPTH_DIRECT: (_letter, _no_content),
    BOXES: (_only_boxes, _same_boxes),
    COUNT_STEPS: (_same_boxes, _same_count),
    COUNT_DIRECT: (_same_count, _no_content),
}


def _points(note: Note) -> list[Mapping[str, Any]]:
    points = note.get("points")
    if not isinstance(points, list) or len(points) < 2:
        raise DataError("expected the note to have at least two points")
    for point in points:
        if not isinstance(point, dict) or not all(
            isinstance(point.get(key), kind) for key, kind in _POINT_KEYS.items()
        ):
            raise DataError(f"expected points with letter, x, y and depth, got {point!r}")
    return points


def _boxes(note: Note) -> list[tuple[int, ...]]:
    boxes, count = note.get("boxes"), note.get("count")
    if not isinstance(boxes, list) or not all(isinstance(box, list) for box in boxes):
        raise DataError("expected the note to have a list of boxes")
    if count != len(boxes):
        raise DataError(f"the note's count is {count!r}, it has {len(boxes)} boxes")
    return [tuple(box) for box in boxes]
