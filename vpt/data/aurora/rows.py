"""Rows whose answers hold perception content, and the note that each carries about itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vpt.errors import DataError
from vpt.protocol.rows import KINDS, ROLES

Row = dict[str, Any]

NOTE = "note"
"""Column with a JSON object as text.

It is text, for a column of objects that differ between rows has no one type, and the ``datasets``
package, with which LLaMA-Factory reads rows, refuses a file whose later parts have another type.
"""

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
"""Task of a row -> its words in reports."""

_BEGINNING = '{"task": '

ATOMIC_TASKS = (DEPTH_MAP, BOXES)
"""Tasks in which perception content is all that is asked for."""


def build_content_row(question: str, answer: str, image: str, note: Mapping[str, Any]) -> Row:
    """A row of the released format with one picture, one question and one answer.

    Args:
        question: without placeholder.
        answer: as the model shall write it.
        image: path, as the row shall name it.
        note: what the row is about; its ``task`` is a key of :data:`TASKS`.
    """
    messages = [
        {"role": ROLES[0], "content": f"{KINDS['image'].placeholder}\n{question}"},
        {"role": ROLES[1], "content": answer},
    ]
    columns: dict[str, list[str]] = {kind.column: [] for kind in KINDS.values()}
    columns[KINDS["image"].column].append(image)
    return {"messages": messages, **columns, NOTE: json.dumps(note, ensure_ascii=False)}


def read_note(row: Mapping[str, Any]) -> dict[str, Any]:
    """The note of a row.

    Returns:
        Empty where there is none, or one of another origin.

    Raises:
        DataError: if it is damaged, or its task is unknown.
    """
    text = row.get(NOTE)
    if not isinstance(text, str) or not text.startswith(_BEGINNING):
        return {}
    try:
        note = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"the {NOTE} of the row is no JSON: {exc}") from exc
    if (task := note.get("task")) not in TASKS:
        raise DataError(f"unknown task {task!r} in the {NOTE}; available: {', '.join(TASKS)}")
    return note


def with_note(row: Row, **changes: object) -> Row:
    """A copy of a row whose note has keys more.

    Raises:
        DataError: if the row has no note that can be read.
    """
    note = read_note(row)
    if not note:
        raise DataError(f"the row has no {NOTE}; expected rows made by `vpt data make-...-rows`")
    return {**row, NOTE: json.dumps({**note, **changes}, ensure_ascii=False)}
