"""Relaxed accuracy: numbers read from a chart may be off by 5 %, other answers may not.

Source: Methani et al., "PlotQA", WACV 2020; Masry et al., "ChartQA", Findings of ACL 2022, section
5.1. Years are numbers as well, so that 1950 passes for 2020; as in the paper. Use `exact_match`
where answers are years.

Elsewhere: lmms-eval 0.7.3 and VLMEvalKit read a number only where Python's ``float`` does, so
"1,234" and "$5" are text there; they take "50%" for 0.5 alone, though charts mostly ask for "50";
a reference of 0 is compared as text ("0.0" fails); and 1.05 fails against 1 by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from vpt.evaluation.scores.exact import exact_match
from vpt.evaluation.scores.numerals import Quantity, read_quantity
from vpt.evaluation.scores.references import best_over

TOLERANCE = 0.05
_ROUNDING = 1e-9


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is a reference, or a number within `TOLERANCE` of one, else 0.

    Both must be numbers to be compared as such, with nothing around them but a currency, a
    scale ("%", "million", "k") and a unit. A unit or scale that only one side has is forgiven:
    "50%" is right for "50" and for "0.5". Two different units or currencies are not.

    Raises:
        DataError: if there is no reference.
    """
    predicted = read_quantity(prediction)

    def is_close(reference: str) -> float:
        if exact_match(prediction, (reference,)):
            return 1.0
        accepted = read_quantity(reference)
        if predicted is None or accepted is None:
            return 0.0
        return float(_agree(predicted, accepted))

    return best_over(references, is_close)


def _agree(predicted: Quantity, accepted: Quantity) -> bool:
    if predicted.unit and accepted.unit and predicted.unit != accepted.unit:
        return False
    if predicted.scale is not None and accepted.scale is not None:
        return _close(predicted.value * predicted.scale, accepted.value * accepted.scale)
    return any(_close(a, b) for a in _readings(predicted) for b in _readings(accepted))


def _readings(quantity: Quantity) -> set[float]:
    return {quantity.value, quantity.value * (quantity.scale or 1)}


def _close(predicted: float, accepted: float) -> bool:
    margin = TOLERANCE * abs(accepted) * (1 + _ROUNDING)
    return isfinite(margin) and abs(predicted - accepted) <= margin
