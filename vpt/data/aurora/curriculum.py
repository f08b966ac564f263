"""The annealing mixture: epochs with ever fewer rows of the atomic task, in one file, in order.

Aurora (arXiv 2412.03548, section 4.2) starts with perception content alone and goes over to
reasoning with it. The order of the file is the curriculum: it is gone through once, unshuffled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vpt.data.aurora.rows import ATOMIC_TASKS, Row, read_note, with_note
from vpt.errors import DataError

EPOCH = "epoch"
"""Key of a row's note: which epoch it stands in, counted from 1."""


@dataclass(frozen=True)
class Annealing:
    """How the share of the atomic task falls.

    Attributes:
        num_epochs: parts of the file.
        first_share: of atomic rows in the first epoch.
        last_share: in the last; between them it falls by equal steps.

    Raises:
        DataError: if a number is impossible.
    """

    num_epochs: int = 10
    first_share: float = 1.0
    last_share: float = 0.1

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise DataError(f"expected at least 1 epoch, got {self.num_epochs}")
        if not 0 <= self.last_share <= self.first_share <= 1:
            raise DataError(
                f"expected shares that fall, from 1 to 0 at most, got {self.first_share:g} to "
                f"{self.last_share:g}"
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
    """Mix rows; in an epoch none comes twice, and all come equally often as far as that goes.

    Args:
        atomic: rows of the atomic task.
        others: rows of the tasks that use it.
        annealing: the shares.
        num_per_epoch: rows; by default as many as there are enough for.
        seed: of the order.

    Yields:
        Rows in the order of the curriculum, each with its epoch in its note.

    Raises:
        DataError: if there are too few rows, or a row is on the wrong side.
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
            drawn += [rows[index] for index in _take_distinct(pool, number)]
        for index in rng.permutation(len(drawn)):
            yield with_note(drawn[index], **{EPOCH: epoch})


def count_epochs(rows: Iterable[Row]) -> dict[int, Counter[str]]:
    """How many rows of each task an epoch has, for files that :func:`anneal` made.

    Returns:
        Epoch -> task -> rows; empty if no row names its epoch.

    Raises:
        DataError: if a note cannot be read.
    """
    epochs: dict[int, Counter[str]] = {}
    for row in rows:
        note = read_note(row)
        if EPOCH in note:
            epochs.setdefault(note[EPOCH], Counter())[note["task"]] += 1
    return dict(sorted(epochs.items()))


def atomic_share(tasks: Counter[str]) -> float:
    """Share of the atomic tasks among rows counted by task."""
    return sum(tasks[task] for task in ATOMIC_TASKS) / max(sum(tasks.values()), 1)


def _check_sides(atomic: Sequence[Row], others: Sequence[Row]) -> None:
    for rows, is_atomic in ((atomic, True), (others, False)):
        for number, row in enumerate(rows):
            task = read_note(row).get("task")
            if task is None or (task in ATOMIC_TASKS) != is_atomic:
                wanted = "an atomic task" if is_atomic else "a task that is not atomic"
                raise DataError(f"expected rows of {wanted}, row {number} has {task!r}")


def _endless(number: int, rng: np.random.Generator) -> Iterator[int]:
    """All indices in some order, again and again."""
    while number:
        yield from (int(index) for index in rng.permutation(number))


def _take_distinct(pool: Iterator[int], number: int) -> list[int]:
    """So many different indices; those that come twice are passed over."""
    taken: dict[int, None] = {}
    while len(taken) < number:
        taken.setdefault(next(pool))
    return list(taken)
