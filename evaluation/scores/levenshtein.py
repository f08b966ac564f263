"""ANLS: how close the spelling of a short answer read in a document comes to a reference.

Average Normalised Levenshtein Similarity: Biten et al., "Scene Text Visual Question Answering",
ICCV 2019, section 4; used by ST-VQA, DocVQA and InfographicVQA.

Elsewhere: lmms-eval 0.7.3 divides by the length of the strings *before* blanks are taken away, so
padding raises a score. Both it and VLMEvalKit keep a distance of exactly one half, which the paper
sets to 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from vpt.evaluation.scores.references import best_over

THRESHOLD = 0.5
"""Normalised distance from which on an answer is worth nothing."""


def anls(prediction: str, references: Sequence[str]) -> float:
    """Score one prediction; case and runs of blanks do not matter.

    Returns:
        The best over the references of ``1 - distance / length of the longer string``, or 0 where
        that distance is `THRESHOLD` or more; in [0, 1].

    Raises:
        DataError: if there is no reference.
    """
    predicted = _normalize(prediction)

    def similarity(reference: str) -> float:
        accepted = _normalize(reference)
        length = max(len(predicted), len(accepted))
        distance = edit_distance(predicted, accepted) / length if length else 0.0
        return 1 - distance if distance < THRESHOLD else 0.0

    return best_over(references, similarity)


def edit_distance(a: str, b: str) -> int:
    """Count the insertions, deletions and substitutions of characters that turn ``a`` into ``b``.

    Source: Levenshtein 1966, by the row-wise dynamic programme of Wagner and Fischer 1974.
    """
    above = list(range(len(b) + 1))
    for row, char_a in enumerate(a, 1):
        current = [row]
        for column, char_b in enumerate(b, 1):
            substituted = above[column - 1] + (char_a != char_b)
            current.append(min(above[column] + 1, current[-1] + 1, substituted))
        above = current
    return above[-1]


def _normalize(text: str) -> str:
    return " ".join(text.lower().split())
