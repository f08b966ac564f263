"""Rewards: small functions of one answered question, by name, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpt.evaluation.compare import RIGHT_SCORE
from vpt.evaluation.samples import Sample
from vpt.evaluation.scores.table import SCORES
from vpt.trace.records import Trace


@dataclass(frozen=True)
class Outcome:
    """An answered question.

    Attributes:
        score: of the answer, 0 to 1, by the score of the split.
        blind_score: the same of the greedy answer to this question with calls forbidden; ``None``
            if that was not asked.
    """

    sample: Sample
    trace: Trace
    score: float
    blind_score: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether the answer counts as correct."""
        return self.score >= RIGHT_SCORE

    @property
    def num_calls(self) -> int:
        """Calls that were executed."""
        return sum(call.outcome == "executed" for call in self.trace.calls)

    @property
    def is_cut(self) -> bool:
        """Whether a limit ended the answer, which then is neither rewarded nor punished."""
        return self.trace.stop_reason in ("length", "max_calls")


Reward = Callable[[Outcome], float]


def score_of(name: str, trace: Trace, sample: Sample) -> float:
    """Main value of a score of the evaluation; ``DataError`` if the sample does not fit it."""
    return SCORES[name].per_sample(trace.answer, sample)[name]


def _score(name: str) -> Reward:
    return lambda one: score_of(name, one.trace, one.sample)


def format_reward(one: Outcome) -> float:
    """1 if the answer ended by itself, has text, and nothing in it was malformed."""
    trace = one.trace
    is_whole = trace.stop_reason == "stop" and not trace.malformed
    return float(is_whole and bool(trace.answer.strip()))


def look_bonus(one: Outcome) -> float:
    """1 if the answer with a call is correct and the one without calls is not."""
    is_blind_right = one.blind_score is not None and one.blind_score >= RIGHT_SCORE
    return float(one.num_calls > 0 and one.is_right and not is_blind_right)


REWARDS: Mapping[str, Reward] = {
    **{name: _score(name) for name in SCORES},
    "format": format_reward,
    "look_bonus": look_bonus,
    "num_calls": lambda one: float(one.num_calls),
    "num_tokens": lambda one: float(one.trace.counts.generated_tokens),
}
"""By name; the last two are costs: their weights are negative."""


def reward_parts(outcome: Outcome, names: Sequence[str]) -> dict[str, float]:
    """Rewards by name, without their weights."""
    return {name: REWARDS[name](outcome) for name in names}


def group_advantages(rewards: Tensor, counted: Tensor, *, scale: bool) -> Tensor:
    """Advantages ``[Q, G]`` over the other answers to the same question (GRPO, arXiv 2402.03300).

    Args:
        rewards: ``[Q, G]`` of ``G`` answers to each of ``Q`` questions.
        counted: ``[Q, G]`` bool; other answers are left out of the mean, and have 0.
        scale: whether to divide by the group's standard deviation.
    """
    weights = counted.float()
    num = weights.sum(-1, keepdim=True).clamp(min=1)
    centred = (rewards - (rewards * weights).sum(-1, keepdim=True) / num) * weights
    if not scale:
        return centred
    deviation = ((centred**2).sum(-1, keepdim=True) / num).sqrt()
    return torch.where(deviation > 1e-6, centred / deviation.clamp(min=1e-6), 0.0)
