"""The annealing mixture: epochs with decreasing shares of the atomic task, in one file.

Aurora (arXiv 2412.03548, section 4.2) starts with perception content alone and continues with
reasoning over it. The order of the file is the curriculum: training reads it once, unshuffled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vpt.data.content_rows import ATOMIC_TASKS, EPOCH, TASKS, read_note, with_note
from vpt.data.making import path_from
from vpt.data.rows import Row, read_entries
from vpt.errors import DataError
from vpt.media import is_url
from vpt.protocol.rows import KINDS


@dataclass(frozen=True)
class Annealing:
    """Shares of the atomic task, which decrease from epoch to epoch by equal steps."""

    num_epochs: int = 10
    first_share: float = 1.0
    last_share: float = 0.1

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise DataError(f"expected at least 1 epoch, got {self.num_epochs}")
        if not 0 <= self.last_share <= self.first_share <= 1:
            raise DataError(
                "expected shares of 1 to 0 that do not increase, "
                f"got {self.first_share:g} to {self.last_share:g}"
            )

    def shares(self) -> list[float]:
        """Share of the atomic task in every epoch."""
        return [float(s) for s in np.linspace(self.first_share, self.last_share, self.num_epochs)]


def anneal(
    atomic: Sequence[Row],
    others: Sequence[Row],
    annealing: Annealing,
    num_per_epoch: int | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """Mix rows; no row occurs twice in an epoch, and all occur about equally often.

    Each epoch has ``num_per_epoch`` rows, by default as many as the rows suffice for. Yields rows
    in the order of the curriculum, each with its epoch in its note.

    Raises:
        DataError: if there are too few rows, or a row belongs to the other list.
    """
    _check_sides(atomic, others)
    shares = annealing.shares()
    if num_per_epoch is None:
        enough = [len(atomic) / max(shares)] if max(shares) else []
        enough += [len(others) / (1 - min(shares))] if min(shares) < 1 else []
        num_per_epoch = int(min(enough) + 1e-6)
    if num_per_epoch < 1:
        raise DataError(f"no rows: {len(atomic)} atomic ones and {len(others)} others were given")
    rng = np.random.default_rng(seed)
    pools = _endless(len(atomic), rng), _endless(len(others), rng)
    for epoch, share in enumerate(shares, 1):
        num_atomic = round(share * num_per_epoch)
        drawn: list[Row] = []
        sides = zip((atomic, others), pools, (num_atomic, num_per_epoch - num_atomic), strict=True)
        for rows, pool, number in sides:
            if number > len(rows):
                raise DataError(
                    f"epoch {epoch} needs {number} {'atomic' if rows is atomic else 'other'} rows, "
                    f"there are {len(rows)}; ask for fewer rows per epoch"
                )
            indices: dict[int, None] = {}  # different ones, in their order
            while len(indices) < number:
                indices.setdefault(next(pool))
            drawn += [rows[index] for index in indices]
        for index in rng.permutation(len(drawn)):
            yield with_note(drawn[index], **{EPOCH: epoch})


def count_epochs(rows: Iterable[Row]) -> dict[int, Counter[str]]:
    """Rows of each task in each epoch, for files that `anneal` made: epoch -> task -> rows."""
    epochs: dict[int, Counter[str]] = {}
    for row in rows:
        note = read_note(row)
        if EPOCH in note:
            epochs.setdefault(note[EPOCH], Counter())[note["task"]] += 1
    return dict(sorted(epochs.items()))


def epoch_lines(epochs: Mapping[int, Counter[str]]) -> list[str]:
    """A line for every epoch: rows, share of the atomic tasks, and the tasks."""
    lines = []
    for epoch, tasks in epochs.items():
        named = ", ".join(f"{tasks[task]:,} {name}" for task, name in TASKS.items() if tasks[task])
        num_rows, share = sum(tasks.values()), atomic_share(tasks)
        lines.append(f"epoch {epoch:>2}: {num_rows:>7,} rows, {share:>4.0%} atomic: {named}")
    return lines


def atomic_share(tasks: Counter[str]) -> float:
    """Share of the atomic tasks among rows counted by task."""
    return sum(tasks[task] for task in ATOMIC_TASKS) / max(sum(tasks.values()), 1)


def read_rows(file: Path, folder: Path) -> list[Row]:
    """Rows of a file, with relative paths of images made relative to another folder."""

    def move(path: str) -> str:
        fixed = Path(path).is_absolute() or is_url(path)
        return path if fixed else path_from(folder, file.parent / path)

    rows = []
    for number, row in enumerate(read_entries(file)):
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise DataError(f"{file}: entry {number} is no row; expected an object with messages")
        moved = {
            kind.column: [move(path) for path in row.get(kind.column) or []]
            for kind in KINDS.values()
        }
        rows.append({**row, **moved})
    return rows


def _check_sides(atomic: Sequence[Row], others: Sequence[Row]) -> None:
    for rows, is_atomic in ((atomic, True), (others, False)):
        for number, row in enumerate(rows):
            task = read_note(row).get("task")
            if task is None or (task in ATOMIC_TASKS) != is_atomic:
                wanted = "an atomic task" if is_atomic else "a task that is not atomic"
                raise DataError(f"expected rows of {wanted}, row {number} has {task!r}")


def _endless(number: int, rng: np.random.Generator) -> Iterator[int]:
    """All indices in random order, repeatedly."""
    while number:
        yield from (int(index) for index in rng.permutation(number))
