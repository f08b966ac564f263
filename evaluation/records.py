"""What came of each sample, one JSON line per sample, written durably as it ends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpt.errors import DataError
from vpt.evaluation.lines import LineFile, read_lines
from vpt.trace.records import Trace

ERRORS = ("image", "row", "run")
"""Why a sample has no score: its image or its row cannot be used, or the run of it failed."""


@dataclass(frozen=True)
class Record:
    """What came of one sample under one condition.

    Attributes:
        split: name.
        condition: name, such as ``"auto"``.
        id: of the sample.
        question: as it was put to the model.
        prediction: the model's answer; empty if there is an error.
        answers: accepted ones.
        scores: name of a score -> value; empty if there is an error.
        group: of the sample.
        box: of the evidence, XYXY in pixels of the first image.
        images: names of the sample's images.
        trace: of the run, as ``Trace.to_dict`` returns it; ``None`` if there is an error.
        error: ``{"kind": one of ERRORS, "message": ...}``, or ``None``.
    """

    split: str
    condition: str
    id: str
    question: str
    prediction: str = ""
    answers: tuple[str, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    group: str = ""
    box: tuple[float, float, float, float] | None = None
    images: tuple[str, ...] = ()
    trace: dict[str, Any] | None = None
    error: dict[str, str] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Split, condition and id: what makes it unique in a run."""
        return self.split, self.condition, self.id

    @property
    def num_calls(self) -> int:
        """Perception calls that were executed."""
        calls = self.trace["calls"] if self.trace else []
        return sum(call["outcome"] == "executed" for call in calls)

    def read_trace(self) -> Trace:
        """The trace as an object.

        Raises:
            DataError: if there is none.
        """
        if self.trace is None:
            raise DataError(f"sample {self.id} of {self.split} has no trace: {self.error}")
        return Trace.from_dict(self.trace)

    def to_line(self) -> str:
        """One line of JSON, with its end."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=True) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Record:
        """Read what :meth:`to_line` wrote."""
        content = json.loads(line)
        for name in ("answers", "images"):
            content[name] = tuple(content[name])
        if content["box"] is not None:
            content["box"] = tuple(content["box"])
        return cls(**content)


class RecordFile:
    """A file of records that survives a kill; see :class:`vpt.evaluation.lines.LineFile`.

    Args:
        path: of the file; it and its folder are made when first needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = LineFile(path)

    def append(self, record: Record) -> None:
        """Write a record; it is on disk when this returns.

        Raises:
            DataError: if it cannot be written; the records before it stay.
        """
        self._lines.append(record.to_line())

    def close(self) -> None:
        """Let go of the file."""
        self._lines.close()


def read_records(path: Path) -> Iterator[Record]:
    """Read a file of records; one that does not exist has none.

    Raises:
        DataError: if the file cannot be read, or a whole line is no record.
    """
    for number, line in enumerate(read_lines(path), 1):
        try:
            yield Record.from_line(line)
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise DataError(
                f"{path}, line {number} is no record ({exc}); delete the line to have its sample "
                "run again"
            ) from exc
