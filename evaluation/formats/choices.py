"""Options of a question: cut out of its text, offered in a prompt, and the letter of the answer."""

from __future__ import annotations

import dataclasses
import re
import string
import unicodedata
from collections.abc import Sequence

from vpt.errors import DataError
from vpt.evaluation.samples import Sample

LETTERS = string.ascii_uppercase
"""Of options, in order."""

_OPTION = re.compile(r"\(([A-Z])\)\s*(\S.*?)\s*")
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")

ASK_OPTION = "Answer with the option's letter from the given choices directly."
"""As V*Bench and LLaVA's prompts have it."""
ASK_LETTER = "Answer with the letter directly."


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """Cut a text of a question, options on lines of their own, and perhaps an instruction.

    Args:
        text: with options as V*Bench writes them: ``(A) red`` on a line, ``(B) blue`` on the next.

    Returns:
        The question, and the texts of the options A, B, ...; no options if there are none.
    """
    lines = text.split("\n")
    matches = [_OPTION.fullmatch(line.strip()) for line in lines]
    first = next((i for i, found in enumerate(matches) if found and found[1] == "A"), None)
    if first is None:
        return text.strip(), ()
    options = []
    for letter, found in zip(LETTERS, matches[first:], strict=False):
        if found is None or found[1] != letter:
            break
        options.append(found[2])
    return "\n".join(lines[:first]).strip(), tuple(options)


def ask_with_options(sample: Sample) -> str:
    """What is put to the model: the question, and its options if it has any."""
    if not sample.choices:
        return sample.question
    if sample.choices == tuple(LETTERS[: len(sample.choices)]):  # these stand in the picture
        return f"{sample.question}\n{ASK_LETTER}"
    options = zip(LETTERS, sample.choices, strict=False)
    lines = [f"({letter}) {choice}" for letter, choice in options]
    return "\n".join([sample.question, *lines, ASK_OPTION])


def letter_of(answer: str, choices: Sequence[str]) -> str:
    """The letter of the option that an answer names, by its letter or by its text.

    Raises:
        DataError: if it names none, or more than one.
    """
    text = _fold(answer)
    found = _LETTER.fullmatch(text)
    named = {LETTERS[i] for i, choice in enumerate(choices) if _fold(choice) == text}
    if found and found[1].upper() in LETTERS[: len(choices)]:
        named.add(found[1].upper())
    if not named:
        raise DataError(f"answer {answer!r} is none of the choices: {', '.join(choices)}")
    if len(named) > 1:
        letters = " and ".join(sorted(named))
        raise DataError(f"answer {answer!r} may mean {letters}; write the letter in parentheses")
    return named.pop()


def _fold(text: str) -> str:
    """Without case, and without full-width forms."""
    return unicodedata.normalize("NFKC", text).strip().casefold()


def offer(sample: Sample, choices: tuple[str, ...]) -> Sample:
    """The sample with choices, its answers as letters.

    Raises:
        DataError: if there are too many choices, or an answer is none of them.
    """
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"expected 2 to {len(LETTERS)} choices, got {len(choices)}")
    answers = tuple(letter_of(answer, choices) for answer in sample.answers)
    return dataclasses.replace(sample, choices=choices, answers=answers)
