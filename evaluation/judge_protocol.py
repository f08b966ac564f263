"""The judge's protocol, as released with VPT: one prompt, which asks for a score from 0 to 1.

Found in https://github.com/yu-rp/VisualPerceptionToken (commit fb5aa5c): the instruction is
``evaluation_prompt`` in `evaluation/evaluation.py`, the three lines below it are ``genquery`` in
`evaluation/gpt.py`. They go out as one user message to ``gpt-4o`` at temperature 0, with at most
64 tokens for the reply. The instruction is that of Visual CoT (arXiv 2403.16999, `deepcs233/
Visual-CoT`, `llava/eval/eval_cot_score.py`), which has it as a system message to
``gpt-3.5-turbo-1106``. The wording here follows VPT's to the letter, so that scores can be
compared; a test pins it.

Two things differ on purpose. The released code takes the first 0 or 1 anywhere in the reply for
the start of the score ("10" gives 10.0), and 0 for a reply without one or a failed call. Here a
score has to be in the form that the prompt asks for, or there is none.

The released runs give the user's message as the data has it for the question, with its
``<image>`` and its "Answer the question using a single word or phrase." What to give is the
caller's choice.
"""

from __future__ import annotations

import hashlib
import re

PROMPT = (
    "You are responsible for proofreading the answers, you need to give a score to the model's "
    "answer by referring to the standard answer, based on the given question. The full score is 1 "
    "point and the minimum score is 0 points. Please output the score in the form 'score: "
    "<score>'. The evaluation criteria require that the closer the model's answer is to the "
    "standard answer, the higher the score.\n"
    "\n"
    "Question: {question}\n"
    "Standard answer: {reference}\n"
    "Model's answer: {prediction}\n"
)
PROMPT_HASH = hashlib.sha256(PROMPT.encode()).hexdigest()

_NUMBER = r"[-+]? (?: \d+ (?:\.\d+)? | \.\d+ )"
# What follows must not make the number a piece of 0.12, 1e3, 50% or 0.5-0.7.
_ENDS = r"(?! [^\W_] | [.,]\d | [ \t]* (?: % | (?: [-\u2013] | to | or ) [ \t]* \d ) )"
_OUT_OF = rf"(?: \s* (?:/|out\ of) \s* (?P<full> {_NUMBER} ) )?"
_MARKS = r"[\s*_`\"'<\[(]*"  # bold, quoted, or in the brackets of the prompt's <score>
_BARE = re.compile(rf"{_MARKS} (?P<number> {_NUMBER} ) {_ENDS} {_OUT_OF} [\s*_`\"'>\])]* \.?", re.X)
_NAMED = re.compile(
    rf"\b score {_MARKS} : {_MARKS} (?P<number> {_NUMBER} ) {_ENDS} {_OUT_OF}", re.I | re.X
)


def write_message(question: str, reference: str, prediction: str) -> str:
    """Fill the prompt.

    Args:
        question: as the judge should see it.
        reference: the standard answer.
        prediction: the model's answer.

    Returns:
        The content of the one user message.
    """
    return PROMPT.format(question=question, reference=reference, prediction=prediction)


def read_score(reply: str) -> float:
    """Find the score in a judge's reply.

    Read are ``score: 0.8`` in any case, with Markdown or brackets around the name and the number,
    and a reply that is nothing but the number. A score named more than once has to be the same.

    Args:
        reply: all of it.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: if there is no score, more than one, or one out of range.
    """
    bare = _BARE.fullmatch(reply.strip())
    found = [bare] if bare else list(_NAMED.finditer(reply))
    if not found:
        raise ValueError("the reply has no 'score: <number>'")
    scores = {float(match["number"]) for match in found}
    if len(scores) > 1:
        raise ValueError(f"the reply names several scores: {sorted(scores)}")
    score = scores.pop()
    if not 0 <= score <= 1 or any(float(match["full"] or 1) != 1 for match in found):
        raise ValueError(f"the reply's score is not one from 0 to 1: {found[0][0].strip()!r}")
    return score + 0.0  # -0.0 becomes 0.0
