"""Numbers of a run: a summary per split and condition, and whether looking again helps."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vpt.evaluation.intervals import (
    Interval,
    PairedTest,
    difference_interval,
    mean_interval,
    paired_test,
)
from vpt.evaluation.records import ERRORS, Record
from vpt.evaluation.scores.table import Score
from vpt.inference.content import REPLACED_CONTENT

RESULTS_VERSION = 1

BASELINE = "none"
OWN_CALLS = "auto"
CONTENT_PAIRS = (
    ("auto", "blank"),
    ("auto", "random"),
    ("truth", "auto"),
    *(("auto", f"content-{how}") for how in (*REPLACED_CONTENT, "other")),
    ("content-truth", "auto"),
)
"""Condition and baseline; they isolate content and place of looks, missed evidence, drawings."""

AMONG = ("all", "called")
"""Which samples: all, or those on which the model called."""

_TOKENS = ("prompt", "appended", "generated", "llm")


def summarize(
    records: Sequence[Record],
    score: Score,
    *,
    split: str,
    split_version: int,
    condition: str,
    num_not_asked: int,
    num_waiting: int = 0,
    chances: Sequence[float | None] = (),
    data_hash: str = "",
) -> dict[str, Any]:
    """Summarise one split under one condition, as an entry of ``results.json``.

    Failures enter no mean; ``n`` counts them. ``num_not_asked`` counts samples that the condition
    does not fit, such as ``truth`` without evidence; ``num_waiting`` counts those that an
    interrupted run has not asked yet. ``chances`` are the expected scores of random guesses on the
    scored samples; their mean is reported if each is defined.
    """
    answered = [record for record in records if record.error is None]
    errors = [(record, record.error) for record in records if record.error is not None]
    kinds = [error["kind"] for _, error in errors]
    traces = [record.trace for record in answered if record.trace]
    groups = {record.group for record in answered if record.group and score.name in record.scores}
    return {
        "split": split,
        "version": split_version,
        "score": score.name,
        "condition": condition,
        "n": len(records),
        "not_asked": num_not_asked,
        "waiting": num_waiting,
        "data_hash": data_hash,
        "chance": _chance(chances),
        "failures": {kind: kinds.count(kind) for kind in ERRORS},
        "first_failure": f"{errors[0][0].id}: {errors[0][1]['message']}" if errors else None,
        "scores": {
            name: _interval(answered, name)
            for name in dict.fromkeys(name for record in answered for name in record.scores)
        },
        "aggregate": dict(score.aggregate(answered)) if answered else {},
        "called": _mean([record.num_calls > 0 for record in answered]),
        "tokens": {key: sum(t["counts"][f"{key}_tokens"] for t in traces) for key in _TOKENS},
        "milliseconds": _mean([trace["timings"]["total"] for trace in traces]),
        "per_solved": _per_solved(answered, score.name),
        "groups": {
            group: _interval([r for r in answered if r.group == group], score.name)
            for group in sorted(groups)
        },
    }


def _per_solved(answered: Sequence[Record], score: str) -> dict[str, float] | None:
    """Tokens that the LLM read and milliseconds, per sample solved; ``None`` if none was.

    A score between 0 and 1 counts as so much of a solved sample.
    """
    scored = [r for r in answered if r.trace is not None and score in r.scores]
    if not (solved := sum(max(record.scores[score], 0.0) for record in scored)):
        return None
    traces = [record.trace for record in scored if record.trace is not None]
    return {
        "tokens": sum(map(_tokens_read, traces)) / solved,
        "milliseconds": sum(trace["timings"]["total"] for trace in traces) / solved,
    }


def _tokens_read(trace: Mapping[str, Any]) -> float:
    """Tokens that the LLM read for a sample.

    What was read for an earlier request counts as well: it depends on the order of samples.
    """
    counts = trace["counts"]
    return float(counts["llm_tokens"] + counts.get("reused_tokens", 0))


def totals(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Tokens of a whole run, from the entries of :func:`summarize`."""
    return {key: sum(entry["tokens"][key] for entry in entries) for key in _TOKENS}


def _interval(records: Sequence[Record], name: str) -> dict[str, float]:
    """Of a score that at least one of the records has."""
    return mean_interval([r.scores[name] for r in records if name in r.scores]).to_dict()


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _chance(chances: Sequence[float | None]) -> float | None:
    defined = [chance for chance in chances if chance is not None]
    return _mean(defined) if len(defined) == len(chances) else None


Cost = dict[str, float | None]
"""Mean cost of a sample: ``mean``, ``baseline_mean``, ``difference``, ``ratio`` (``None`` by 0)."""


