"""Whether a sample was answered right, and whether looking again made it better."""

from __future__ import annotations

from vpt.evaluation.records import Record

RIGHT_SCORE = 0.5
"""From this score on an answer counts as right; graded scores are cut here."""

VERDICT_WORDS = {"right": "right", "wrong": "wrong", "unscored": "unscored", "error": "failed"}


def verdict_of(record: Record, score: str) -> str:
    """``"right"``, ``"wrong"``, ``"unscored"`` or ``"error"``.

    Args:
        record: of a sample.
        score: name of the score that decides.
    """
    if record.error is not None:
        return "error"
    value = record.scores.get(score)
    if value is None:
        return "unscored"
    return "right" if value >= RIGHT_SCORE else "wrong"


def change_of(value: float | None, baseline: float | None) -> str:
    """``"better"``, ``"worse"`` or ``"same"``; empty where one of the two scores is missing."""
    if value is None or baseline is None:
        return ""
    if value == baseline:
        return "same"
    return "better" if value > baseline else "worse"
