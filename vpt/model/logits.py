"""What is done to logits before a token is chosen: the grammar's rules, and a check of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vpt.protocol.grammar import PerceptionGrammar, TokenRule, TurnState

NOT_FINITE = -1
"""In place of a chosen id: the largest logit is NaN or infinite, so there is nothing to choose."""

NOT_FINITE_WORDS = (
    "the model's logits are not finite (NaN or infinity), so no token can be chosen; load it with "
    "dtype float32 or bfloat16, and check that the weights of the checkpoint are finite"
)


def likeliest(logits: Tensor) -> Tensor:
    """Ids of the largest logits.

    Args:
        logits: ``[..., V]``. NaN counts as the largest.

    Returns:
        ``[...]`` ids on the device of ``logits``; ``NOT_FINITE`` where the largest is not finite.
    """
    ids = logits.argmax(-1, keepdim=True)
    is_finite = logits.gather(-1, ids).isfinite()
    return ids.where(is_finite, NOT_FINITE).squeeze(-1)


def apply_rule_(rule: TokenRule, logits: Tensor) -> Tensor:
    """Set the logits ``[V]`` of what may not come to -inf, in place; returns them."""
    if rule.only is not None:
        only = _index(rule.only, logits.device)
        kept = logits[only]
        logits.fill_(-torch.inf)
        logits[only] = kept
        return logits
    if rule.banned:
        logits[_index(rule.banned, logits.device)] = -torch.inf
    if rule.vocabulary_end is not None:
        logits[rule.vocabulary_end :] = -torch.inf
    return logits


@lru_cache(maxsize=1024)
def _index(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Ids as a tensor, made once: rules are few and come again with every token."""
    return torch.tensor(ids, device=device)


class PerceptionLogitsProcessor(LogitsProcessor):
    """The grammar for transformers' ``generate``.

    Each call reads what is new since the last one; rows that are no longer the same, as after a
    beam search's reordering, are read anew.

    Args:
        grammar: the automaton.
        prompt_length: tokens in front of the generated ones; the turn begins behind them.
        permitted: branches that may be called, and kinds of content that may be written; all of
            the vocabulary by default.
    """

    def __init__(
        self,
        grammar: PerceptionGrammar,
        prompt_length: int,
        permitted: Sequence[str] | None = None,
    ) -> None:
        self.grammar = grammar
        self.prompt_length = prompt_length
        vocabulary = grammar.vocabulary
        everything = (*vocabulary.branches, *vocabulary.content.kinds)
        self.permitted = everything if permitted is None else tuple(permitted)
        self._read: Tensor | None = None  # [B, S], what the states stand behind
        self._states: list[TurnState] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ban what the grammar does not permit; ``scores`` is ``[B, V]``."""
        scores = scores.clone()
        for row, state in enumerate(self._advance(input_ids[:, self.prompt_length :])):
            apply_rule_(self.grammar.rule(state, self.permitted), scores[row])
        return scores

    def _advance(self, generated: Tensor) -> list[TurnState]:
        """States behind ``[B, S]`` ids."""
        num_read = 0 if self._read is None else self._read.shape[1]
        if self._read is None or not torch.equal(generated[:, :num_read], self._read):
            num_read, self._states = 0, [TurnState()] * len(generated)
        for row, new in enumerate(generated[:, num_read:].tolist()):
            for token_id in new:
                self._states[row] = self.grammar.advance(self._states[row], token_id)
        self._read = generated
        return self._states
