"""Numbers of a run, summed up from its records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from vpt.evaluation.intervals import Interval, mean_interval
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
