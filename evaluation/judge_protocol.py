"""Settings of a judge, and the released prompt of VPT for a score from 0 to 1.

The prompt is to the letter ``evaluation_prompt`` (`evaluation/evaluation.py`) and ``genquery``
(`evaluation/gpt.py`) of https://github.com/yu-rp/VisualPerceptionToken at commit fb5aa5c, after
Visual CoT (arXiv 2403.16999, `llava/eval/eval_cot_score.py`). It is sent as one user message to
``gpt-4o`` at temperature 0, with at most 64 tokens for the reply.

Two differences are deliberate. The released code takes the first 0 or 1 anywhere in the reply for
the start of the score ("10" gives 10.0), and 0 for a reply without one or a failed call. Here a
score must have the form that the prompt asks for, or there is none.

The released runs pass the user's message of the data as the question, with its ``<image>`` and its
"Answer the question using a single word or phrase." Here the caller chooses what to pass.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from vpt.errors import PromptError


@dataclass(frozen=True)
class JudgeSettings:
    """Endpoint, model and limits of a judge.

    The key comes from an environment variable and is never stored. A server on the loopback
    interface needs none.

    Attributes:
        model: name at the endpoint; the released scores are from ``gpt-4o``.
        base_url: of the endpoint, up to and including ``/v1``.
        max_retries: of one call, after 429, 5xx, a time-out or a broken connection.
        timeout_s: for one attempt, reply included.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"
    max_concurrency: int = 8
    max_retries: int = 5
    timeout_s: float = 60.0
    temperature: float = 0.0
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise PromptError("model is empty; name the judge model as its endpoint does")
        parts = urlsplit(self.base_url)
        if "@" in self.base_url or parts.query or parts.fragment:
            # Not shown: what does not belong there may be a secret, and the URL is recorded.
            raise PromptError(
                "base_url must have no user, password, query or fragment; the key comes from the "
                "environment variable that key_variable names"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PromptError(
                f"base_url must be like http://localhost:8000/v1, not {self.base_url!r}"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            # Not shown: it may be the key itself.
            raise PromptError("key_variable must be the name of an environment variable")
        for name, least in (("max_concurrency", 1), ("max_retries", 0), ("max_tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise PromptError(f"{name} must be a whole number from {least}, not {value!r}")
        if not 0 < self.timeout_s < math.inf:
            raise PromptError(f"timeout_s must be above 0 and finite, not {self.timeout_s!r}")
        if not 0 <= self.temperature < math.inf:
            raise PromptError(f"temperature must be from 0 and finite, not {self.temperature!r}")

    @property
    def is_loopback(self) -> bool:
        """Whether the endpoint is on this machine's loopback."""
        return is_loopback(urlsplit(self.base_url).hostname or "")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback, by its notation."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


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


def read_score(reply: str) -> float:
    """Find the score, from 0 to 1, in a judge's reply.

    Accepted are ``score: 0.8`` in any case, with Markdown or brackets around the name and the
    number, and a reply that is only the number. A score named more than once must be the same.

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
