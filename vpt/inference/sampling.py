"""The choice of tokens on the device: rules are rows of one table, noise is a function of a seed.

Nothing here depends on the batch, so that the same seed gives the same tokens alone and in any
batch, on any device; and nothing waits for the host, so that it can be part of a captured step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpt.inference.request import Sampling
from vpt.model.generation import NOT_FINITE, apply_rule_
from vpt.protocol.grammar import TokenRule

DEFAULT_NUM_RULES = 256

_GREEDY = Sampling()
_MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # of splitmix64
_GOLDEN = 0x9E3779B97F4A7C15
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Choice:
    """How the next token of a stream is chosen.

    Attributes:
        index: of the token among those chosen for the request; with the seed it sets the noise.
    """

    rule: TokenRule | None = None
    sampling: Sampling = _GREEDY
    index: int = 0


@dataclass(frozen=True)
class Choices:
    """The choices of a batch as tensors.

    Attributes:
        rules: ``[B]`` rows of the table of rules.
        forced: ``[B]`` the only id that may come, or -1.
        keys: ``[B]`` of the noise.
        top_k: ``[B]``, the vocabulary's size for all.
        temperature: ``[B]``, 0 for the likeliest token; ``top_p`` ``[B]`` likewise.
        samples: whether any row samples; ``sorts``, whether any has ``top_k`` or ``top_p``.
    """

    rules: Tensor
    forced: Tensor
    keys: Tensor
    top_k: Tensor
    temperature: Tensor
    top_p: Tensor
    samples: bool
    sorts: bool


TENSORS = ("rules", "forced", "keys", "top_k", "temperature", "top_p")
"""Names of the tensors of :class:`Choices`."""


class RuleTable:
    """Which tokens each rule forbids: ``[num_rows, V]`` bool on the device, filled when needed.

    256 rows take 39 MB at a vocabulary of 152,000. Row 0 forbids nothing. A rule that permits one
    token only takes no row. There must be more rows than streams, whose rules may all differ.
    """

    def __init__(
        self, vocab_size: int, device: torch.device, num_rows: int = DEFAULT_NUM_RULES
    ) -> None:
        self.banned = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)
        self._rows: dict[TokenRule, int] = {}

    def rows_of(self, rules: Sequence[TokenRule | None]) -> tuple[list[int], list[int]]:
        """Row, and forced id or -1, of each rule."""
        forced = [-1 if rule is None else _forced(rule) for rule in rules]
        wanted = [None if one >= 0 else rule for rule, one in zip(rules, forced, strict=True)]
        new = [rule for rule in dict.fromkeys(wanted) if rule and rule not in self._rows]
        if len(self._rows) + len(new) >= len(self.banned):
            self._rows.clear()
            new = [rule for rule in dict.fromkeys(wanted) if rule]
        for rule in new:
            row = self._rows[rule] = len(self._rows) + 1
            self.banned[row] = apply_rule_(rule, torch.zeros(self.banned.shape[1])).isinf()
        return [self._rows[rule] if rule else 0 for rule in wanted], forced


def _forced(rule: TokenRule) -> int:
    return rule.only[0] if rule.only is not None and len(rule.only) == 1 else -1


def pack(choices: Sequence[Choice], table: RuleTable) -> Choices:
    """Choices as tensors on the table's device; they go there in two transfers."""
    vocab_size = table.banned.shape[1]
    rules, forced = table.rows_of([one.rule for one in choices])
    sampling = [one.sampling for one in choices]
    keys = [_noise_key(one.sampling.seed, one.index) for one in choices]
    top_k = [min(one.top_k or vocab_size, vocab_size) for one in sampling]
    device = table.banned.device
    integers = torch.tensor([rules, forced, keys, top_k]).to(device, non_blocking=True)
    parts = [[one.temperature for one in sampling], [one.top_p for one in sampling]]
    # Quotients of extreme temperatures stay numbers.
    floats = torch.tensor(parts, dtype=torch.float64).clamp_(max=_FLOAT32.max).float()
    floats = floats.to(device, non_blocking=True)
    sampled = [one for one in sampling if one.temperature > 0]
    sorts = any(one.top_k or one.top_p < 1 for one in sampled)
    tensors = dict(zip(TENSORS, (*integers, *floats), strict=True))
    return Choices(**tensors, samples=bool(sampled), sorts=sorts)


def choose(logits: Tensor, choices: Choices, table: RuleTable) -> Tensor:
    """Choose an id from each row of ``[B, V]``; ``NOT_FINITE`` where the largest logit is not.

    Returns:
        ``[B]`` int64.
    """
    allowed = logits.float().masked_fill(table.banned[choices.rules], -torch.inf)
    ids = allowed.argmax(-1)
    largest = allowed.gather(-1, ids[:, None])
    is_forced = choices.forced >= 0
    of_forced = allowed.gather(-1, choices.forced.clamp(min=0)[:, None])
    is_finite = torch.where(is_forced[:, None], of_forced, largest).isfinite()[:, 0]
    if choices.samples:
        drawn = _draw(allowed - largest, choices)
        ids = torch.where(choices.temperature > 0, drawn, ids)
    ids = torch.where(is_forced, choices.forced, ids)
    return torch.where(is_finite, ids, NOT_FINITE)


def log_probabilities(logits: Tensor, choices: Choices, table: RuleTable) -> Tensor:
    """Log-probabilities ``[B, V]`` under rules and temperatures; ``top_k``, ``top_p`` left out.

    Greedy rows are taken at temperature 1.
    """
    allowed = logits.float().masked_fill(table.banned[choices.rules], -torch.inf)
    temperature = torch.where(choices.temperature > 0, choices.temperature, 1)
    return (allowed / temperature[:, None]).log_softmax(-1)


def _draw(logits: Tensor, choices: Choices) -> Tensor:
    """Sample from logits ``[B, V]`` of at most 0: the largest with Gumbel noise is taken."""
    scaled = logits / choices.temperature[:, None].clamp(min=_FLOAT32.tiny)
    if choices.sorts:
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        ranks = torch.arange(scaled.shape[-1], device=scaled.device)
        keep = probabilities.cumsum(-1) - probabilities < choices.top_p[:, None]
        keep &= ranks < choices.top_k[:, None]
        keep |= ranks == 0  # also where top_p is 0 in float32
        scaled = scaled.masked_fill(~keep.gather(-1, order.argsort(-1)), -torch.inf)
    return (scaled - _exponential_noise(choices.keys, scaled.shape[-1]).log()).argmax(-1)


def _exponential_noise(keys: Tensor, size: int) -> Tensor:
    """Numbers ``[B, size]`` of the standard exponential distribution, a function of the keys."""
    ids = torch.arange(size, device=keys.device)
    mixed = keys[:, None] + ids * _signed(_GOLDEN)  # wraps around, as in splitmix64
    for shift, factor in _MIXERS:
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    mixed = mixed ^ _shifted(mixed, 31)
    # 23 bits and a half: every value is a float32 between 0 and 1, both excluded.
    uniform = (_shifted(mixed, 41).float() + 0.5) * 2**-23
    return -uniform.log()


def _noise_key(seed: int, index: int) -> int:
    """A signed 64-bit key of a seed and a token's index."""
    return _signed(_mixed(_mixed(seed) + index * _GOLDEN))


def _mixed(value: int) -> int:
    value = (value + _GOLDEN) % 2**64
    for shift, factor in _MIXERS:
        value = (value ^ (value >> shift)) * factor % 2**64
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def _shifted(values: Tensor, by: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (values >> by) & (2 ** (64 - by) - 1)
