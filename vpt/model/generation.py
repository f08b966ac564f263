"""The choice of tokens: rules of the grammar on logits, and transformers' own ``generate``.

``generate`` cannot append the results of calls; :mod:`vpt.runtime` does. It can, as the released
code did, write calls and continue a stream that holds calls and their results. For that the token
after a start token is forced, and the control state of one step is the embedding of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from vpt.errors import NonFiniteError, PositionError
from vpt.model.config import VPTSettings
from vpt.model.positions import batch_mrope_positions
from vpt.protocol.grammar import PerceptionGrammar, TokenRule, TurnState
from vpt.protocol.tokens import BRANCH_TOKENS

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"
"""Name of the key-value cache in what models take and return; transformers 5.24 changed it."""

NOT_FINITE = -1
"""In place of a chosen id: the largest logit is NaN or infinite, so there is nothing to choose."""

NOT_FINITE_WORDS = (
    "the model's logits are not finite (NaN or infinity), so no token can be chosen; load it with "
    "dtype float32 or bfloat16, and check that the weights of the checkpoint are finite"
)


def likeliest(logits: Tensor) -> Tensor:
    """Ids ``[...]`` of the largest logits ``[..., V]``; ``NOT_FINITE`` where that is not finite."""
    ids = logits.argmax(-1, keepdim=True)
    is_finite = logits.gather(-1, ids).isfinite()
    return ids.where(is_finite, NOT_FINITE).squeeze(-1)


def apply_rule_(rule: TokenRule, logits: Tensor) -> Tensor:
    """Set the logits ``[V]`` of forbidden tokens to -inf, in place; returns them."""
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
    """Ids as a tensor, made once: rules are few, and each is used for many tokens."""
    return torch.tensor(ids, device=device)


class PerceptionLogitsProcessor(LogitsProcessor):
    """The grammar for transformers' ``generate``.

    Each call reads the ids that are new since the last one. Rows that have changed, as when a
    beam search reorders them, are read again.

    Args:
        prompt_length: tokens before the generated ones; the turn begins after them.
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
        self._read: Tensor | None = None  # [B, S], ids up to which the states are
        self._states: list[TurnState] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Forbid what the grammar does not permit; ``scores`` is ``[B, V]``."""
        generated = input_ids[:, self.prompt_length :]
        num_read = 0 if self._read is None else self._read.shape[1]
        if self._read is None or not torch.equal(generated[:, :num_read], self._read):
            num_read, self._states = 0, [TurnState()] * len(generated)
        self._read = generated
        scores = scores.clone()
        for row, new in enumerate(generated[:, num_read:].tolist()):
            for token_id in new:
                self._states[row] = self.grammar.advance(self._states[row], token_id)
            apply_rule_(self.grammar.rule(self._states[row], self.permitted), scores[row])
        return scores


class ActionProcessor(LogitsProcessor):
    """Forces the token after a branch's start token, and refuses logits that are not finite."""

    def __init__(self, config: VPTSettings) -> None:
        self.action_of_start = {config.start_id(b): config.action_id(b) for b in config.branches}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave only the action token; ``scores`` is ``[B, V]``."""
        is_finite = likeliest(scores) != NOT_FINITE
        scores = scores.clone()
        read = torch.stack([input_ids[:, -1], is_finite]).T  # one copy from the device
        for row, (last, finite) in enumerate(read.tolist()):
            if not finite:
                raise NonFiniteError(NOT_FINITE_WORDS)
            if (action := self.action_of_start.get(last)) is not None:
                scores[row] = -torch.inf
                scores[row, action] = 0
        return scores


class CallingGenerationMixin:
    """Calls in ``generate``; goes in front of transformers' model class."""

    config: VPTSettings
    generation_config: Any

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | list[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' ``generate``; see there.

        Raises:
            PositionError: for beam search, whose reordering would mix up control states.
            NonFiniteError: if the logits of a row are NaN or infinite.
        """
        settings = generation_config or self.generation_config
        if (kwargs.get("num_beams") or getattr(settings, "num_beams", None) or 1) > 1:
            raise PositionError("beam search is not supported; use greedy search or sampling")
        # Last, so that no other processor undoes what is forced.
        action = ActionProcessor(self.config)
        processors = LogitsProcessorList([*(logits_processor or []), action])
        return super().generate(  # type: ignore[misc]
            inputs, generation_config, logits_processor=processors, **kwargs
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Inputs of one step; images are inputs of the first step only."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            branches = [name for row in BRANCH_TOKENS.values() for name in row.arguments]
            inputs |= dict.fromkeys(("pixel_values", "image_grid_thw", *branches))
        return inputs

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """M-RoPE positions ``[3, B, S]`` of a prompt, also without ``mm_token_type_ids``.

        Stock Qwen2-VL silently uses text positions if those are not passed.
        """
        past: Cache | None = model_kwargs.get(CACHE)
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and not mask[:, -1].all():
            row = int(mask[:, -1].int().argmin())
            raise PositionError(
                f"row {row} is padded on the right, and generate would write after the padding; "
                "pad on the left: processor.tokenizer.padding_side = 'left'"
            )
        if past is not None and past.get_seq_length() > 0:
            raise PositionError("generate cannot continue a cache; pass the whole stream")
        input_ids = model_kwargs.get("input_ids")
        if input_ids is None or input_ids.shape[1] == 0:
            input_ids = inputs_tensor
        return batch_mrope_positions(
            input_ids,
            model_kwargs.get("attention_mask"),
            model_kwargs.get("image_grid_thw"),
            self.config.image_token_id,
            self.config.vision_config.spatial_merge_size,
        )
