"""Key-value cache of many streams, written in place and read in place.

Each stream has a slot in one buffer per layer. New keys and values are written after the ones that
are there; attention reads views of the buffer, and nothing is copied while streams grow and end.
The cache is an attention function of transformers (``slot_sdpa``): Qwen2-VL's layers run unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vpt.errors import BudgetError

ATTENTION_NAME = "slot_sdpa"


class SlotCache:
    """Keys and values of up to ``num_slots`` streams, with room for ``capacity`` tokens each."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_slots: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._shape = (num_slots, num_kv_heads, head_dim)
        self.capacity = capacity
        self._options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.keys = [self._new_buffer(capacity) for _ in range(num_layers)]
        self.values = [self._new_buffer(capacity) for _ in range(num_layers)]
        self.lengths = [0] * num_slots
        self.written = [0] * num_slots  # places that may hold other values than zeros

    def _new_buffer(self, capacity: int) -> Tensor:
        # Zeros, not empty: masked places have weight 0, and 0 times a stray NaN would be NaN.
        # ``clear`` sees to it that places after a stream's end stay zero.
        num_slots, num_kv_heads, head_dim = self._shape
        return torch.zeros(num_slots, num_kv_heads, capacity, head_dim, **self._options)

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in [*self.keys, *self.values])

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens per slot. Copies what is there only if it must grow."""
        if capacity <= self.capacity:
            return
        filled = max(self.written)
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = self._new_buffer(capacity)
                buffers[layer][:, :, :filled] = old[:, :, :filled]
        self.capacity = capacity

    @torch.inference_mode()  # buffers that have grown are tensors of that mode
    def clear(self, slot: int) -> None:
        """Forget a stream: write zeros where its keys and values are."""
        if end := self.written[slot]:
            for buffer in (*self.keys, *self.values):
                buffer[slot, :, :end] = 0
        self.lengths[slot] = self.written[slot] = 0


@dataclass(frozen=True)
class _Run:
    """Neighbouring slots that are read by one attention call."""

    rows: slice  # of the step's batch
    slots: slice
    length: int  # of the longest among them, the new token included
    mask: Tensor | None  # [rows, 1, 1, length], None if all are equally long


class SlotPlan:
    """Where one pass writes keys and values, and what it reads.

    ``slots`` ascend, each gets ``num_new`` tokens; 1 if there are several. Raises ``BudgetError``
    if a slot has no room for them.
    """

    def __init__(self, cache: SlotCache, slots: list[int], num_new: int) -> None:
        self.cache, self.slots, self.num_new = cache, slots, num_new
        self._past = [cache.lengths[slot] for slot in slots]
        if (needed := max(self._past) + num_new) > cache.capacity:
            raise BudgetError(
                f"a stream needs room for {needed} tokens, its slot holds {cache.capacity}; "
                "reserve more"
            )
        for slot, past in zip(self.slots, self._past, strict=True):
            self.cache.written[slot] = max(past + self.num_new, self.cache.written[slot])
        self._device = self.cache.keys[0].device
        self._runs = list(self._make_runs()) if self.num_new == 1 else []
        self._slot_index = torch.tensor(self.slots, device=self._device)
        self._past_index = torch.tensor(self._past, device=self._device)
        self._mask: Tensor | None = None

    def _make_runs(self) -> Iterator[_Run]:
        offsets = [slot - row for row, slot in enumerate(self.slots)]  # equal among neighbours
        for offset in dict.fromkeys(offsets):
            first = offsets.index(offset)
            end = first + offsets.count(offset)
            lengths = torch.tensor(self._past[first:end]) + 1
            longest, mask = int(lengths.max()), None
            if (lengths != longest).any():
                mask = (torch.arange(longest) < lengths[:, None])[:, None, None].to(self._device)
            yield _Run(slice(first, end), slice(first + offset, end + offset), longest, mask)

    def commit(self) -> None:
        """Count the new tokens in, once all layers have written theirs."""
        for slot in self.slots:
            self.cache.lengths[slot] += self.num_new

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Write new keys and values, then attend over all that the streams hold.

        ``query`` and the result are ``[rows, num_heads, num_new, head_dim]``, ``key`` and ``value``
        ``[rows, num_kv_heads, num_new, head_dim]``; ``scale`` multiplies the scores.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if len(self.slots) > 1:
            keys[self._slot_index, :, self._past_index] = key[:, :, 0]
            values[self._slot_index, :, self._past_index] = value[:, :, 0]
            return self._attend_runs(query, keys, values, scale)
        slot, past = self.slots[0], self._past[0]
        length = past + self.num_new
        keys[slot, :, past:length] = key[0]
        values[slot, :, past:length] = value[0]
        if self.num_new == 1:
            return self._attend_runs(query, keys, values, scale)
        seen = slice(slot, slot + 1)
        keys, values = keys[seen, :, :length], values[seen, :, :length]
        if past == 0:
            return F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=scale, enable_gqa=True
            )
        return _grouped_attention(query, keys, values, self._causal_mask(past, length), scale)

    def _attend_runs(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        outs = [
            _grouped_attention(
                query[run.rows],
                keys[run.slots, :, : run.length],
                values[run.slots, :, : run.length],
                run.mask,
                scale,
            )
            for run in self._runs
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _causal_mask(self, past: int, length: int) -> Tensor:
        if self._mask is None:
            ones = torch.ones(self.num_new, length, dtype=torch.bool, device=self._device)
            self._mask = ones.tril(past)[None, None]
        return self._mask


def _grouped_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention with fewer key-value heads than query heads, without repeating any of them.

    The queries that share a key-value head are lined up as if they were positions of it. Shapes:
    ``query [B, H, Q, d]``, ``keys`` and ``values [B, H_kv, K, d]``, ``mask [B or 1, 1, Q, K]``,
    True where attention is allowed.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    groups = num_heads // keys.shape[1]
    lined_up = query.reshape(batch, keys.shape[1], groups * num_queries, head_dim)
    if mask is not None and num_queries > 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(lined_up, keys, values, attn_mask=mask, scale=scale)
    return out.view(batch, num_heads, num_queries, head_dim)


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    slot_plan: SlotPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers; without a plan it is plain ``sdpa``."""
    if slot_plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    out = slot_plan.attend(cast(int, module.layer_idx), query, key, value, kwargs["scaling"])
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, slot_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
