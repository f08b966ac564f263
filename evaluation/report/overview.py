"""The numbers of a run, arranged for tables and charts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NUM_COLOURS = 8  # classes k0 to k7 of page.css; k0 is grey
_APART = (
    "version",
    "model",
    "splits",
    "tool_value",
    "unscored",
)  # of the results; they have their own place

_QUESTIONS = {
    ("auto", "blank"): "Is it the content that helps?",
    ("auto", "random"): "Is it the place that helps?",
    ("truth", "auto"): "What would the true region add?",
}


@dataclass(frozen=True)
class ScoreRow:
    """A split under a condition.

    Attributes:
        entry: as in ``results.json``.
        opens_split: whether it is the first row of its split.
        colour: of the condition, from 0 below `NUM_COLOURS`.
    """

    entry: Mapping[str, Any]
    opens_split: bool
    colour: int

    @property
    def main(self) -> Mapping[str, float] | None:
        """The score that decides, with its interval; ``None`` if nothing was scored."""
        interval: Mapping[str, float] | None = self.entry["scores"].get(self.entry["score"])
        return interval

    @property
    def others(self) -> dict[str, Mapping[str, float]]:
        """The other scores, with their intervals."""
        scores = self.entry["scores"].items()
        return {name: interval for name, interval in scores if name != self.entry["score"]}

    @property
    def num_failed(self) -> int:
        """Samples without an answer."""
        return sum(self.entry["failures"].values())

    @property
    def tokens_per_sample(self) -> float | None:
        """Read by the LLM; without that count, of prompt, calls and answer together."""
        tokens = self.entry.get("tokens") or {}
        num_answered = self.entry["n"] - self.num_failed
        if not tokens or num_answered < 1:
            return None
        total: float = tokens.get("llm", sum(tokens.values())) / num_answered
        return total

    @property
    def milliseconds(self) -> float | None:
        """Per sample, from start to stop."""
        value: float | None = self.entry.get("milliseconds")
        return value


@dataclass(frozen=True)
class ToolRow:
    """What a condition brings against another.

    Attributes:
        value: as in ``results.json``, made by :class:`vpt.evaluation.results.ToolValue`.
        opens_pair: whether the row before is of another pair or split.
    """

    value: Mapping[str, Any]
    opens_pair: bool

    @property
    def question(self) -> str:
        """What the pair answers; empty where it is the question of them all."""
        return _QUESTIONS.get((self.value["condition"], self.value["baseline"]), "")


@dataclass(frozen=True)
class Overview:
    """The part of a report above its samples.

    Attributes:
        facts: name and words for every setting of the run.
        rows: of the table and the chart of scores.
        score_axis: of the chart.
        tools: rows on what looking again brought.
        difference_axis: of their chart.
    """

    facts: Sequence[tuple[str, str]]
    rows: Sequence[ScoreRow]
    score_axis: Axis
    tools: Sequence[ToolRow]
    difference_axis: Axis


def overview_of(results: Mapping[str, Any]) -> Overview:
    """Arrange ``results.json``.

    Args:
        results: of a run.
    """
    rows, tools = list(_score_rows(results["splits"])), list(_tool_rows(results))
    intervals = [row.main for row in rows if row.main is not None]
    differences = [t.value["difference"] for t in tools if t.value["difference"] is not None]
    return Overview(
        facts=facts_of(results),
        rows=rows,
        score_axis=axis_from_zero(i[end] for i in intervals for end in ("low", "high")),
        tools=tools,
        difference_axis=axis_around_zero(d[end] for d in differences for end in ("low", "high")),
    )


def facts_of(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All else a run says about itself, known to us or not; the name of the model is the title."""
    facts = [(n, _words(value)) for n, value in results["model"].items() if n != "name"]
    return facts + [
        (name.replace("_", " "), _words(value))
        for name, value in results.items()
        if name not in _APART
    ]


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_words(v)}" for name, v in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not given"}[value]
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _score_rows(entries: Iterable[Mapping[str, Any]]) -> Iterator[ScoreRow]:
    colours, split = {"none": 0}, None
    for entry in entries:
        place = len(colours) - 1
        colour = colours.setdefault(entry["condition"], 1 + place % (NUM_COLOURS - 1))
        yield ScoreRow(entry, entry["split"] != split, colour)
        split = entry["split"]


def _tool_rows(results: Mapping[str, Any]) -> Iterator[ToolRow]:
    before = None
    for value in results.get("tool_value") or ():
        pair = value["split"], value["condition"], value["baseline"]
        yield ToolRow(value, pair != before)
        before = pair


# --- axes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers.

    Attributes:
        low: at 0 percent.
        high: at 100 percent; above ``low``.
    """

    low: float
    high: float

    def at(self, value: float) -> float:
        """Percent along the axis; what lies beyond an end is put there."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 3)

    def ticks(self) -> list[float]:
        """Five values, evenly spaced, both ends among them."""
        return [self.low + (self.high - self.low) * step / 4 for step in range(5)]


def axis_from_zero(values: Iterable[float]) -> Axis:
    """From 0 (or below, if need be) to 1, or to a round number above every value."""
    listed = list(values)
    low, high = min([0.0, *listed]), max([1.0, *listed])
    return Axis(-_round_up(-low) if low < 0 else 0.0, 1.0 if high <= 1 else _round_up(high))


def axis_around_zero(values: Iterable[float]) -> Axis:
    """With 0 in the middle, to a round number beyond every value."""
    reach = _round_up(max([0.01, *map(abs, values)]))
    return Axis(-reach, reach)


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 4, 5, 8, 10) if power * step >= value * (1 - 1e-9))