@dataclass(frozen=True)
class ToolValue:
    """Benefit and cost of a condition against a baseline, on the same samples of a split.

    Attributes:
        among: one of `AMONG`. A sample counts as called by the run with the model's own calls,
            which is ``auto`` where it is one of the two, else the condition.
        n: pairs.
        unpaired: samples left out: absent, in error or without the score under either of the two.
        difference: mean of score minus baseline's score; like `test`, `tokens` and `milliseconds`
            ``None`` without pairs.
        num_better: pairs whose score is higher than the baseline's.
        num_called: pairs on which the condition made a call.
        tokens: read by the LLM.
        milliseconds: from start to stop, of a run that may have shared the machine with others of
            its batch.
    """

    split: str
    score: str
    condition: str
    baseline: str
    among: str
    n: int
    unpaired: int
    difference: Interval | None = None
    test: PairedTest | None = None
    num_better: int = 0
    num_worse: int = 0
    num_called: int = 0
    tokens: Cost | None = None
    milliseconds: Cost | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable content, with shares of the pairs: gain, harm and calls."""
        counts = {"better": self.num_better, "worse": self.num_worse, "called": self.num_called}
        return {
            **dataclasses.asdict(self),
            **{f"{name}_share": num / self.n if self.n else None for name, num in counts.items()},
        }


class _Outcome(NamedTuple):
    """The part of a record that is compared."""

    score: float
    called: bool
    tokens: float
    milliseconds: float


_Outcomes = dict[str, dict[str, _Outcome | None]]  # condition -> sample -> outcome, None in error


def tool_value(
    records: Iterable[Record], scores: Mapping[str, str] | None = None
) -> list[ToolValue]:
    """Compare conditions with each other, split by split, as far as there are records of both.

    Every condition is compared with ``none``, and the pairs of `CONTENT_PAIRS` with each other;
    each over all samples and over those on which the model called. ``scores`` names the score of
    each split; the default is the first of its records.
    """
    splits: dict[str, _Outcomes] = defaultdict(lambda: defaultdict(dict))
    names = dict(scores or {})
    for record in records:
        if record.scores:
            names.setdefault(record.split, next(iter(record.scores)))
        outcome = _outcome(record, names.get(record.split, ""))
        splits[record.split][record.condition][record.id] = outcome
    return [
        _compare(split, names.get(split, ""), conditions, pair, among)
        for split, conditions in splits.items()
        for pair in _pairs(list(conditions))
        for among in AMONG
    ]


def _outcome(record: Record, score: str) -> _Outcome | None:
    if record.error is not None or record.trace is None or score not in record.scores:
        return None
    tokens, milliseconds = _tokens_read(record.trace), record.trace["timings"]["total"]
    return _Outcome(record.scores[score], record.num_calls > 0, tokens, milliseconds)


def _pairs(present: Sequence[str]) -> list[tuple[str, str]]:
    against_none = [(name, BASELINE) for name in present if name != BASELINE]
    content = [pair for pair in CONTENT_PAIRS if set(pair) <= set(present)]
    return [*(against_none if BASELINE in present else []), *content]


def _compare(
    split: str, score: str, outcomes: _Outcomes, pair: tuple[str, str], among: str
) -> ToolValue:
    condition, baseline = pair
    ours, theirs = outcomes[condition], outcomes[baseline]
    callers = theirs if baseline == OWN_CALLS else ours
    ids = sorted({*ours, *theirs})
    if among == "called":
        ids = [i for i in ids if (caller := callers.get(i)) is not None and caller.called]
    found = [(ours.get(i), theirs.get(i)) for i in ids]
    pairs = [(a, b) for a, b in found if a is not None and b is not None]
    value = ToolValue(split, score, condition, baseline, among, len(pairs), len(ids) - len(pairs))
    if not pairs:
        return value
    first, second = [a.score for a, _ in pairs], [b.score for _, b in pairs]

    return dataclasses.replace(
        value,
        difference=difference_interval(first, second),
        test=paired_test(first, second),
        num_better=sum(a.score > b.score for a, b in pairs),
        num_worse=sum(a.score < b.score for a, b in pairs),
        num_called=sum(a.called for a, _ in pairs),
        tokens=_cost([(a.tokens, b.tokens) for a, b in pairs]),
        milliseconds=_cost([(a.milliseconds, b.milliseconds) for a, b in pairs]),
    )


def _cost(pairs: Sequence[tuple[float, float]]) -> Cost:
    mean, baseline = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    ratio = mean / baseline if baseline > 0 else None
    means = {"mean": mean, "baseline_mean": baseline}
    return {**means, "difference": mean - baseline, "ratio": ratio}
