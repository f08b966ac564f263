"""Multiple choice: which option an answer names, if it can be told.

Elsewhere: lmms-eval 0.7.3 takes the first word of "A dog is closest" for option A, and any capital
behind "the answer is" for an option ("Cannot tell" gives C); its MMMU parser *draws* an option
where it reads none. VLMEvalKit takes that "A" too, and reads no letter where that of another option
was mentioned before. Here an answer that cannot be read gives ``None``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from string import ascii_uppercase

from vpt.errors import DataError
from vpt.evaluation.scores.exact import UNSPACED, normalize_text, unify, whole_words

_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}")
_LATEX_BOX = re.compile(r"\\boxed\{([^{}]*)\}")

# Words that announce an answer. Behind the first kind an option's text counts as well as its
# letter; behind the second its letter alone ("So the dog is far away" is reasoning).
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

    Args:
        prediction: the answer.
        choices_or_num: texts of the options A, B, ..., or how many there are.

    Returns:
        A capital letter, or ``None`` if no option, or more than one, is named.

    Raises:
        DataError: if there are not 1 to 26 options.
    """
    num = choices_or_num if isinstance(choices_or_num, int) else len(choices_or_num)
    if isinstance(choices_or_num, str) or not 1 <= num <= len(ascii_uppercase):
        raise DataError(f"expected 1 to 26 options or their number, got {choices_or_num!r}")
    texts = ("",) * num if isinstance(choices_or_num, int) else tuple(choices_or_num)
    return _ChoiceReader(texts).read(_clean(prediction))


def multiple_choice(prediction: str, choices: Sequence[str], references: Sequence[str]) -> float:
    """1 if the prediction names a right option, else 0; `extract_choice` tells whether any.

    Args:
        prediction: the answer.
        choices: texts of the options A, B, ...
        references: the right ones, each as a letter or as the text of an option. A letter means
            the option that has it, even where another option's text is that letter.

    Raises:
        DataError: if a reference is no option, or if there are not 1 to 26 options.
    """
    choice = extract_choice(prediction, choices)
    if not references:
        raise DataError("expected at least one right option, got none")
    return float(choice in [_right_letter(reference, choices) for reference in references])


class _ChoiceReader:
    """Reads answers to one question; the patterns know its letters.

    Args:
        texts: of the options; empty strings where they are not known.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.letters = ascii_uppercase[: len(texts)]
        self.texts = [normalize_text(_clean(text)) for text in texts]
        upper = f"[{self.letters}]"
        either = f"[{self.letters}{self.letters.lower()}]"
        wrapped = rf"(?:\({either}\)|\[{either}\])"
        # A bare letter needs a mark or a reason behind it; "D.C." is none.
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
        same = [letter for letter, option in self._options() if option == whole]
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
        """Explicit statements: where each stands, and the letter."""
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
        """Options whose text stands in a text; one inside a longer option's text does not count."""
        rest = normalize_text(text)
        named: set[str] = set()
        for option in sorted(dict.fromkeys(self.texts), key=len, reverse=True):
            if len(option) > 1 or option.isdigit():  # "a" is rather an article
                rest, num_found = whole_words(option).subn("\n", rest)
                if num_found:
                    named.update(letter for letter, text in self._options() if text == option)
        return named

    def _options(self) -> list[tuple[str, str]]:
        return [
            (letter, text) for letter, text in zip(self.letters, self.texts, strict=True) if text
        ]

    def _letter(self, mark: str) -> str:
        return re.sub(r"(?i:option|choice)|\W", "", mark).upper()


def _clean(text: str) -> str:
    """Take away Markdown, LaTeX, full-width forms and Chinese marks."""
    text = _LATEX_TEXT.sub(r"\1", unify(text).replace("。", ". ").replace("、", ", "))
    text = _LATEX_BOX.sub(r" answer: \1 . ", text)
    return text.replace("*", "").replace("`", "").strip()


def _right_letter(reference: str, choices: Sequence[str]) -> str:
    letters = ascii_uppercase[: len(choices)]
    letter = _clean(reference).strip("()[].: ").upper()
    if len(letter) == 1 and letter in letters:
        return letter
    same = [
        letter
        for letter, text in zip(letters, choices, strict=True)
        if normalize_text(text) == normalize_text(reference)
    ]
    if len(same) != 1:
        raise DataError(
            f"expected the letter or the text of one option, got {reference!r}; "
            f"options: {', '.join(map(repr, choices))}"
        )
    return same[0]
