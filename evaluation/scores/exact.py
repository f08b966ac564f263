"""Whether an answer is a reference, or holds it, whatever the case and the marks around it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from evaluation.scores.references import best_over

_TYPOGRAPHIC = str.maketrans("\u2018\u2019\u201c\u201d\u2212", "''\"\"-")
_OPENING = " \"'`([{*"
_CLOSING = " \"'`)]}*.,;:!?"


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after `normalize_text`, else 0.

    Articles count ("the dog" is not "dog"), and so do number words; `vqa_accuracy` and
    `count_accuracy` see through these.

    Raises:
        DataError: if there is no reference.
    """
    predicted = normalize_text(prediction)
    return best_over(references, lambda answer: float(normalize_text(answer) == predicted))


def contains_answer(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the prediction as whole words, else 0.

    For free-form answers, "It is a red bus." for "red bus". It does not see negation: "not a red
    bus" holds "red bus" too.

    Raises:
        DataError: if there is no reference.
    """
    predicted = normalize_text(prediction)

    def holds(reference: str) -> float:
        accepted = normalize_text(reference)
        if not accepted:
            return float(not predicted)
        return float(whole_words(accepted).search(predicted) is not None)

    return best_over(references, holds)


def normalize_text(text: str) -> str:
    """Fold case, Unicode variants and blanks; take away quotes, brackets and marks at the ends.

    Signs and units stay ("-5", "5%", "$5", ".5"). A text of nothing but marks is left as it is.
    """
    folded = unicodedata.normalize("NFKC", text).translate(_TYPOGRAPHIC).casefold()
    folded = " ".join(folded.split())
    return folded.lstrip(_OPENING).rstrip(_CLOSING) or folded


def whole_words(text: str) -> re.Pattern[str]:
    """Make a pattern for a normalised text; it is not found inside a word or another number."""
    return re.compile(rf"(?<!\w)(?<!\d[.,]){re.escape(text)}(?!\w)(?![.,]\d)")
