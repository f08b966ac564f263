"""Several references for one prediction, of which the best counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vpt.errors import DataError


def checked_references(references: Sequence[str]) -> Sequence[str]:
    """Hand the references back if a prediction can be compared with them.

    Raises:
        DataError: if there is none, or if one string stands where a sequence is expected.
    """
    if isinstance(references, str):
        raise DataError(
            f"expected a sequence of references, got one string; pass ({references!r},)"
        )
    if not references:
        raise DataError("expected at least one reference, got none; leave such samples unscored")
    return references


def best_over(references: Sequence[str], score: Callable[[str], float]) -> float:
    """Score each reference and keep the highest value.

    Args:
        references: accepted answers; their order does not matter.
        score: of the prediction against one reference.

    Raises:
        DataError: if there is no reference.
    """
    return max(map(score, checked_references(references)))
