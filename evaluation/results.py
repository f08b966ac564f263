"""Numbers of a run: a summary per split and condition, and whether looking again helps."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpt.evaluation.intervals import (
    Interval,
    PairedTest,
    difference_interval,
    mean_interval,
    paired_test,
)
from vpt.evaluation.records import ERRORS, Record
from vpt.evaluation.scores.table import Score

RESULTS_VERSION = 1


def summarize(
    records: Sequence[Record],
    score: Score,
    *,
    split: str,
    split_version: int,
    condition: str,
    num_not_asked: int,
) -> dict[str, Any]:
    """Sum up one split under one condition.

    Args:
        records: of it.
        score: that its answers have.
        split: name.
        split_version: of its prompt and score.
        condition: name.
        num_not_asked: samples that cannot be asked so, such as ``truth`` without evidence.

    Returns:
        As it stands in ``results.json``. Failures are in no mean; ``n`` counts them.
    """
    answered = [record for record in records if record.error is None]
    errors = [(record, record.error) for record in records if record.error is not None]
    kinds = [error["kind"] for _, error in errors]
    names = dict.fromkeys(name for record in answered for name in record.scores)
    return {
        "split": split,
        "version": split_version,
        "score": score.name,
        "condition": condition,
        "n": len(records),
        "not_asked": num_not_asked,
        "failures": {kind: kinds.count(kind) for kind in ERRORS},
        "first_failure": f"{errors[0][0].id}: {errors[0][1]['message']}" if errors else None,
        "scores": {name: _interval(answered, name).to_dict() for name in names},
        "aggregate": dict(score.aggregate(answered)) if answered else {},
        "called": _share(sum(record.num_calls > 0 for record in answered), len(answered)),
        "tokens": _tokens(answered),
        "milliseconds": _mean([r.trace["timings"]["total"] for r in answered if r.trace]),
        "groups": _groups(answered, score.name),
    }


def totals(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Tokens of a whole run.

    Args:
        entries: made by :func:`summarize`.
    """
    keys = ("prompt", "appended", "generated", "llm")
    return {key: sum(entry["tokens"][key] for entry in entries) for key in keys}


def _interval(records: Sequence[Record], name: str) -> Interval:
    """Of a score that at least one of the records has."""
    return mean_interval([record.scores[name] for record in records if name in record.scores])


