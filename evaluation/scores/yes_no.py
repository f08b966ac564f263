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
from collections.abc import Mapping, Sequence

from vpt.errors import DataError
from vpt.evaluation.scores.exact import unify

_YES = ("yes", "是", "对", "有", "正确", "肯定")
_NO = ("no", "否", "不", "不是", "不对", "没有", "没", "不正确", "错", "错误", "否定")
WORDS: Mapping[str, str] = {**dict.fromkeys(_YES, "yes"), **dict.fromkeys(_NO, "no")}
"""Word -> "yes" or "no"."""

# Chinese sets no blanks: "是" is a word of its own where nothing but a particle follows.
_CHINESE = rf"({'|'.join(sorted([*_YES[1:], *_NO[1:]], key=len, reverse=True))})[的了啊呀哦]?(?!\w)"
_STATED = re.compile(
    rf"\banswer(?:\s+is|\s*:)\W*(yes|no)\b|答案\s*(?:是|为|:)\W*(?:(yes|no)\b|{_CHINESE})",
    re.IGNORECASE,
)
_BEGINS = re.compile(rf"\W*(?:(yes|no)\b|{_CHINESE})", re.IGNORECASE)
_WORD = re.compile(rf"\b(yes|no)\b|(?<!\w){_CHINESE}|(?<!有)(没有)", re.IGNORECASE)


def extract_yes_no(prediction: str) -> str | None:
    """Read "yes" or "no".

    In this order: the last statement "the answer is ..." or "answer: ..."; the first word; the only
    one of the two words that occurs ("There is no dog." says no). Chinese ("是的", "答案是否") and
    full-width letters are read likewise.

    Returns:
        ``None`` if the answer uses both words undecidedly or neither ("There is a dog.").
    """
    text = unify(prediction.replace("\N{NUMERO SIGN}", "#"))  # NFKC makes "No" of that sign
    if stated := list(_STATED.finditer(text)):
        return _meaning(stated[-1])
    if begins := _BEGINS.match(text):
        return _meaning(begins)
    meanings = {_meaning(word) for word in _WORD.finditer(text)}
    return meanings.pop() if len(meanings) == 1 else None


def _meaning(found: re.Match[str]) -> str:
    return WORDS[found[found.lastindex or 0].lower()]


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
