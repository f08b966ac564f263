"""Comparison of two runs: fixed and broken samples, and the test of the difference."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpt.errors import DataError
from vpt.evaluation.intervals import Interval, PairedTest, difference_interval, paired_test
from vpt.evaluation.records import Record, RunFolder
from vpt.evaluation.table import aligned
from vpt.protocol.tokens import canonical_mode
from vpt.view.wording import printable

RIGHT_SCORE = 0.5
"""From this score on an answer counts as right; graded scores are cut here."""

_FATES = ("fixed", "broken", "both_right", "both_wrong")
_SETTINGS = (
    "model",
    "decoding",
    "seed",
    "judge",
    "git_commit",
    "python",
    "libraries",
    "device",
    "hardware",
)

TaskKey = tuple[str, str]
"""Split and condition."""


@dataclass(frozen=True)
class SplitComparison:
    """A split under a condition, in both runs; means are over the pairs.

    Attributes:
        score: name of the score that decides.
        difference: mean of B minus A.
        fixed: ids of samples that only the second run got right.
        broken: ids of samples that only the first run got right.
        unpaired: samples left out: absent, in error or without the score in one of the runs.
        num_changed: samples left out because their images or accepted answers differ.
    """

    split: str
    condition: str
    score: str
    mean_a: float
    mean_b: float
    difference: Interval
    test: PairedTest
    fixed: tuple[str, ...]
    broken: tuple[str, ...]
    both_right: tuple[str, ...]
    both_wrong: tuple[str, ...]
    unpaired: int
    num_changed: int

    @property
    def n(self) -> int:
        """Pairs."""
        return self.difference.n


@dataclass(frozen=True)
class SamplePair:
    """A sample that both runs scored: the name of the score, and its record in each run."""

    score: str
    a: Record
    b: Record

    @property
    def fate(self) -> str:
        """``"fixed"``, ``"broken"``, ``"both_right"`` or ``"both_wrong"``."""
        was_right, is_right = (r.scores[self.score] >= RIGHT_SCORE for r in (self.a, self.b))
        if was_right == is_right:
            return "both_right" if is_right else "both_wrong"
        return "fixed" if is_right else "broken"


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        splits: one row per split and condition that both have.
        settings: name, value in A and value in B of those that differ.
        left_out: what could not be compared, in words.
    """

    name_a: str
    name_b: str
    splits: tuple[SplitComparison, ...]
    settings: tuple[tuple[str, str, str], ...]
    left_out: tuple[str, ...]
    changed: tuple[SamplePair, ...] = field(repr=False)

    def table(self) -> str:
        """Plain text for a terminal."""
        head = ["split", "condition", "score", "n", "A", "B", "B-A", "95% interval", "p"]
        rows = [[*head, "fixed", "broken", "both right", "both wrong", "unpaired", "other data"]]
        rows += [_cells(row) for row in self.splits]
        lines = [f"A: {self.name_a}", f"B: {self.name_b}", "", *aligned(rows, num_left=3), ""]
        lines += ["p is not corrected for the number of rows."]
        lines += [f"not compared: {words}" for words in self.left_out]
        if self.settings:
            lines += ["", *aligned([("differs", "A", "B"), *self.settings], num_left=3)]
        return "\n".join(map(printable, lines))


def compare(
    results_a: Mapping[str, Any],
    records_a: Iterable[Record],
    results_b: Mapping[str, Any],
    records_b: Iterable[Record],
) -> Comparison:
    """Compare two runs (``results.json`` and records) over the samples that both scored.

    Raises:
        DataError: if the runs have no scored sample in common.
    """
    scores_a, scores_b = _main_scores(results_a), _main_scores(results_b)
    first, second = _scored(records_a, scores_a), _scored(records_b, scores_b)
    left_out: list[str] = []
    rows: list[SplitComparison] = []
    changed: list[SamplePair] = []
    for task in dict.fromkeys([*scores_a, *scores_b]):
        split, condition = task
        if task not in scores_a or task not in scores_b:
            only = "A" if task in scores_a else "B"
            left_out.append(f"{split} under {condition}: only in {only}")
        elif (score := scores_a[task]) != scores_b[task]:
            left_out.append(
                f"{split} under {condition}: scored by {score} in A, by {scores_b[task]} in B"
            )
        else:
            pairs, *left = _pair_up(score, first[task], second[task])
            if not pairs:
                left_out.append(f"{split} under {condition}: no sample scored in both")
                continue
            rows.append(_row(task, score, pairs, *left))
            changed += [pair for pair in pairs if pair.fate in ("fixed", "broken")]
    name_a, name_b = results_a["model"]["name"], results_b["model"]["name"]
    if not rows:
        raise DataError(
            f"the runs of {name_a} and {name_b} have no scored sample in common "
            f"({'; '.join(left_out) or 'neither has any'}); compare runs of the same splits and "
            "conditions"
        )
    settings = tuple(_differing_settings(results_a, results_b))
    return Comparison(name_a, name_b, tuple(rows), settings, tuple(left_out), tuple(changed))


