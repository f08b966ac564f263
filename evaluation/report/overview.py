"""The numbers of a run, arranged for tables and charts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vpt.view.wording import public_text

NUM_COLOURS = 8  # classes k0 to k7 of page.css; k0 is grey
_SHOWN_ELSEWHERE = {"version", "model", "splits", "tool_value", "unscored", "interrupted", "parts"}
_QUESTIONS = {
    ("auto", "blank"): "Does the content help?",
    ("auto", "random"): "Does the position help?",
    ("truth", "auto"): "Would the true region help more?",
    ("auto", "content-random"): "Do its drawings help more than random ones?",
    ("auto", "content-repeat"): "More than one code or box again and again?",
    ("auto", "content-empty"): "More than empty ones?",
    ("auto", "content-other"): "More than those of another picture?",
    ("content-truth", "auto"): "Would true drawings help more?",
}


class ScoreRow(NamedTuple):
    """A split under a condition."""

    entry: Mapping[str, Any]  # as in results.json
    opens_split: bool
    colour: int  # of the condition, from 0 below NUM_COLOURS
    main: Mapping[str, float] | None  # the score that decides; None if nothing was scored
    chance: float | None  # expected score of random guesses
    num_failed: int
    remarks: Sequence[str]  # reasons of failures, samples without a record
    tokens_per_sample: float | None  # read by the LLM, or else of prompt, calls and answer
    tokens_per_solved: float | None


class ToolRow(NamedTuple):
    """Effect of a condition compared with another."""

    value: Mapping[str, Any]  # as in results.json
    opens_pair: bool
    question: str  # that the pair answers; empty where it is the question of all pairs


class Overview(NamedTuple):
    """The part of a report above its samples: settings, scores, and what looking again brought."""

    facts: Sequence[tuple[str, str]]
    rows: Sequence[ScoreRow]
    score_axis: Axis
    tools: Sequence[ToolRow]
    difference_axis: Axis


def overview_of(results: Mapping[str, Any]) -> Overview:
    """Arrange ``results.json``."""
    rows, tools = list(_score_rows(results["splits"])), list(_tool_rows(results))
    intervals = [row.main for row in rows if row.main is not None]
    differences = [t.value["difference"] for t in tools if t.value["difference"] is not None]
    score_axis = axis_from_zero(i[end] for i in intervals for end in ("low", "high"))
    difference_axis = axis_around_zero(d[end] for d in differences for end in ("low", "high"))
    return Overview(facts_of(results), rows, score_axis, tools, difference_axis)


def facts_of(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings and provenance of a run; the name of the model is the title."""
    model = {name: value for name, value in results["model"].items() if name != "name"}
    facts = {("model hash" if name == "hash" else name): value for name, value in model.items()}
    facts |= {name: value for name, value in results.items() if name not in _SHOWN_ELSEWHERE}
    if any("data_hash" in entry for entry in results["splits"]):
        facts["data"] = {e["split"]: e["data_hash"] for e in results["splits"]}
    if len(parts := results.get("parts") or ()) > 1:
        facts["seconds"] = f"{_words(results['seconds'])} in {len(parts)} parts"
    return [(name.replace("_", " "), public_text(_words(v))) for name, v in facts.items()]


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
        main, num_failed = entry["scores"].get(entry["score"]), sum(entry["failures"].values())
        tokens, num_answered = entry.get("tokens") or {}, entry["n"] - num_failed
        per_sample = None
        if tokens and num_answered > 0:
            per_sample = tokens.get("llm", sum(tokens.values())) / num_answered
        per_solved = (entry.get("per_solved") or {}).get("tokens")
        chance = entry.get("chance")
        opens = entry["split"] != split
        remarks = list(_remarks(entry))
        yield ScoreRow(
            entry, opens, colour, main, chance, num_failed, remarks, per_sample, per_solved
        )
        split = entry["split"]


def _remarks(entry: Mapping[str, Any]) -> Iterator[str]:
    for kind, number in entry["failures"].items():
        if number:
            yield f"{number:,} {kind} {'failure' if number == 1 else 'failures'}"
    for key in ("not_asked", "waiting"):
        if entry.get(key):
            yield f"{entry[key]:,} {key.replace('_', ' ')}"


def _tool_rows(results: Mapping[str, Any]) -> Iterator[ToolRow]:
    before = None
    for value in results.get("tool_value") or ():
        split, *pair = value["split"], value["condition"], value["baseline"]
        yield ToolRow(value, (split, pair) != before, _QUESTIONS.get(tuple(pair), ""))
        before = split, pair


class Axis(NamedTuple):
    """A stretch of numbers, from 0 to 100 percent of a chart's length."""

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
