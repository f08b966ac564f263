"""Checks of perception content in a row: depth maps and boxes, and what its note says of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from vpt.data.aurora.counting_rows import read_count
from vpt.data.aurora.depth_rows import leader_of, read_letter, read_levels, read_places
from vpt.data.aurora.rows import (
    BOXES,
    COUNT_DIRECT,
    COUNT_STEPS,
    DEPTH_DIRECT,
    DEPTH_MAP,
    DEPTH_STEPS,
    read_note,
)
from vpt.data.findings import Finding
from vpt.data.row_view import RowView
from vpt.errors import DataError, RegionError
from vpt.protocol.content import parse_depth, parse_pixel_boxes
from vpt.protocol.tokens import DEPTH_END, DEPTH_START

_LIKE_CONTENT = re.compile(r"<(?:DEPTH|PIXEL)_[^<>\s]*>")
_NUMBERED = re.compile(r"<(?:DEPTH|PIXEL)_(?:0|[1-9][0-9]*)>")
_MAP = re.compile(f"{DEPTH_START}(?:(?!{DEPTH_START}).)*?{DEPTH_END}", re.DOTALL)
_BOUNDS = (DEPTH_START, DEPTH_END)
_POINT_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "letter": str,
    "x": int,
    "y": int,
    "depth": (int, float),
}


def check_content(view: RowView, added_tokens: Collection[str] | None = None) -> Iterator[Finding]:
    """Find depth maps and boxes that are none, and tokens of them that are unknown or misplaced.

    Args:
        view: of the row.
        added_tokens: of the model's tokenizer, if a model is known.
    """
    for turn in view.turns:
        asked, answered = f"messages[{turn.number}]", f"messages[{turn.number + 1}]"
        if found := _LIKE_CONTENT.findall(turn.asked):
            yield Finding("misplaced-token", f"{asked} holds {found[0]}")
        tokens = dict.fromkeys(_LIKE_CONTENT.findall(turn.answered))
        for token in tokens:
            if token not in _BOUNDS and not _NUMBERED.fullmatch(token):
                yield Finding("unknown-token", f"{answered} holds {token}")
        if added_tokens is not None and (lacking := [t for t in tokens if t not in added_tokens]):
            yield Finding("missing-content", f"{answered} holds {lacking[0]}")
        for text in _MAP.findall(turn.answered):
            try:
                parse_depth(text)
            except DataError as exc:
                yield Finding("bad-depth-map", f"{answered}: {exc}")
        outside = _MAP.sub(" ", turn.answered)
        if stray := [token for token in _LIKE_CONTENT.findall(outside) if _is_depth(token)]:
            yield Finding("bad-depth-map", f"{answered}: {stray[0]} stands outside a whole map")
        try:
            parse_pixel_boxes(outside)
        except RegionError as exc:
            yield Finding("bad-box", f"{answered}: {exc}")


def check_note(row: Mapping[str, Any], view: RowView) -> Iterator[Finding]:
    """Find answers that disagree with what the row's note says, and notes that make no sense."""
    try:
        note = read_note(row)
        problems = _CHECKS[note["task"]](note, view.turns[-1].answered) if note else []
    except (DataError, RegionError) as exc:
        yield Finding("bad-note", str(exc))
        return
    for problem in problems:
        yield Finding("answer-mismatch", problem)


def _check_map(note: Mapping[str, Any], answer: str) -> list[str]:
    whole = _MAP.fullmatch(answer.strip())
    return [] if whole else ["expected one depth map and nothing else"]


def _check_steps(note: Mapping[str, Any], answer: str) -> list[str]:
    problems = _check_letter(note, answer)
    points = _points(note)
    if (number := len(_MAP.findall(answer))) != 1:
        problems.append(f"expected one depth map, got {number}")
    if read_places(answer) != {p["letter"]: (p["x"], p["y"]) for p in points}:
        problems.append("the points of the answer are not those of the note")
    levels = read_levels(answer)
    if set(levels) != {point["letter"] for point in points}:
        problems.append(f"nearness is told of {', '.join(levels) or 'no point'}")
    elif (leader := leader_of(levels)) != note["answer"]:
        problems.append(f"by the nearness told {leader or 'no single point'} is nearest")
    return problems


def _check_letter(note: Mapping[str, Any], answer: str) -> list[str]:
    points = _points(note)
    nearest = max(points, key=lambda point: point["depth"])["letter"]
    if nearest != note.get("answer"):
        raise DataError(f"the note's answer is {note.get('answer')!r}, its nearest point {nearest}")
    letter = read_letter(answer)
    return [] if letter == nearest else [f"the answer is {letter}, the nearest point is {nearest}"]


def _check_direct_letter(note: Mapping[str, Any], answer: str) -> list[str]:
    return [*_check_letter(note, answer), *_no_content(answer)]


def _check_boxes(note: Mapping[str, Any], answer: str) -> list[str]:
    boxes = _boxes(note)
    if _LIKE_CONTENT.sub("", answer).strip(" ,."):
        return ["expected boxes and nothing else"]
    return _same_boxes(boxes, answer)


def _check_count_steps(note: Mapping[str, Any], answer: str) -> list[str]:
    return [*_same_boxes(_boxes(note), answer), *_same_count(note, answer)]


def _check_direct_count(note: Mapping[str, Any], answer: str) -> list[str]:
    _boxes(note)
    return [*_same_count(note, answer), *_no_content(answer)]


_CHECKS = {
    DEPTH_MAP: _check_map,
    DEPTH_STEPS: _check_steps,
    DEPTH_DIRECT: _check_direct_letter,
    BOXES: _check_boxes,
    COUNT_STEPS: _check_count_steps,
    COUNT_DIRECT: _check_direct_count,
}


def _same_boxes(boxes: list[tuple[int, ...]], answer: str) -> list[str]:
    try:
        written = parse_pixel_boxes(answer)
    except RegionError:
        return []  # found as a bad box already
    if sorted(written) == sorted(boxes):
        return []
    return [f"the answer has {len(written)} boxes, not the {len(boxes)} of the note"]


def _same_count(note: Mapping[str, Any], answer: str) -> list[str]:
    count = read_count(answer)
    return (
        [] if count == note["count"] else [f"the answer is {count}, the note says {note['count']}"]
    )


def _no_content(answer: str) -> list[str]:
    return ["expected no depth map and no boxes"] if _LIKE_CONTENT.search(answer) else []


def _points(note: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    points = note.get("points")
    if not isinstance(points, list) or len(points) < 2:
        raise DataError("expected the note to have points, two at least")
    for point in points:
        if not isinstance(point, dict) or not all(
            isinstance(point.get(key), kind) for key, kind in _POINT_KEYS.items()
        ):
            raise DataError(f"expected points with letter, x, y and depth, got {point!r}")
    return points


def _boxes(note: Mapping[str, Any]) -> list[tuple[int, ...]]:
    boxes, count = note.get("boxes"), note.get("count")
    if not isinstance(boxes, list) or not all(isinstance(box, list) for box in boxes):
        raise DataError("expected the note to have a list of boxes")
    if count != len(boxes):
        raise DataError(f"the note's count is {count!r}, it has {len(boxes)} boxes")
    return [tuple(box) for box in boxes]


def _is_depth(token: str) -> bool:
    return token in _BOUNDS or (token.startswith("<DEPTH_") and bool(_NUMBERED.fullmatch(token)))
