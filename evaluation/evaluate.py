"""A whole evaluation: ask splits under conditions, resume, score, summarise, write the report."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from vpt.errors import DataError, PromptError
from vpt.evaluation.records import Record, RunFolder
from vpt.evaluation.report import write_report
from vpt.evaluation.results import RESULTS_VERSION, summarize, tool_value, totals
from vpt.evaluation.runner import (
    TOOL_VALUE,
    Condition,
    Decoding,
    Task,
    Work,
    contents_of_others,
    find_conditions,
)
from vpt.evaluation.samples import BadRow, ImageRoots, Sample, hash_samples
from vpt.evaluation.scores.table import SCORES
from vpt.evaluation.splits import SPLITS, Split, find_split, read_split
from vpt.images import LoadedImage

if TYPE_CHECKING:
    from vpt.evaluation.judge_protocol import JudgeSettings


class Asker(Protocol):
    """Asks a model, wherever it runs."""

    def describe(self) -> Mapping[str, Any]:
        """``model``: what it is; ``surroundings``: code, libraries and machine.

        ``finders``, if known: names of its detector and segmenter.
        """

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raise ``PromptError`` if the model lacks what a condition needs."""

    def ask(self, work: Sequence[Work], decoding: Decoding, batch_size: int) -> Iterator[Record]:
        """Records of all work, in the order in which they end; see ``vpt.evaluation.runner``."""


@dataclass(frozen=True)
class PlannedSplit:
    """A split with its samples, in the order of the file."""

    split: Split
    samples: tuple[Sample | BadRow, ...]


@dataclass(frozen=True)
class Plan:
    """Splits, each of which is asked under every condition."""

    splits: tuple[PlannedSplit, ...]
    conditions: tuple[Condition, ...]


def make_plan(
    *,
    splits: Sequence[str],
    conditions: Sequence[str],
    data: Path,
    image_roots: Sequence[str] = (),
    limit: int | None = None,
) -> Plan:
    """Look up and read all that is to be asked, so that mistakes show before a model is loaded.

    Args:
        splits: names, or files as :func:`vpt.evaluation.splits.find_split` takes them.
        conditions: names; ``tool-value`` stands for those of :data:`TOOL_VALUE`.
        data: folder of the splits' files.
        image_roots: ``FROM=TO`` each.
        limit: rows per split.
    """
    names = [n for name in conditions for n in (TOOL_VALUE if name == "tool-value" else (name,))]
    found = find_conditions(names)
    roots = ImageRoots.parse(image_roots)
    planned = []
    for split in [find_split(name, data) for name in dict.fromkeys(splits)]:
        samples = tuple(read_split(split, data, roots))[:limit]
        if not samples:
            raise DataError(f"{split.name} has no rows")
        _check_one_kind(split, samples)
        planned.append(PlannedSplit(split, samples))
    return Plan(tuple(planned), tuple(found))


def _check_one_kind(split: Split, samples: Sequence[Sample | BadRow]) -> None:
    """One score is for all samples of a split; options need another than open questions."""
    with_choices = [bool(sample.choices) for sample in samples if isinstance(sample, Sample)]
    if with_choices and 0 < sum(with_choices) < len(with_choices):
        raise DataError(
            f"{split.name} has {sum(with_choices)} questions with choices and "
            f"{with_choices.count(False)} without, which are scored differently; put them in two "
            "files"
        )


def evaluate(
    asker: Asker,
    plan: Plan,
    decoding: Decoding,
    folder: RunFolder,
    *,
    batch_size: int = 8,
    resume: bool = True,
    judge: JudgeSettings | None = None,
) -> dict[str, Any]:
    """Ask what has no record yet, write results and report; return what ``results.json`` holds.

    ``resume`` says whether the folder may hold a part of this run; a ``judge`` scores the free-form
    splits. After Ctrl-C results and report contain the samples asked so far, and ``interrupted``
    in ``results.json`` is true; then ``KeyboardInterrupt`` is raised.

    Raises:
        DataError: if the folder cannot be written, is that of another run, or a run is using it.
        PromptError: if the model lacks what a condition needs, or there is nothing to judge.
        JudgeError: if the judge is down, or refuses the key or the model.
    """
    if judge is not None and not any(planned.split.judged for planned in plan.splits):
        names = ", ".join(name for name, split in SPLITS.items() if split.judged)
        raise PromptError(f"--judge is for free-form splits ({names}) and own files; leave it out")
    described = asker.describe()
    asker.check(plan.conditions)
    identity = {"model": described["model"], "decoding": dataclasses.asdict(decoding)}
    needed = set().union(*(one.finders for one in plan.conditions))
    if found := {name: described.get("finders", {}).get(name) for name in sorted(needed)}:
        identity["finders"] = found
    with folder.held():
        folder.start(identity, resume)
        clock = _Clock(folder)
        parts = [_SplitRun(split, how, folder) for split in plan.splits for how in plan.conditions]
        interrupted = _ask(asker, parts, decoding, batch_size, clock)
        judged = {} if interrupted else _judge(parts, judge, folder, clock)
        hashes = {split.split.name: hash_samples(split.samples) for split in plan.splits}
        entries = [part.summarize(hashes[part.key[0]], interrupted) for part in parts]
        records = [record for part in parts for record in part.records]
        scores = {entry["split"]: entry["score"] for entry in entries}
        results = {
            "version": RESULTS_VERSION,
            **identity,
            **described["surroundings"],
            "interrupted": interrupted,
            "date": clock.parts[0]["started"] if clock.parts else None,
            "seconds": sum(part["seconds"] for part in clock.parts),
            "parts": clock.parts,
            "tokens": totals(entries),
            "splits": entries,
            "tool_value": [value.to_dict() for value in tool_value(records, scores)],
            **judged,
        }
        folder.write_results(results)
        write_report(results, records, folder.path, open_photos=_photo_opener(plan))
    if interrupted:
        raise KeyboardInterrupt
    return results


