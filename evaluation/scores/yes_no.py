"""Yes or no: what an answer says, and POPE's measures of how often that is right.

Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (POPE), EMNLP
2023.

Elsewhere: POPE's own script takes whatever holds no "no" or "not" for a yes, silence included.
lmms-eval 0.7.3 reads only an answer that is nothing but "yes" or "no" ("Yes." is neither), gives
the share of yes among the *true* answers as ``yes_ratio``, and leaves unreadable answers out of
recall, so that a model gains by refusing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vpt.errors import DataError

_STATED = re.compile(r"\banswer(?:\s+is|\s*:)\W*(yes|no)\b", re.IGNORECASE)
_BEGINS = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def extract_yes_no(prediction: str) -> str | None:
    """Read "yes" or "no".

    In this order: the last statement "the answer is ..." or "answer: ..."; the first word; the only
    one of the two words that occurs ("There is no dog." says no).

    Returns:
        ``None`` if the answer uses both words undecidedly or neither ("There is a dog.").
    """
    if stated := _STATED.findall(prediction):
        return str(stated[-1]).lower()
    if begins := _BEGINS.match(prediction):
        return begins[1].lower()
    words = {word.lower() for word in _WORD.findall(prediction)}
    return words.pop() if len(words) == 1 else None


def true_answer(references: Sequence[str]) -> str:
    """What the references agree on, "yes" or "no".

    Raises:
        DataError: if they agree on neither.
    """
    said = {extract_yes_no(reference) for reference in references}
    truth = said.pop() if len(said) == 1 else None
    if truth is None:
        raise DataError(f"expected references that say yes or no, got {tuple(references)!r}")
    return truth


def yes_no_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction says what the references say, else 0; unreadable is wrong.

    Raises:
        DataError: if the references do not agree on yes or no.
    """
    return float(extract_yes_no(prediction) == true_answer(references))


def pope(said: Sequence[str | None], truth: Sequence[str]) -> dict[str, float]:
    """Summarise yes/no answers, "yes" being the positive class.

    An unreadable answer is neither yes nor no, so it is wrong: it lowers accuracy and, where the
    truth is yes, recall. A ratio of nothing is 0.

    Args:
        said: "yes", "no" or ``None`` (unreadable), one per sample.
        truth: "yes" or "no", one per sample.

    Returns:
        ``accuracy``, ``precision``, ``recall``, ``f1``; ``yes_ratio``, the share of yes among the
        readable answers; ``unparsed``, the share of unreadable ones. Empty if there is no sample.

    Raises:
        DataError: if the two differ in length.
    """
    if len(said) != len(truth):
        raise DataError(f"expected one answer per sample, got {len(said)} for {len(truth)}")
    if not said:
        return {}
    num_right = sum(a == b for a, b in zip(said, truth, strict=True))
    num_hits = sum(a == b == "yes" for a, b in zip(said, truth, strict=True))
    num_unparsed = sum(answer is None for answer in said)
    num_said, num_true = said.count("yes"), truth.count("yes")
    return {
        "accuracy": num_right / len(said),
        "precision": _ratio(num_hits, num_said),
        "recall": _ratio(num_hits, num_true),
        "f1": _ratio(2 * num_hits, num_said + num_true),
        "yes_ratio": _ratio(num_said, len(said) - num_unparsed),
        "unparsed": num_unparsed / len(said),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
