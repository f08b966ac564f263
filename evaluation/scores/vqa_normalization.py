"""How the VQA evaluation spells an answer before it compares it with others.

Source of the rules: Antol et al., "VQA: Visual Question Answering", ICCV 2015, and its evaluation
(https://github.com/GT-Vision-Lab/VQA, ``vqaEvaluation/vqaEval.py``). Its oddities are kept, since
published numbers contain them:

- one comma between digits makes *all* punctuation of the answer vanish without leaving a blank;
- every period goes, unless a digit follows: "3.5" stays, "3." becomes "3";
- number words stop at "ten", and "none" is 0.

Ours differs on purpose where theirs is a slip that no answer set relies on: more than 32 periods
(there a flag is passed as the count), and an answer of nothing but articles, such as the option
letter "A", which would otherwise become empty and equal to silence.
"""

from __future__ import annotations

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_ZERO_TO_TEN = "zero one two three four five six seven eight nine ten"
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_ZERO_TO_TEN.split())}
_NUMBER_WORDS["none"] = "0"

# Right spellings. The evaluation maps each form that lacks one apostrophe to the right one, and
# leaves words alone that are others without it ("its", "well", "lets", "shed").
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
