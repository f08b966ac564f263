"""Which option an answer names, or whether it says yes or no."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from string import ascii_lowercase, ascii_uppercase

from vpt.errors import DataError
from vpt.evaluation.scores.texts import UNSPACED, best_over, normalize_text, unify, whole_words

_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}")
_LATEX_BOX = re.compile(r"\\boxed\{([^{}]*)\}")

# Words that announce an answer. After the first kind an option's text counts as well as its
# letter; after the second its letter alone ("So the dog is far away" is reasoning).
_ANNOUNCED = re.compile(
    r"(?:\b(?:answer|option|choice)(?:\s+(?:letter|option|choice))?"
    r"\s*(?:(?:is|would be|should be|must be|will be)\b\s*[:=]?|[:=])|<answer>"
    r"|(?:答案|选项)\s*(?:应该?)?(?:是|为|[:=])\s*[:=]?)",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    r"\b(?:(?:therefore|thus|hence|so)\b,?\s*(?:(?:it is|it's|it must be)\b)?"
    r"|i(?:'ll|'d|\s+will|\s+would)?\s+(?:choose|pick|select|go\s+with))\b,?"
    r"|(?:所以|因此|应该是|(?<!不)选[择项]?)",
    re.IGNORECASE,
)


def extract_choice(prediction: str, choices_or_num: Sequence[str] | int) -> str | None:
    """Read which option an answer names.

    In this order: an answer that is a letter ("B", "(b).") or an option's text and nothing else;
    the last explicit statement ("The answer is (B).", "answer: B", "B is correct", a line "B");
    a letter that marks the beginning ("B. the cat"); the one option mentioned by letter ("option B
    looks right", "(B)") or by text. A letter mentioned in reasoning gives way to a statement, and a
    bare "A" before a word is an article, not option A. Chinese ("答案是B。", "选B") and full-width
    letters are read likewise.

    ``choices_or_num`` are the texts of the options A, B, ..., or their number. Returns a capital
    letter, or ``None`` if no option, or more than one, is named. Raises ``DataError`` if there are
    not 1 to 26 options.
    """
    num = choices_or_num if isinstance(choices_or_num, int) else len(choices_or_num)
    if isinstance(choices_or_num, str) or not 1 <= num <= len(ascii_uppercase):
        raise DataError(f"expected 1 to 26 options or their number, got {choices_or_num!r}")
    texts = ("",) * num if isinstance(choices_or_num, int) else tuple(choices_or_num)
    return _ChoiceReader(texts).read(_clean(prediction))


def multiple_choice(prediction: str, choices: Sequence[str], references: Sequence[str]) -> float:
    """1 if the prediction names a right option, else 0.

    ``choices`` are the texts of the options A, B, ..., ``references`` the right ones, each as a
    letter or as a text. A letter means the option that has it, even where another option's text
    is that letter. Raises ``DataError`` if a reference is not an option, or if there are not 1 to
    26 options.
    """
    choice = extract_choice(prediction, choices)
    if not references:
        raise DataError("expected at least one right option, got none")
    return float(choice in [_right_letter(reference, choices) for reference in references])


class _ChoiceReader:
    """Reads answers to one question by patterns for its letters; unknown texts are empty."""

    def __init__(self, texts: Sequence[str]) -> None:
        letters = ascii_uppercase[: len(texts)]
        named = zip(letters, (normalize_text(_clean(text)) for text in texts), strict=True)
        self.options = [(letter, text) for letter, text in named if text]
        upper = f"[{letters}]"
        either = f"[{letters}{letters.lower()}]"
        wrapped = rf"(?:\({either}\)|\[{either}\])"
        # A bare letter needs a mark or a reason after it; "D.C." is not one.
        bare = (
            rf"{either}(?!\.\w\.)(?=\s*(?:[.,;:!?)\]}}<\"'{UNSPACED}]|$|[-\u2013\u2014]\s)"
            r"|\s+(?:because|since|as|given|due|based)\b)"
        )
        # Not "B or C", "(B), (C)"; not "B is wrong".
        alone = (
            rf"(?![)\]]*\s*(?:,|/|&|and\b|or\b|[和或与])\s*[(\[]?{upper}\b)"
            r"(?![)\]]*\s+is\s+(?:not|wrong|incorrect|false)\b)(?![)\]]*\s*是?[不错])"
        )
        self._sole = re.compile(rf"\W*({either})\W*")
        self._line = re.compile(rf"^\W*({either})\W*$", re.MULTILINE)
        # "B matches" is a letter with its verb; "A dog" and "I think" begin a phrase.
        self._announced = re.compile(
            r"\W*(?:(?:option|choice|letter)\s+)?"
            rf"({wrapped}|{bare}|(?![AI]){upper}(?=\s)){alone}"
        )
        self._judged = re.compile(
            rf"({wrapped}|\b{upper})(?:\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b"
            r"|\s*是?(?:正确|对))"
        )
        self._marked = re.compile(rf"^\s*({wrapped}|{bare}){alone}", re.MULTILINE)
        self._mentioned = re.compile(
            r"(?<!\bnot )(?<!\bnot option )(?<!\bor )(?<!\band )(?<!, )(?<!/)"
            r"(?<![和或与] )(?<!不[是选] )"
            rf"({wrapped}|(?i:\b(?:option|choice)\s+){upper}\b"
            rf"|(?<![\w'([-]){upper}(?=\W*$|\s+(?:is|has|looks|matches|seems|shows)\b"
            rf"|\s[{UNSPACED}])){alone}"
        )

    def read(self, text: str) -> str | None:
        if sole := self._sole.fullmatch(text):
            return sole[1].upper()
        whole = normalize_text(text)
        same = [letter for letter, option in self.options if option == whole]
        if len(same) == 1:
            return same[0]
        if statements := sorted(self._statements(text)):
            return statements[-1][1]
        marked = {self._letter(found[1]) for found in self._marked.finditer(text)}
        if len(marked) == 1:
            return marked.pop()
        mentioned = {self._letter(found[1]) for found in self._mentioned.finditer(text)}
        named = mentioned | marked | self._named(text)
        return named.pop() if len(named) == 1 else None

    def _statements(self, text: str) -> Iterator[tuple[int, str]]:
        """Explicit statements: position and letter of each."""
        for line in self._line.finditer(text):
            yield line.start(1), line[1].upper()
        for verdict in self._judged.finditer(text):
            yield verdict.start(), self._letter(verdict[1])
        for lead in _CONCLUDED.finditer(text):
            if found := self._announced.match(text, lead.end()):
                yield lead.end(), self._letter(found[1])
        for lead in _ANNOUNCED.finditer(text):
            if found := self._announced.match(text, lead.end()):
                yield lead.end(), self._letter(found[1])
            else:
                sentence = re.split(r"[.!?]\s|\n", text[lead.end() :].lstrip(), maxsplit=1)[0]
                if len(named := self._named(sentence)) == 1:
                    yield lead.end(), named.pop()

    def _named(self, text: str) -> set[str]:
        """Options whose text occurs, not counting those inside a longer option's text."""
        rest = normalize_text(text)
        named: set[str] = set()
        texts = [text for _, text in self.options]
        for option in sorted(dict.fromkeys(texts), key=len, reverse=True):
            if len(option) > 1 or option.isdigit():  # "a" is rather an article
                rest, num_found = whole_words(option).subn("\n", rest)
                if num_found:
                    named.update(letter for letter, text in self.options if text == option)
        return named

    def _letter(self, mark: str) -> str:
        return re.sub(r"(?i:option|choice)|\W", "", mark).upper()


def _clean(text: str) -> str:
    """Remove Markdown, LaTeX, full-width forms and Chinese punctuation."""
    text = _LATEX_TEXT.sub(r"\1", unify(text).replace("。", ". ").replace("、", ", "))
    text = _LATEX_BOX.sub(r" answer: \1 . ", text)
    return text.replace("*", "").replace("`", "").strip()


def _right_letter(reference: str, choices: Sequence[str]) -> str:
    letters = ascii_uppercase[: len(choices)]
    letter = _clean(reference).strip("()[].: ").upper()
    if len(letter) == 1 and letter in letters:
        return letter
    right = normalize_text(reference)
    options = zip(letters, choices, strict=True)
    same = [letter for letter, text in options if normalize_text(text) == right]
    if len(same) != 1:
        raise DataError(
            f"expected the letter or the text of one option, got {reference!r}; "
            f"options: {', '.join(map(repr, choices))}"
        )
    return same[0]


_YES = ("yes", "是", "对", "有", "正确", "肯定")
_NO = ("no", "否", "不", "不是", "不对", "没有", "没", "不正确", "错", "错误", "否定")
WORDS: Mapping[str, str] = {**dict.fromkeys(_YES, "yes"), **dict.fromkeys(_NO, "no")}
"""Word -> "yes" or "no"."""

# Chinese sets no blanks: "是" is a word of its own where nothing but a particle follows.
_CHINESE = rf"({'|'.join(sorted([*_YES[1:], *_NO[1:]], key=len, reverse=True))})[的了啊呀哦]?(?!\w)"
_STATED = re.compile(
    rf"\banswer(?:\s+is|\s*:)\W*(yes|no)\b|答案\s*(?:是|为|:)\W*(?:(yes|no)\b|{_CHINESE})",
    re.IGNORECASE,
)
_BEGINS = re.compile(rf"\W*(?:(yes|no)\b|{_CHINESE})", re.IGNORECASE)
_WORD = re.compile(rf"\b(yes|no)\b|(?<!\w){_CHINESE}|(?<!有)(没有)", re.IGNORECASE)


def extract_yes_no(prediction: str) -> str | None:
    """Read "yes" or "no".

    In this order: the last statement "the answer is ..." or "answer: ..."; the first word; the only
    one of the two words that occurs ("There is no dog." says no). Chinese ("是的", "答案是否") and
    full-width letters are read likewise. Returns ``None`` if the answer uses both words
    undecidedly or neither ("There is a dog.").
    """
    text = unify(prediction.replace("\N{NUMERO SIGN}", "#"))  # NFKC makes "No" of that sign
    if stated := list(_STATED.finditer(text)):
        return _meaning(stated[-1])
    if begins := _BEGINS.match(text):
        return _meaning(begins)
    meanings = {_meaning(word) for word in _WORD.finditer(text)}
    return meanings.pop() if len(meanings) == 1 else None


def _meaning(found: re.Match[str]) -> str:
    return WORDS[found[found.lastindex or 0].lower()]


def true_answer(references: Sequence[str]) -> str:
    """The common answer of the references, "yes" or "no"; ``DataError`` if they disagree."""
    said = {extract_yes_no(reference) for reference in references}
    truth = said.pop() if len(said) == 1 else None
    if truth is None:
        raise DataError(f"expected references that say yes or no, got {tuple(references)!r}")
    return truth


def yes_no_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction says what the references say, else 0; unreadable is wrong.

    Raises ``DataError`` if the references do not agree on yes or no.
    """
    return float(extract_yes_no(prediction) == true_answer(references))


def pope(said: Sequence[str | None], truth: Sequence[str]) -> dict[str, float]:
    """Summarise yes/no answers, one per sample, "yes" being the positive class.

    An unreadable answer (``None``) is neither yes nor no, so it is wrong: it lowers accuracy and,
    where the truth is yes, recall. A ratio of nothing is 0.

    Returns ``accuracy``, ``precision``, ``recall``, ``f1``; ``yes_ratio``, the share of yes among
    the readable answers; ``unparsed``, the share of unreadable ones. Empty if there is no sample.
    Raises ``DataError`` if the two differ in length.
    """
    if len(said) != len(truth):
        raise DataError(f"expected one answer per sample, got {len(said)} for {len(truth)}")
    if not said:
        return {}
    num_right = sum(a == b for a, b in zip(said, truth, strict=True))
    num_hits = sum(a == b == "yes" for a, b in zip(said, truth, strict=True))
    num_unparsed = sum(answer is None for answer in said)
    num_said, num_true = said.count("yes"), truth.count("yes")
    return {
        "accuracy": num_right / len(said),
        "precision": _ratio(num_hits, num_said),
        "recall": _ratio(num_hits, num_true),
        "f1": _ratio(2 * num_hits, num_said + num_true),
        "yes_ratio": _ratio(num_said, len(said) - num_unparsed),
        "unparsed": num_unparsed / len(said),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


# A capital anywhere, a small letter only at the end, where it cannot be an article.
_LETTER = re.compile(r"(?<![\w'-])(?:[A-Z]|[a-z](?=\W*$))(?![\w'-])")
_NO_LETTER = re.compile(r"(?:^|[.!?:]\s+)A(?=\s+[a-z])|\bI(?='|\s+[a-z])")  # article, pronoun


def contains_answer(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference occurs in the prediction as whole words, else 0.

    For free-form answers, "It is a red bus." for "red bus". Negation is ignored: "not a red
    bus" holds "red bus" too.

    Two kinds of references occur in almost any sentence, so the prediction has to state them:
    "yes" or "no" is compared with what `extract_yes_no` reads, a single letter ("A") with the
    option that `extract_choice` reads, or else with the only separate letter.

    Raises `DataError` without references.
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