def _groups(records: Sequence[Record], name: str) -> dict[str, dict[str, float]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.group and name in record.scores:
            groups[record.group].append(record)
    return {group: _interval(groups[group], name).to_dict() for group in sorted(groups)}


def _tokens(records: Sequence[Record]) -> dict[str, int]:
    counts = [record.trace["counts"] for record in records if record.trace]
    return {
        key: sum(count[f"{key}_tokens"] for count in counts)
        for key in ("prompt", "appended", "generated", "llm")
    }


def _share(part: int, total: int) -> float | None:
    return part / total if total else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


BASELINE = "none"
OWN_CALLS = "auto"
CONTENT_PAIRS = (("auto", "blank"), ("auto", "random"), ("truth", "auto"))
"""Condition and what it is set against: does the content help, does the place, what is missing."""

AMONG = ("all", "called")
"""Which samples: all, or those on which the model called."""


@dataclass(frozen=True)
class Cost:
    """What a sample costs under a condition and its baseline.

    Attributes:
        mean: per sample, under the condition.
        baseline_mean: likewise, under the baseline.
    """

    mean: float
    baseline_mean: float

    @property
    def difference(self) -> float:
        """What the condition costs more, per sample."""
        return self.mean - self.baseline_mean

    @property
    def ratio(self) -> float | None:
        """How many times the baseline's cost; ``None`` if that is nothing."""
        return self.mean / self.baseline_mean if self.baseline_mean > 0 else None

    def to_dict(self) -> dict[str, float | None]:
        """JSON-serialisable content."""
        derived = {"difference": self.difference, "ratio": self.ratio}
        return {**dataclasses.asdict(self), **derived}


@dataclass(frozen=True)
class ToolValue:
    """What a condition brings and costs against a baseline, on the same samples of a split.

    Attributes:
        split: name.
        score: name.
        condition: name.
        baseline: name of the condition it is set against.
        among: one of `AMONG`. A sample counts as called by the run with the model's own calls,
            which is ``auto`` where it is one of the two, else the condition.
        n: pairs.
        unpaired: samples left out: absent, in error or without the score under either of the two.
        difference: mean of score minus baseline's score; ``None`` without pairs.
        test: of "equally good"; ``None`` without pairs.
        num_better: pairs whose score is higher than the baseline's.
        num_worse: pairs whose score is lower.
        num_called: pairs on which the condition made a call.
        tokens: read by the LLM; ``None`` without pairs.
        milliseconds: from start to stop, of a run that may have shared the machine with others of
            its batch; ``None`` without pairs.
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

    @property
    def better_share(self) -> float | None:
        """Gain: share of pairs that became better."""
        return self.num_better / self.n if self.n else None

    @property
    def worse_share(self) -> float | None:
        """Harm: share of pairs that became worse."""
        return self.num_worse / self.n if self.n else None

    @property
    def called_share(self) -> float | None:
        """Share of pairs on which the condition made a call."""
        return self.num_called / self.n if self.n else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable content."""
        shares = {
            "better_share": self.better_share,
            "worse_share": self.worse_share,
            "called_share": self.called_share,
        }
        costs = {
            name: cost.to_dict() if cost else None
            for name, cost in (("tokens", self.tokens), ("milliseconds", self.milliseconds))
        }
        return {**dataclasses.asdict(self), **shares, **costs}


@dataclass(frozen=True)
class _Outcome:
    """What of a record counts here."""

    score: float
    called: bool
    tokens: float
    milliseconds: float


_Outcomes = dict[str, dict[str, _Outcome | None]]  # condition -> sample -> outcome, None in error


def tool_value(
    records: Iterable[Record], scores: Mapping[str, str] | None = None, *, seed: int = 0
) -> list[ToolValue]:
    """Set conditions against each other, split by split, as far as there are records of both.

    Every condition is set against ``none``, and the pairs of `CONTENT_PAIRS` against each other;
    each over all samples and over those on which the model called.

    Args:
        records: in any order; gone through once.
        scores: split -> name of the score to compare; by default the first of each split's
            records.
        seed: of the resampling.
    """
    splits: dict[str, _Outcomes] = defaultdict(lambda: defaultdict(dict))
    names = dict(scores or {})
    for record in records:
        if record.scores:
            names.setdefault(record.split, next(iter(record.scores)))
        outcome = _outcome(record, names.get(record.split, ""))
        splits[record.split][record.condition][record.id] = outcome
    return [
        _compare(split, names.get(split, ""), conditions, pair, among, seed)
        for split, conditions in splits.items()
        for pair in _pairs(conditions)
        for among in AMONG
    ]


def _outcome(record: Record, score: str) -> _Outcome | None:
    if record.error is not None or record.trace is None or score not in record.scores:
        return None
    return _Outcome(
        score=record.scores[score],
        called=record.num_calls > 0,
        tokens=record.trace["counts"]["llm_tokens"],
        milliseconds=record.trace["timings"]["total"],
    )


def _pairs(conditions: Iterable[str]) -> list[tuple[str, str]]:
    present = list(conditions)
    against_none = [(name, BASELINE) for name in present if name != BASELINE]
    content = [pair for pair in CONTENT_PAIRS if set(pair) <= set(present)]
    return [*(against_none if BASELINE in present else []), *content]


def _compare(
    split: str, score: str, outcomes: _Outcomes, pair: tuple[str, str], among: str, seed: int
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
    return _measured(value, pairs, seed) if pairs else value


def _measured(value: ToolValue, pairs: Sequence[tuple[_Outcome, _Outcome]], seed: int) -> ToolValue:
    first, second = [a.score for a, _ in pairs], [b.score for _, b in pairs]

    def cost(name: str) -> Cost:
        ours, theirs = (sum(getattr(pair[side], name) for pair in pairs) for side in (0, 1))
        return Cost(ours / len(pairs), theirs / len(pairs))

    return dataclasses.replace(
        value,
        difference=difference_interval(first, second, seed=seed),
        test=paired_test(first, second, seed=seed),
        num_better=sum(a.score > b.score for a, b in pairs),
        num_worse=sum(a.score < b.score for a, b in pairs),
        num_called=sum(a.called for a, _ in pairs),
        tokens=cost("tokens"),
        milliseconds=cost("milliseconds"),
    )
