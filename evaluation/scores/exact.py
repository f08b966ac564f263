"""Whether an answer is a reference, whatever the case and the marks around it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from vpt.evaluation.scores.references import best_over

_TYPOGRAPHIC = str.maketrans("\u2018\u2019\u201c\u201d\u2212", "''\"\"-")
_OPENING = " \"'`([{*「『《【"
_CLOSING = " \"'`)]}*.,;:!?。、」』》】"

UNSPACED = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of Chinese and Japanese, which set no blanks between words; for a pattern's ``[]``."""
_SEAM = re.compile(rf"(?<=[{UNSPACED}])(?=[^\W{UNSPACED}])|(?<=[^\W{UNSPACED}])(?=[{UNSPACED}])")


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after `normalize_text`, else 0.

    Articles count ("the dog" is not "dog"), and so do number words; `vqa_accuracy` and
    `count_accuracy` see through these.

    Raises:
        DataError: if there is no reference.
    """
    predicted = normalize_text(prediction)
    return best_over(references, lambda answer: float(normalize_text(answer) == predicted))


def normalize_text(text: str) -> str:
    """Fold case, Unicode variants and blanks; take away quotes, brackets and marks at the ends.

    Signs and units stay ("-5", "5%", "$5", ".5"). A text of nothing but marks is left as it is.
    """
    folded = unify(text).translate(_TYPOGRAPHIC).casefold()
    folded = " ".join(folded.split())
    return folded.lstrip(_OPENING).rstrip(_CLOSING) or folded


def unify(text: str) -> str:
    """Fold Unicode variants (NFKC), and set a blank between Chinese or Japanese and other words."""
    return _SEAM.sub(" ", unicodedata.normalize("NFKC", text))


def whole_words(text: str) -> re.Pattern[str]:
    """Make a pattern for a normalised text; it is not found inside a word or another number.

    In Chinese and Japanese a text of several characters is found anywhere, one of a single
    character ("是" of "不是") only where it stands alone.
    """
    before, after = r"(?<!\w)(?<!\d[.,])", r"(?!\w)(?![.,]\d)"
    if text[:1].isdigit():
        before += r"(?<!(?<!\w)-)"  # "5" is not in "-5", but in "3-5"
    if len(text) > 1:
        before = "" if _is_unspaced(text[0]) else before
        after = "" if _is_unspaced(text[-1]) else after
    return re.compile(before + re.escape(text) + after)


def _is_unspaced(character: str) -> bool:
    return re.match(f"[{UNSPACED}]", character) is not None
