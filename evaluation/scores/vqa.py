"""VQA accuracy: how many of several annotators an answer agrees with.

Source: Antol et al., ICCV 2015, https://visualqa.org/evaluation.html; TextVQA uses it too.
"""

from __future__ import annotations

from collections.abc import Sequence

from vpt.evaluation.scores.references import checked_references
from vpt.evaluation.scores.vqa_normalization import normalize_vqa

FEWEST_ANNOTATORS = 4
"""With fewer, no answer could agree with three *others*, and so reach 1."""


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Score one prediction against the annotators' answers, all spelled by `normalize_vqa`.

    With at least `FEWEST_ANNOTATORS` references each annotator is left out in turn, and the result
    is the mean of ``min(1, matches among the others / 3)``. With fewer (released VPT rows carry a
    single answer) that makes no sense: then it is 1 if any reference is the same, else 0.

    The published evaluation leaves annotators who all wrote the same unspelled; here, as in
    lmms-eval and VLMEvalKit, all answers are spelled alike.

    Args:
        prediction: the answer.
        references: one answer per annotator, repetitions included.

    Returns:
        In [0, 1].

    Raises:
        DataError: if there is no reference.
    """
    predicted = normalize_vqa(prediction)
    agrees = [normalize_vqa(answer) == predicted for answer in checked_references(references)]
    if len(agrees) < FEWEST_ANNOTATORS:
        return float(any(agrees))
    total = sum(agrees)
    return sum(min(1.0, (total - own) / 3) for own in agrees) / len(agrees)
