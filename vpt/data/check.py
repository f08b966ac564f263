"""A doctor for data: runs every check over rows and keeps account. It changes nothing."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vpt.data.aurora.curriculum import EPOCH
from vpt.data.aurora.rows import TASKS, read_note
from vpt.data.call_checks import check_calls, check_crops
from vpt.data.content_checks import check_content, check_note
from vpt.data.findings import FINDINGS, Finding
from vpt.data.image_checks import check_boxes, check_columns, check_files, check_placeholders
from vpt.data.image_sizes import Images
from vpt.data.loading import Found
from vpt.data.row_view import RowView, image_paths, view_row
from vpt.data.turn_checks import KnownTokens, check_turns, known_tokens
from vpt.errors import DataError
from vpt.protocol.rows import KINDS
from vpt.protocol.tokens import BRANCH_TOKENS, RELEASED_GRID_SIZE

if TYPE_CHECKING:
    from vpt.data.lengths import RowLengths
    from vpt.model.config import VPTConfig
    from vpt.model.processing import VPTProcessor

_BROKEN = "broken"


@dataclass(frozen=True)
class ModelFacts:
    """What a model permits rows to be.

    Attributes:
        branches: re-encoding branches it has.
        cutoff_len: tokens a row may have; ``None`` for any number.
        lengths: counts them.
        added_tokens: of its tokenizer; ``None`` where they are not known.
    """

    branches: tuple[str, ...]
    cutoff_len: int | None
    lengths: RowLengths
    added_tokens: Collection[str] | None = None


class RowChecker:
    """Checks rows, one by one.

    Args:
        images: what is known of the files that rows name; empty where none was opened.
        grid_size: cells per side of the region grid.
        known: control tokens; by default those of VPT models.
        model: for checks that need one.
    """

    def __init__(
        self,
        images: Images,
        *,
        grid_size: int = RELEASED_GRID_SIZE,
        known: KnownTokens | None = None,
        model: ModelFacts | None = None,
    ) -> None:
        self.images = images
        self.grid_size = grid_size
        self.known = known or known_tokens(grid_size)
        self.model = model

    @classmethod
    def for_model(
        cls,
        images: Images,
        config: VPTConfig,
        processor: VPTProcessor,
        cutoff_len: int | None = None,
    ) -> RowChecker:
        """A checker that knows the tokens, branches and lengths of a model."""
        from vpt.data.lengths import RowLengths

        added = processor.tokenizer.get_added_vocab()
        return cls(
            images,
            grid_size=config.grid_size,
            known=known_tokens(config.grid_size, added),
            model=ModelFacts(config.branches, cutoff_len, RowLengths(config, processor), added),
        )

    def check(self, row: object) -> tuple[str, list[Finding]]:
        """Examine a row.

        Returns:
            What kind of row it is, and all that is wrong with it.
        """
        view = view_row(row, self.grid_size)
        if isinstance(view, Finding):
            paths = image_paths(row)
            files = [*check_files(paths, self.images), *check_boxes(paths, self.images)]
            return _BROKEN, [view, *files]
        assert isinstance(row, Mapping)  # or there would be no view
        task = _note_of(row).get("task")
        return TASKS[task] if task else view.kind, list(self._check_view(row, view))

    def _check_view(self, row: Mapping[str, Any], view: RowView) -> Iterator[Finding]:
        paths = [path for paths in view.images.values() for path in paths]
        yield from check_turns(view, self.known)
        yield from check_calls(view, self.known)
        added_tokens = None if self.model is None else self.model.added_tokens
        yield from check_content(view, added_tokens)
        yield from check_note(row, view)
        yield from check_columns(row)
        yield from check_placeholders(view)
        yield from check_files(paths, self.images)
        outside = list(check_boxes(paths, self.images))
        yield from outside
        if not outside:
            yield from check_crops(view, self.known, self.images, self.grid_size)
        if self.model is not None:
            yield from _check_branches(view, self.model)
            yield from _check_length(view, self.images, self.model)


@dataclass
class Report:
    """What checking rows brought.

    Attributes:
        num_rows: that were checked.
        num_with_findings: rows that have any.
        row_kinds: how many rows of each kind.
        findings: kind of finding -> ``(number of the row, counted from 0, detail)``; the number is
            ``None`` where the file as a whole is meant.
        epochs: of a curriculum: epoch -> task -> rows.
    """

    num_rows: int = 0
    num_with_findings: int = 0
    row_kinds: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[tuple[int | None, str]]] = field(default_factory=dict)
    epochs: dict[int, Counter[str]] = field(default_factory=dict)


def check_rows(
    rows: Iterable[object],
    checker: RowChecker,
    ignored: Iterable[str] = (),
    loading: Sequence[Found] = (),
) -> Report:
    """Check rows, and find those that come twice, as far as they are whole.

    Args:
        rows: as they stand in a file.
        checker: knows the files and the model.
        ignored: kinds of findings to leave out, keys of :data:`vpt.data.findings.FINDINGS`.
        loading: what :func:`vpt.data.loading.check_loading` found in the file.
    """
    report = Report()
    found: dict[str, list[tuple[int | None, str]]] = {kind: [] for kind in FINDINGS}
    of_rows: dict[int, list[Finding]] = {}
    for place, finding in loading:
        if place is not None:
            of_rows.setdefault(place, []).append(finding)
        elif finding.kind not in ignored:
            found[finding.kind].append((None, finding.detail))
    wanted = set(FINDINGS) - set(ignored)
    first_with: dict[bytes, int] = {}
    latest = 0  # epoch so far
    for number, row in enumerate(rows):
        row_kind, findings = checker.check(row)
        findings = [*of_rows.get(number, ()), *findings]
        same = number if row_kind == _BROKEN else first_with.setdefault(_digest(row), number)
        if same != number:
            findings.append(Finding("duplicate-row", f"the same as row {same}"))
        if row_kind != _BROKEN and isinstance(epoch := _note_of(row).get(EPOCH), int):
            if epoch < latest:
                findings.append(Finding("epoch-order", f"epoch {epoch} behind epoch {latest}"))
            latest = max(latest, epoch)
            report.epochs.setdefault(epoch, Counter())[_note_of(row)["task"]] += 1
        findings = [finding for finding in findings if finding.kind in wanted]
        for finding in findings:
            found[finding.kind].append((number, finding.detail))
        report.num_rows += 1
        report.num_with_findings += bool(findings)
        report.row_kinds[row_kind] += 1
    report.findings = {kind: entries for kind, entries in found.items() if entries}
    return report


def _digest(row: object) -> bytes:
    """Stands for what training sees of a row in an epoch: equal rows share it, and no others."""
    assert isinstance(row, Mapping)  # broken ones have no business here
    content = [row["messages"], *(row.get(kind.column) or [] for kind in KINDS.values())]
    content.append(_note_of(row).get(EPOCH))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def _note_of(row: object) -> Mapping[str, Any]:
    """The note of a row; empty if there is none that can be read, which is a finding elsewhere."""
    try:
        return read_note(row) if isinstance(row, Mapping) else {}
    except DataError:
        return {}


def _check_branches(view: RowView, model: ModelFacts) -> Iterator[Finding]:
    calls = {call.branch for turn in view.turns for call in turn.calls}
    has = ", ".join(BRANCH_TOKENS[branch].encoder for branch in model.branches) or "none"
    for branch, tokens in BRANCH_TOKENS.items():
        if branch not in model.branches and (branch in calls or view.images[branch]):
            yield Finding("missing-branch", f"the row wants {tokens.encoder}; the model has: {has}")


def _check_length(view: RowView, images: Images, model: ModelFacts) -> Iterator[Finding]:
    if model.cutoff_len is None:
        return
    num_tokens = model.lengths.num_tokens(view, images)
    if num_tokens is not None and num_tokens > model.cutoff_len:
        yield Finding("too-long", f"{num_tokens} tokens")
