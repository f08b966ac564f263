"""Questions about the pictures in ``examples`` that the embedded model answers right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """A question that is put to the embedded model.

    Attributes:
        picture: file name.
        question: as it is asked.
        answer: the right one.
        takes: the look it takes, in words for people.
    """

    picture: str
    question: str
    answer: str
    takes: str


def read_examples(folder: Path) -> list[Example]:
    """The questions of ``questions.json`` in a folder; none where there is no such file."""
    file = folder / "questions.json"
    if not file.is_file():
        return []
    return [Example(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
