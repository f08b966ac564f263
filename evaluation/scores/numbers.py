"""Numbers in answers: counts, and values read from charts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from vpt.evaluation.scores.texts import best_over, exact_match, unify

_SMALL_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL, _TENS = _SMALL_WORDS.split(), _TENS_WORDS.split()


def _spell(value: int) -> str:
    if value < 20:
        return _SMALL[value]
    if value < 100:
        tens, ones = divmod(value, 10)
        return _TENS[tens - 2] + (f" {_SMALL[ones]}" if ones else "")
    hundreds, rest = divmod(value, 100)
    return f"{_SMALL[hundreds]} hundred" + (f" {_spell(rest)}" if rest else "")


_SPELLED = {_spell(value): value for value in range(1000)}
_MOST_WORDS = max(len(words.split()) for words in _SPELLED)
_MAGNITUDES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_MAGNITUDE_LETTERS = {"k": 1e3, "K": 1e3, "M": 1e6, "mn": 1e6, "B": 1e9, "bn": 1e9}
_CURRENCIES = {
    **dict.fromkeys(("dollar", "usd"), "$"),
    **dict.fromkeys(("euro", "eur"), "€"),
    **dict.fromkeys(("pound", "gbp"), "£"),
}

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_WORD = rf"(?i:{'|'.join([*reversed(_SMALL), *_TENS, 'hundred'])})"
_WORDS = rf"\b{_WORD}(?:(?:-|\s+(?i:and\s+)?){_WORD})*\b"
_MAGNITUDE = rf"(?i:{'|'.join(_MAGNITUDES)})\b"

_ANYWHERE = re.compile(
    rf"(?:(?<![\w.,])(?P<digits>[-+]?{_DIGITS})(?!\w|[.,]\d)|(?P<words>{_WORDS}))"
    rf"(?:\s+(?P<magnitude>{_MAGNITUDE}))?"
)
_PRONOUN_BEFORE_ONE = re.compile(r"\b(?:no|the|this|that|which|each|every)\s+$", re.IGNORECASE)

_UNIT_WORD = r"(?:/\s?)?(?:[^\W\d_]|°)[\w°/.-]*"
_WHOLE = re.compile(
    r"(?:(?i:about|around|approximately|approx\.?|roughly|nearly|almost)\s+|[~≈]\s*)?"
    r"(?P<sign>[-+])?(?P<currency>[$€£¥])?\s?"
    rf"(?:(?P<digits>[-+]?{_DIGITS})(?P<letter>(?:[kKMB]|mn|bn)\b)?|(?P<words>{_WORDS}))"
    rf"\s*(?P<scale>%|(?i:per\s?cent|pct)\b|{_MAGNITUDE})?"
    rf"\s*(?P<unit>{_UNIT_WORD}(?:\s+{_UNIT_WORD}){{0,2}})?"
)


@dataclass(frozen=True)
class Quantity:
    """A number with what was written around it."""

    value: float  # as written, without its scale: 5 for "5 million" and for "5%"
    scale: float | None = None  # what to multiply it by (1e6, 0.01), if it was written
    unit: str = ""  # in lower case and singular, a currency by its sign


def read_quantity(text: str) -> Quantity | None:
    """Read a text that is one number and, at most, a currency, a scale and a unit of three words.

    A comma separates thousands, a period decimals. Words go up to 999. Returns ``None`` for any
    other text: a range, a date, a sentence.
    """
    found = _WHOLE.fullmatch(_plain(text).strip().rstrip(".!。"))
    if found is None or (value := _value(found["digits"], found["words"])) is None:
        return None
    value = -value if found["sign"] == "-" else value
    scale = _scale(found["letter"], found["scale"])
    return Quantity(value, scale, _unit(found["currency"], found["unit"]))


def first_number(text: str) -> float | None:
    """Find the first number of a text, in digits or words, magnitude included.

    "one" as a pronoun ("no one", "the one") is passed over, and so are digits that belong to a word
    ("3D", "2nd").
    """
    text = _plain(text)
    for found in _ANYWHERE.finditer(text):
        words = found["words"]
        if words and words.lower() == "one" and _PRONOUN_BEFORE_ONE.search(text[: found.start()]):
            continue
        if (value := _value(found["digits"], words, whole=False)) is not None:
            return value * (_scale(None, found["magnitude"]) or 1)
    return None


def _plain(text: str) -> str:
    return unify(text).replace("\u2212", "-")


def _value(digits: str | None, words: str | None, *, whole: bool = True) -> float | None:
    if digits is not None:
        return float(digits.replace(",", ""))
    tokens = [word for word in re.split(r"[\s-]+", (words or "").lower()) if word != "and"]
    shortest = len(tokens) if whole else 1
    for length in range(min(len(tokens), _MOST_WORDS), shortest - 1, -1):
        if (value := _SPELLED.get(" ".join(tokens[:length]))) is not None:
            return float(value)
    return None


def _scale(letter: str | None, word: str | None) -> float | None:
    if letter:
        return _MAGNITUDE_LETTERS[letter]
    return _MAGNITUDES.get(word.lower(), 0.01) if word else None


def _unit(currency: str | None, words: str | None) -> str:
    unit = " ".join((words or "").lower().rstrip(".").split())
    if len(unit) > 2:
        unit = unit.removesuffix("s")
    return _CURRENCIES.get(unit, unit) or currency or ""


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

    Raises `DataError` without references.
    """
    count = extract_count(prediction)

    def is_same(reference: str) -> float:
        if (accepted := extract_count(reference)) is None:
            return exact_match(prediction, (reference,))
        return float(count == accepted)

    return best_over(references, is_same)


TOLERANCE = 0.05


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is a reference, or a number within `TOLERANCE` of one, else 0.

    Both must be numbers to be compared as such, with nothing around them but a currency, a
    scale ("%", "million", "k") and a unit. A unit or scale that only one side has is forgiven:
    "50%" is right for "50" and for "0.5". Two different units or currencies are not.

    Raises `DataError` without references.
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
    readings = [{one.value, one.value * (one.scale or 1)} for one in (predicted, accepted)]
    return any(_close(a, b) for a in readings[0] for b in readings[1])


def _close(predicted: float, accepted: float) -> bool:
    margin = TOLERANCE * abs(accepted) * (1 + 1e-9)  # for rounding
    return isfinite(margin) and abs(predicted - accepted) <= margin
