"""Whether an answer equals a reference text, or how close it comes."""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from types import ModuleType

from vpt.errors import DataError, PromptError


def checked_references(references: Sequence[str]) -> Sequence[str]:
    """The references; ``DataError`` if there is none, or one string instead of a sequence."""
    if isinstance(references, str):
        raise DataError(
            f"expected a sequence of references, got one string; pass ({references!r},)"
        )
    if not references:
        raise DataError("expected at least one reference, got none; leave such samples unscored")
    return references


def best_over(references: Sequence[str], score: Callable[[str], float]) -> float:
    """The highest score over the references; ``DataError`` if there is none."""
    return max(map(score, checked_references(references)))


_TYPOGRAPHIC = str.maketrans("\u2018\u2019\u201c\u201d\u2212", "''\"\"-")
_OPENING = " \"'`([{*「『《【"
_CLOSING = " \"'`)]}*.,;:!?。、」』》】"

UNSPACED = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of Chinese and Japanese, which are written without spaces; for a pattern's ``[]``."""
_UNSPACED = re.compile(f"[{UNSPACED}]")
_SEAM = re.compile(rf"(?<=[{UNSPACED}])(?=[^\W{UNSPACED}])|(?<=[^\W{UNSPACED}])(?=[{UNSPACED}])")


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after `normalize_text`, else 0.

    Articles count ("the dog" is not "dog"), and so do number words; `vqa_accuracy` and
    `count_accuracy` see through these.

    Raises `DataError` without references.
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
    """Fold Unicode variants (NFKC), and put a space between CJK and other words."""
    return _SEAM.sub(" ", unicodedata.normalize("NFKC", text))


def whole_words(text: str) -> re.Pattern[str]:
    """Make a pattern for a normalised text; it is not found inside a word or another number.

    In Chinese and Japanese a text of several characters is found anywhere, one of a single
    character ("是" of "不是") only where it is a word of its own.
    """
    before, after = r"(?<!\w)(?<!\d[.,])", r"(?!\w)(?![.,]\d)"
    if text[:1].isdigit():
        before += r"(?<!(?<!\w)-)"  # "5" is not in "-5", but in "3-5"
    if len(text) > 1:
        before = "" if _UNSPACED.match(text[0]) else before
        after = "" if _UNSPACED.match(text[-1]) else after
    return re.compile(before + re.escape(text) + after)


FEWEST_ANNOTATORS = 4
"""With fewer, no answer could agree with three *others*, and so reach 1."""


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Score one prediction against the annotators' answers, all spelled by `normalize_vqa`.

    With at least `FEWEST_ANNOTATORS` references each annotator is left out in turn, and the result
    is the mean of ``min(1, matches among the others / 3)``. With fewer (released VPT rows carry a
    single answer) the result is 1 if any reference is the same, else 0.

    The published evaluation leaves annotators who all wrote the same unspelled; here, as in
    lmms-eval and VLMEvalKit, all answers are spelled alike. ``references`` hold one answer per
    annotator, repetitions included.

    Returns a value in [0, 1]. Raises `DataError` without references.
    """
    predicted = normalize_vqa(prediction)
    agrees = [normalize_vqa(answer) == predicted for answer in checked_references(references)]
    if len(agrees) < FEWEST_ANNOTATORS:
        return float(any(agrees))
    total = sum(agrees)
    return sum(min(1.0, (total - own) / 3) for own in agrees) / len(agrees)


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_ZERO_TO_TEN = "zero one two three four five six seven eight nine ten"
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_ZERO_TO_TEN.split())}
_NUMBER_WORDS["none"] = "0"

# Right spellings. The evaluation maps each form that lacks one apostrophe to the right one, and
# leaves alone those that are other words without it ("its", "well", "lets", "shed").
_RIGHT_SPELLINGS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _RIGHT_SPELLINGS.split()
    for place, char in enumerate(word)
    if char == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the evaluation


def normalize_vqa(answer: str) -> str:
    """Spell an answer as the VQA evaluation does: lower case, few marks, digits, no articles."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    has_digit_comma = _DIGIT_COMMA.search(answer) is not None
    spelled = answer
    for mark in _PUNCTUATION:
        joins = has_digit_comma or f"{mark} " in answer or f" {mark}" in answer
        spelled = spelled.replace(mark, "" if joins else " ")
    spelled = _PERIOD.sub("", spelled).lower()
    words = [_NUMBER_WORDS.get(word, word) for word in spelled.split()]
    words = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


THRESHOLD = 0.5
"""Normalised distance from which on an answer is worth nothing."""


def anls(prediction: str, references: Sequence[str]) -> float:
    """Score one prediction in [0, 1]; case and runs of blanks do not matter.

    It is the best over the references of ``1 - distance / length of the longer string``, or 0 where
    that distance is `THRESHOLD` or more. Raises `DataError` without references.
    """
    predicted = " ".join(prediction.lower().split())

    def similarity(reference: str) -> float:
        accepted = " ".join(reference.lower().split())
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


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, best of the references; in [0, 1].

    rouge-score without stemming. Only words of a-z and 0-9 count: a text without any scores 0.
    Raises `DataError` without references, `PromptError` if rouge-score is not installed.

    Source: Lin, "ROUGE", 2004.
    """
    scorer = _load("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return best_over(references, lambda text: float(scorer.score(text, prediction)["rougeL"][2]))


def chrf(prediction: str, references: Sequence[str]) -> float:
    """Sentence chrF (character n-grams up to 6, recall counted double), best reference; in [0, 1].

    Raises `DataError` without references, `PromptError` if sacrebleu is not installed.

    Source: Popović, "chrF", WMT 2015, as sacrebleu has it (there 0 to 100).
    """
    texts = list(checked_references(references))
    return float(_load("sacrebleu").sentence_chrf(prediction, texts).score) / 100


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of a whole split, sacrebleu's defaults (13a tokens, case counts); in [0, 1].

    Not a mean over samples: n-grams and lengths are summed first. Samples may differ in the number
    of references. Raises `DataError` if there is no sample, one has no reference, or the two differ
    in length; `PromptError` if sacrebleu is not installed.

    Source: Papineni et al., ACL 2002; Post, "A Call for Clarity in Reporting BLEU Scores", 2018.
    """
    if not predictions or len(predictions) != len(references):
        raise DataError(
            f"expected references for each of at least one prediction, got {len(predictions)} "
            f"predictions and {len(references)} sets of references"
        )
    most = max(len(checked_references(texts)) for texts in references)
    # sacrebleu wants the first references of all samples, then the second ones, None for gaps.
    padded = [[*texts, *[None] * (most - len(texts))] for texts in references]
    streams = [list(stream) for stream in zip(*padded, strict=True)]
    # Rounding can lift a perfect score a hair above 100.
    return min(float(_load("sacrebleu").corpus_bleu(list(predictions), streams).score) / 100, 1.0)


def _load(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise PromptError(
            f"caption scores need the package of {module!r}, which is not installed; "
            'run pip install -e ".[eval]"'
        ) from exc