def compare_folders(a: Path, b: Path) -> Comparison:
    """Compare the runs of two folders; they are named by model and folder."""
    run_a, run_b = RunFolder(a), RunFolder(b)
    results_a, results_b = run_a.read_results(), run_b.read_results()
    found = compare(results_a, run_a.read_all(), results_b, run_b.read_all())
    name_a, name_b = f"{found.name_a} ({a})", f"{found.name_b} ({b})"
    return dataclasses.replace(found, name_a=name_a, name_b=name_b)


def _pair_up(
    score: str, a: Mapping[str, Record | None], b: Mapping[str, Record | None]
) -> tuple[list[SamplePair], int, int]:
    """Samples that both runs scored; how many only one did; how many differ in their data."""
    pairs = []
    unpaired = num_changed = 0
    for id in sorted({*a, *b}):
        first, second = a.get(id), b.get(id)
        if first is None or second is None:
            unpaired += 1
        elif _data_of(first) != _data_of(second):
            num_changed += 1
        else:
            pairs.append(SamplePair(score, first, second))
    return pairs, unpaired, num_changed


def _row(
    task: TaskKey, score: str, pairs: Sequence[SamplePair], unpaired: int, num_changed: int
) -> SplitComparison:
    values_a = [pair.a.scores[score] for pair in pairs]
    values_b = [pair.b.scores[score] for pair in pairs]
    ids: dict[str, Any] = dict.fromkeys(_FATES, ())
    for pair in pairs:
        ids[pair.fate] += (pair.a.id,)
    return SplitComparison(
        *task,
        score=score,
        mean_a=sum(values_a) / len(values_a),
        mean_b=sum(values_b) / len(values_b),
        difference=difference_interval(values_b, values_a),
        test=paired_test(values_b, values_a),
        **ids,
        unpaired=unpaired,
        num_changed=num_changed,
    )


def _main_scores(results: Mapping[str, Any]) -> dict[TaskKey, str]:
    entries = results["splits"]
    return {(one["split"], canonical_mode(one["condition"])): one["score"] for one in entries}


def _scored(
    records: Iterable[Record], scores: Mapping[TaskKey, str]
) -> Mapping[TaskKey, Mapping[str, Record | None]]:
    """Task -> id -> record, ``None`` if it lacks the task's score."""
    found: dict[TaskKey, dict[str, Record | None]] = defaultdict(dict)
    for record in records:
        task = record.split, record.condition
        is_scored = record.error is None and scores.get(task) in record.scores
        if record.trace is not None:  # both runs are held in memory: leave out the longest part
            record = dataclasses.replace(record, trace={**record.trace, "tokens": []})
        found[task][record.id] = record if is_scored else None
    return found


def _data_of(record: Record) -> tuple[Any, ...]:
    """What must be equal for two records to be of one sample; prompts may differ."""
    images = record.trace["images"] if record.trace else []
    digests = [image["digest"] for image in images if image["parent"] is None]
    return record.answers, digests


def _cells(row: SplitComparison) -> list[str]:
    return [
        *(row.split, row.condition, row.score, str(row.n)),
        *(f"{row.mean_a:.3f}", f"{row.mean_b:.3f}", f"{row.difference.mean:+.3f}"),
        f"{row.difference.low:+.3f} to {row.difference.high:+.3f}",
        "<0.001" if row.test.p_value < 0.001 else f"{row.test.p_value:.3f}",
        *(str(len(getattr(row, fate))) for fate in _FATES),
        *(str(row.unpaired), str(row.num_changed)),
    ]


def _differing_settings(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Model, decoding, code, libraries, machine, and versions of splits, where they differ."""
    first, second = dict(_flat(a)), dict(_flat(b))
    for name in dict.fromkeys([*first, *second]):
        value_a, value_b = (of.get(name, "(not recorded)") for of in (first, second))
        if value_a != value_b:
            yield name, value_a, value_b


def _flat(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and words of all that may change a result."""
    for name in filter(results.__contains__, _SETTINGS):
        yield from _flat_value(name, results[name])
    for entry in results["splits"]:
        for key, words in (("version", "version"), ("data_hash", "data")):
            if key in entry:
                yield f"{words} of {entry['split']}", str(entry[key])


def _flat_value(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat_value(f"{name} {key}", inner)
    else:
        yield name.replace("_", " "), str(value)
