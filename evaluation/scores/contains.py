"""Whether an answer contains a reference: as words, or as the letter, yes or no that it states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_lowercase

from vpt.evaluation.scores.choices import extract_choice
from vpt.evaluation.scores.exact import normalize_text, whole_words
from vpt.evaluation.scores.references import best_over
from vpt.evaluation.scores.yes_no import WORDS, extract_yes_no

# A capital anywhere, a small letter at the end: no article stands there.
_LETTER = re.compile(r"(?<![\w'-])(?:[A-Z]|[a-z](?=\W*$))(?![\w'-])")
_NO_LETTER = re.compile(r"(?:^|[.!?:]\s+)A(?=\s+[a-z])|\bI(?='|\s+[a-z])")  # article, pronoun


def contains_answer(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the prediction as whole words, else 0.

    For free-form answers, "It is a red bus." for "red bus". It does not see negation: "not a red
    bus" holds "red bus" too.

    Two kinds of references occur in almost any sentence, so the prediction has to state them:
    "yes" or "no" is compared with what `extract_yes_no` reads, a single letter ("A") with the
    option that `extract_choice` reads, or else with the only letter that stands alone.

    Raises:
        DataError: if there is no reference.
    """
    predicted = normalize_text(prediction)

    def holds(reference: str) -> bool:
        accepted = normalize_text(reference)
        if accepted == predicted or not accepted:
            return accepted == predicted
        if accepted in WORDS:
            return extract_yes_no(prediction) == WORDS[accepted]
        if accepted in ascii_lowercase and len(accepted) == 1:
            return _letter_of(prediction) == accepted.upper()
        return whole_words(accepted).search(predicted) is not None

    return best_over(references, lambda reference: float(holds(reference)))


def _letter_of(prediction: str) -> str | None:
    if letter := extract_choice(prediction, len(ascii_lowercase)):
        return letter
    letters = {found.upper() for found in _LETTER.findall(_NO_LETTER.sub(" ", prediction))}
    return letters.pop() if len(letters) == 1 else None
