"""Count accuracy: whether the number that an answer gives is exactly the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vpt.evaluation.scores.exact import exact_match
from vpt.evaluation.scores.numerals import first_number
from vpt.evaluation.scores.references import best_over

_NOTHING = re.compile(r"\b(?:no|none|nobody|nothing)\b", re.IGNORECASE)


def extract_count(prediction: str) -> float | None:
    """Read a count: the first number, else 0 for "no", "none", "nobody", "nothing".

    "three", "3", "There are 3 dogs." and "3 dogs, one cat" are 3. ``None`` if none can be read.
    """
    if (number := first_number(prediction)) is not None:
        return number
    return 0.0 if _NOTHING.search(prediction) else None


def count_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction's count is that of a reference, else 0.

    A reference without a number ("many") is compared as text.

    Raises:
        DataError: if there is no reference.
    """
    count = extract_count(prediction)

    def is_same(reference: str) -> float:
        accepted = extract_count(reference)
        if accepted is None:
            return exact_match(prediction, (reference,))
        return float(count == accepted)

    return best_over(references, is_same)
