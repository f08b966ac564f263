"""All checks over a file of rows, and the report of their findings. Nothing is changed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from vpt.data.checks import (
    FINDINGS,
    Finding,
    KnownTokens,
    RowView,
    check_boxes,
    check_calls,
    check_columns,
    check_crops,
    check_files,
    check_placeholders,
    check_turns,
    image_paths,
    known_tokens,
    view_row,
)
from vpt.data.content_checks import check_content, check_note
from vpt.data.content_rows import EPOCH, TASKS, read_note
from vpt.data.loading import Found
from vpt.data.rows import Images
from vpt.errors import DataError
from vpt.protocol.rows import KINDS, split_crop_suffix, write_placeholders, write_turns
from vpt.protocol.tokens import BRANCH_TOKENS, GROUND_START, GROUNDING, RELEASED_GRID_SIZE

if TYPE_CHECKING:
    from vpt.images import LoadedImage
    from vpt.model.config import VPTSettings
    from vpt.model.processing import VPTProcessor

_BROKEN = "broken"


class RowChecker:
    """Checks rows, one by one, and against a model if one is given.

    ``images`` is empty where no file was opened. The grid and the tokens are those of the model, or
    else given, or those of VPT models.
    """

    def __init__(
        self,
        images: Images,
        *,
        grid_size: int = RELEASED_GRID_SIZE,
        known: KnownTokens | None = None,
        model: ModelLimits | None = None,
    ) -> None:
        self.images = images
        self.grid_size = model.config.grid_size if model else grid_size
        self.known = known or known_tokens(self.grid_size, model.added_tokens if model else ())
        self.model = model

    def check(self, row: object) -> tuple[str, list[Finding]]:
        """Return the kind of a row, and all findings."""
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
        yield from check_content(view, None if self.model is None else self.model.added_tokens)
        yield from check_note(row, view)
        yield from check_columns(row)
        yield from check_placeholders(view)
        yield from check_files(paths, self.images)
        outside = list(check_boxes(paths, self.images))
        yield from outside
        if not outside:
            yield from check_crops(view, self.known, self.images, self.grid_size)
        if self.model is not None:
            yield from _check_model(view, self.images, self.model)


def _check_model(view: RowView, images: Images, model: ModelLimits) -> Iterator[Finding]:
    calls = {call.branch for turn in view.turns for call in turn.calls}
    has = ", ".join(BRANCH_TOKENS[branch].encoder for branch in model.config.branches) or "none"
    for branch, tokens in BRANCH_TOKENS.items():
        if branch not in model.config.branches and (branch in calls or view.images[branch]):
            yield Finding("missing-branch", f"the row uses {tokens.encoder}; the model has: {has}")
    if GROUNDING in calls and GROUND_START not in model.added_tokens:
        yield Finding("missing-branch", "the row calls for a phrase; give the model --grounding")
    num_tokens = None if model.cutoff_len is None else model.num_tokens(view, images)
    if num_tokens is not None and num_tokens > (model.cutoff_len or 0):
        yield Finding("too-long", f"{num_tokens} tokens")


@dataclass
class Report:
    """Result of checking rows.

    Attributes:
        findings: kind of finding -> ``(number of the row, counted from 0, detail)``; the number is
            ``None`` for findings about the file as a whole.
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
    """Check rows, and find duplicates among sound ones; ``loading`` is of `check_loading`."""
    report = Report()
    found: dict[str, list[tuple[int | None, str]]] = {kind: [] for kind in FINDINGS}
    of_rows: dict[int, list[Finding]] = {}
    for place, finding in loading:
        if place is None:
            found[finding.kind].append((None, finding.detail))
        else:
            of_rows.setdefault(place, []).append(finding)
    ignored = set(ignored)
    first_with: dict[bytes, int] = {}
    latest = 0  # epoch so far
    for number, row in enumerate(rows):
        row_kind, findings = checker.check(row)
        findings = [*of_rows.get(number, ()), *findings]
        if row_kind != _BROKEN:
            if (same := first_with.setdefault(_digest(row), number)) != number:
                findings.append(Finding("duplicate-row", f"the same as row {same}"))
            note = _note_of(row)
            if isinstance(epoch := note.get(EPOCH), int):
                if epoch < latest:
                    findings.append(Finding("epoch-order", f"epoch {epoch} after epoch {latest}"))
                latest = max(latest, epoch)
                report.epochs.setdefault(epoch, Counter())[note["task"]] += 1
        findings = [finding for finding in findings if finding.kind not in ignored]
        for finding in findings:
            found[finding.kind].append((number, finding.detail))
        report.num_rows += 1
        report.num_with_findings += bool(findings)
        report.row_kinds[row_kind] += 1
    report.findings = {k: entries for k, entries in found.items() if entries and k not in ignored}
    return report


def _digest(row: object) -> bytes:
    """Hash of what training reads of a row in an epoch."""
    assert isinstance(row, Mapping)  # broken ones are not compared
    content = [row["messages"], *(row.get(kind.column) or [] for kind in KINDS.values())]
    content.append(_note_of(row).get(EPOCH))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def _note_of(row: object) -> Mapping[str, Any]:
    """The note of a row; empty if there is none, or it is damaged, which `check_note` reports."""
    try:
        return read_note(row) if isinstance(row, Mapping) else {}
    except DataError:
        return {}


class ModelLimits:
    """What a model takes: its branches and tokens, and rows of at most ``cutoff_len`` tokens.

    Tokens are counted as `RowEncoder` makes them, from the sizes of images alone.
    """

    def __init__(
        self, config: VPTSettings, processor: VPTProcessor, cutoff_len: int | None = None
    ) -> None:
        from vpt.model.encoding import Pixels

        self.config, self.cutoff_len = config, cutoff_len
        self.added_tokens: Collection[str] = processor.tokenizer.get_added_vocab()
        self._encode_text = processor.encode_text
        self._num_image_tokens = cache(Pixels(config, processor, _open_none).num_tokens)

    def num_tokens(self, view: RowView, images: Images) -> int | None:
        """Number of tokens; ``None`` if the row cannot be encoded, or an image size is unknown."""
        num_beyond = 0  # tokens of images, except one each, which is in the text
        for kind, paths in view.images.items():
            if view.images_by_turn(kind) is None:
                return None
            if paths and kind not in ("image", *self.config.branches):
                return None
            for path in paths:
                if (size_wh := _size_wh(path, images)) is None:
                    return None
                num_beyond += self._num_image_tokens(kind, size_wh) - 1
        ones = {kind: [1] * len(paths) for kind, paths in view.images.items()}
        asked = write_placeholders([turn.asked for turn in view.turns], ones)
        written = write_turns(view.system, asked, [turn.answered for turn in view.turns])
        texts = [text for pair in written for text in pair]
        return num_beyond + sum(len(self._encode_text(text).ids) for text in texts)


def _open_none(path: str) -> LoadedImage:
    raise AssertionError(f"{path} is counted by its size")


def _size_wh(path: str, images: Images) -> tuple[int, int] | None:
    plain, box = split_crop_suffix(path)
    if box is not None:
        size_wh = box[2] - box[0], box[3] - box[1]
        return size_wh if min(size_wh) > 0 else None
    facts = images.get(plain)
    return None if facts is None else facts.size_wh
