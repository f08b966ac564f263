"""Checks of evaluation splits: problems that would spoil a run, found before it is started."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vpt.boxes import check_box_px
from vpt.data.check import Report
from vpt.data.checks import FINDINGS, Finding, known_tokens
from vpt.data.rows import ImageFacts, measure_images
from vpt.errors import DataError, ImageError, RegionError
from vpt.evaluation.samples import BadRow, ImageRef, ImageRoots, Sample
from vpt.evaluation.scores.table import SCORES
from vpt.evaluation.splits import (
    SPLITS,
    Split,
    existing_file,
    find_split,
    guess_format,
    is_path,
    read_rows_of,
)
from vpt.images import load_image
from vpt.protocol.calls import find_symbols
from vpt.protocol.tokens import find_content

Watch = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""``(items, how many, what)`` -> the same items, while progress is shown."""

SPLIT_FINDINGS = {
    "bad-row": "a row of which no sample can be made",
    "duplicate-id": "the id of a row before it",
    "control-token": "a control token in a question or choice; models refuse to be asked so",
    "unscorable": "an answer that the split's score cannot use",
    "missing-image": "an image file that is not there; --images says where they are",
    "unreadable-image": FINDINGS["unreadable-image"],
    "box-outside": "a box of the evidence that reaches out of the first image",
}
"""Kinds of findings in splits that are not released rows, in the order of the report."""

_KNOWN = known_tokens()
_TOKENS = {*_KNOWN.writable, *_KNOWN.reserved}


@dataclass
class SplitReport(Report):
    """Findings in a split."""

    num_images: int = 0  # that were opened
    num_left: int = 0  # rows that were not checked


@dataclass(frozen=True)
class CheckTarget:
    """A target of ``vpt data check``.

    Attributes:
        findings: kinds of findings, with the meaning of each.
        find_image: path in a row, without crop suffix -> path of the file.
        check: ``(limit, open_images, ignored, watch)`` -> report; ``None`` for released rows,
            which ``vpt data check`` checks itself.
    """

    file: Path
    findings: Mapping[str, str]
    find_image: Callable[[str], str]
    check: Callable[..., SplitReport] | None = None

    @classmethod
    def of_rows(cls, file: Path, images: ImageRoots) -> CheckTarget:
        """A file of released rows."""
        return cls(file, FINDINGS, lambda path: images.find(path, file.parent))

    @classmethod
    def of_split(cls, split: Split, file: Path, images: ImageRoots) -> CheckTarget:
        """A split, in whatever format."""
        rows = cls.of_rows(file, images)
        if split.format == "released":
            return rows
        return cls(file, SPLIT_FINDINGS, rows.find_image, partial(check_file, split, file, images))


def check_target(name: str, root: Path, images: Sequence[str]) -> CheckTarget | None:
    """Find the target of ``vpt data check``; ``None`` for a path that does not exist.

    ``name`` is a split, a file, or ``FORMAT:FILE``; ``root`` is the folder of data, ``images`` are
    values of ``--images``.

    Raises:
        PromptError: for an unknown name or format, or malformed ``--images``.
        DataError: if the file of a split is missing.
    """
    roots = ImageRoots.parse(images)
    file = existing_file(name, root)
    if name in SPLITS or not file.is_file():
        if name not in SPLITS and is_path(name):
            return None
        split = find_split(name, root)
        return CheckTarget.of_split(split, split.find_file(root), roots)
    if guess_format(file) in (None, "released"):  # rows, perhaps broken; for training too
        return CheckTarget.of_rows(file, replace(roots, root=roots.root or Path()))
    return CheckTarget.of_split(find_split(name, root), file, roots)


def check_file(
    split: Split,
    file: Path,
    images: ImageRoots,
    *,
    limit: int | None = None,
    open_images: bool = True,
    ignored: Iterable[str] = (),
    watch: Watch = lambda items, number, what: items,
) -> SplitReport:
    """Check the first ``limit`` rows of a split that is not of released rows.

    Without ``open_images`` neither images nor boxes are checked. ``ignored`` kinds of findings are
    left out. Raises ``DataError`` if the file cannot be read or is empty.
    """
    paths: dict[str, None] = {}
    num_all = 0
    for num_all, sample in enumerate(read_rows_of(split, file, images), 1):
        if limit is None or num_all <= limit:
            paths.update((source, None) for source in _sources(sample) if isinstance(source, str))
    if not num_all:
        raise DataError(f"{file} holds no rows")
    facts: dict[str, ImageFacts] = {}
    if open_images:
        facts = dict(watch(measure_images(paths, None), len(paths), "images"))
    report = SplitReport(num_images=len(facts))
    kept = [kind for kind in SPLIT_FINDINGS if kind not in ignored]
    found: dict[str, list[tuple[int | None, str]]] = {kind: [] for kind in kept}
    first_with: dict[str, int] = {}
    # Read again: rows may contain images, which are not kept in memory.
    for number, sample in enumerate(itertools.islice(read_rows_of(split, file, images), limit)):
        findings = []
        if (same := first_with.setdefault(sample.id, number)) != number:
            findings.append(Finding("duplicate-id", f"{sample.id} is the id of row {same}"))
        if isinstance(sample, BadRow):
            findings.append(Finding("bad-row", sample.problem.removeprefix(f"row {number}: ")))
        else:
            findings += _check(sample, split, facts, open_images)
        if open_images:
            report.num_images += sum(isinstance(source, bytes) for source in _sources(sample))
        findings = [finding for finding in findings if finding.kind in found]
        for finding in findings:
            found[finding.kind].append((number, finding.detail))
        report.num_rows += 1
        report.num_with_findings += bool(findings)
        report.row_kinds[_kind(sample)] += 1
    report.num_left = num_all - report.num_rows
    report.findings = {kind: entries for kind, entries in found.items() if entries}
    return report


def _check(
    sample: Sample, split: Split, facts: Mapping[str, ImageFacts], open_images: bool
) -> Iterator[Finding]:
    try:
        SCORES[split.score].per_sample("", sample)
    except DataError as exc:
        yield Finding("unscorable", str(exc))
    asked = "\n".join((sample.question, *sample.choices))
    for token in sorted({*_TOKENS.intersection(find_symbols(asked)), *find_content(asked)}):
        yield Finding("control-token", f"the question or a choice holds {token}")
    if not open_images:
        return
    measured = [_facts_of(image, facts) for image in sample.images]
    for one in measured:
        if one.size_wh is None:
            yield Finding("missing-image" if one.is_missing else "unreadable-image", one.problem)
    if sample.box is None or measured[0].size_wh is None:
        return
    try:
        check_box_px(sample.box, measured[0].size_wh)
    except RegionError as exc:
        yield Finding("box-outside", str(exc))


def _facts_of(image: ImageRef, facts: Mapping[str, ImageFacts]) -> ImageFacts:
    if isinstance(image.source, str):
        return facts[image.source]
    try:
        return ImageFacts(load_image(image.source).size_wh)
    except ImageError as exc:
        return ImageFacts(None, f"{image.name}: {exc}")


def _sources(sample: Sample | BadRow) -> list[str | bytes]:
    return [image.source for image in sample.images] if isinstance(sample, Sample) else []


def _kind(sample: Sample | BadRow) -> str:
    if isinstance(sample, BadRow):
        return "bad row"
    return "multiple choice" if sample.choices else "open question"
