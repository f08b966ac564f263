"""Numbers as people write them: signs, thousands separators, words, magnitudes, units."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vpt.evaluation.scores.exact import unify

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
    """A number with what was written around it.

    Attributes:
        value: as written, without its scale: 5 for "5 million" and for "5%".
        scale: what to multiply it by (1e6, 0.01), or ``None`` if nothing was written.
        unit: in lower case and singular, a currency by its sign; empty if there is none.
    """

    value: float
    scale: float | None = None
    unit: str = ""


def read_quantity(text: str) -> Quantity | None:
    """Read a text that is one number and, at most, a currency, a scale and a unit of three words.

    A comma separates thousands, a period decimals. Words go up to 999.

    Returns:
        ``None`` if the text is anything else: a range, a date, a sentence.
    """
    found = _WHOLE.fullmatch(_plain(text).strip().rstrip(".!。"))
    if found is None:
        return None
    value = _value(found["digits"], found["words"])
    if value is None:
        return None
    return Quantity(
        value=-value if found["sign"] == "-" else value,
        scale=_scale(found["letter"], found["scale"]),
        unit=_unit(found["currency"], found["unit"]),
    )


def first_number(text: str) -> float | None:
    """Find the first number of a text, in digits or words, magnitude included.

    "one" as a pronoun ("no one", "the one") is passed over, and so are digits that belong to a word
    ("3D", "2nd"). ``None`` if there is no number.
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