def _photo_opener(plan: Plan) -> Callable[[Record], list[LoadedImage]]:
    """A function that opens the images of a record as its sample names them; a bad row has none."""
    images = {
        (planned.split.name, sample.id): sample.images
        for planned in plan.splits
        for sample in planned.samples
        if isinstance(sample, Sample)
    }
    return lambda record: [image.open() for image in images.get((record.split, record.id), ())]


class _Clock:
    """Wall-clock time of a run over all its parts, on disk at least once a second."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.parts = folder.read_parts()
        self._started = time.perf_counter()
        self._saved: float | None = None
        self._date = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def save(self, *, now: bool = False) -> None:
        """Store the time since the start of this part, unless that was done within a second."""
        seconds = time.perf_counter() - self._started
        if self._saved is None:
            self.parts.append({"started": self._date})
        elif not now and seconds - self._saved < 1:
            return
        self.parts[-1]["seconds"] = self._saved = seconds
        self.folder.write_parts(self.parts)


class _SplitRun:
    """A split under a condition, with the records it has so far."""

    def __init__(self, planned: PlannedSplit, condition: Condition, folder: RunFolder) -> None:
        split = planned.split
        self.planned = planned
        self.score = SCORES[split.score]
        self.key = (split.name, condition.name)
        self.file = folder.records(*self.key)
        others = contents_of_others(planned.samples) if condition.other_content else {}
        self.task = Task(
            split.name, condition, split.prompt, self.score, split.max_new_tokens, others
        )
        known = folder.read(*self.key)
        _check_unchanged(known, planned, folder)
        self.done = {s.id: known[s.id] for s in planned.samples if s.id in known}
        self.waiting = [sample for sample in planned.samples if sample.id not in known]
        self._total, self._num_scored, self._num_failed = 0.0, 0, 0  # for the bar
        for record in self.done.values():
            self._count(record)

    def add(self, record: Record) -> None:
        self.file.append(record.to_line())
        self.done[record.id] = record
        self._count(record)

    def _count(self, record: Record) -> None:
        self._num_failed += record.error is not None
        self._num_scored += self.score.name in record.scores
        self._total += record.scores.get(self.score.name, 0)

    @property
    def records(self) -> list[Record]:
        """In the order of the samples, whatever the order in which they ended."""
        return [self.done[s.id] for s in self.planned.samples if s.id in self.done]

    def summarize(self, data_hash: str, interrupted: bool) -> dict[str, Any]:
        """The entry in ``results.json``."""
        split, condition = self.key
        samples = [s for s in self.planned.samples if isinstance(s, Sample) and s.id in self.done]
        scored = [s for s in samples if self.score.name in self.done[s.id].scores]
        missing = len(self.planned.samples) - len(self.done)
        return summarize(
            self.records,
            self.score,
            split=split,
            split_version=self.planned.split.version,
            condition=condition,
            num_not_asked=0 if interrupted else missing,
            num_waiting=missing if interrupted else 0,
            chances=[self.score.chance(sample) for sample in scored],
            data_hash=data_hash,
        )

    def score_so_far(self) -> str:
        """Text for the progress bar."""
        words = [" ".join(self.key)]
        if self._num_scored:
            words.append(f"{self.score.name} {self._total / self._num_scored:.3f}")
        if self._num_failed:
            words.append(f"failed {self._num_failed}")
        return ", ".join(words)


def _ask(
    asker: Asker, parts: Sequence[_SplitRun], decoding: Decoding, batch_size: int, clock: _Clock
) -> bool:
    """Ask what is waiting; each record is on disk before the next is asked for.

    Returns whether Ctrl-C ended it.
    """
    part_of = {part.key: part for part in parts}
    bar = tqdm(
        total=sum(len(part.planned.samples) for part in parts),
        initial=sum(len(part.done) for part in parts),
        unit="sample",
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )
    work = [Work(part.task, tuple(part.waiting)) for part in parts if part.waiting]
    try:
        for record in asker.ask(work, decoding, batch_size):
            part = part_of[record.split, record.condition]
            part.add(record)
            clock.save()
            bar.update()
            bar.set_postfix_str(part.score_so_far(), refresh=False)
        bar.total = bar.n  # some samples do not fit their condition
    except KeyboardInterrupt:
        clock.save(now=True)
        return True
    finally:
        bar.close()
        for part in parts:
            part.file.close()
    if work:
        clock.save(now=True)
    return False


def _judge(
    parts: Sequence[_SplitRun], settings: JudgeSettings | None, folder: RunFolder, clock: _Clock
) -> dict[str, Any]:
    """Have the free-form splits judged; the scores go into the parts, not into their files."""
    if settings is None:
        return {}
    from vpt.evaluation.judge import judge_records

    records = [r for part in parts if part.planned.split.judged for r in part.records]
    scored, summary, unscored = judge_records(records, settings, folder.path / "judgements.jsonl")
    clock.save(now=True)
    part_of = {part.key: part for part in parts}
    for record in scored:
        part_of[record.split, record.condition].done[record.id] = record
    return {"judge": summary, "unscored": unscored}


def _check_unchanged(known: Mapping[str, Record], planned: PlannedSplit, folder: RunFolder) -> None:
    for sample in planned.samples:
        record = known.get(sample.id)
        answers = () if isinstance(sample, BadRow) else sample.answers
        if record is not None and record.error is None and record.answers != answers:
            raise DataError(
                f"{folder.path} holds records of another {planned.split.name}: sample {sample.id} "
                f"had the answers {list(record.answers)}, now {list(answers)}; choose another --out"
            )
