"""One layer of the LLM, run over segments of several rows that stand end to end in one.

Each segment attends to itself and to past keys and values of its row. What is past goes in, and
what will be comes out, as plain tensors, so that gradient checkpointing works as without a past.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

ATTENTION_NAME = "segments_sdpa"


class SegmentBatch:
    """What all layers share while they read segments of several rows, end to end.

    Args:
        sizes: tokens and past tokens of each segment.
        position_embeddings: of all segments, as the layers take them.
        dtype: of the hidden states.
        is_last: whether keys and values need not be kept.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        position_embeddings: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        is_last: bool,
    ) -> None:
        self.sizes = sizes
        self.position_embeddings = position_embeddings
        self.is_last = is_last
        device = position_embeddings[0].device
        self.masks = [  # [L, K] to be added; made once, all layers keep the same for the gradient
            torch.full((new, past + new), -torch.inf, dtype=dtype, device=device).triu(past + 1)
            if past and new > 1
            else None
            for new, past in sizes
        ]


def run_layer(
    layer: nn.Module, batch: SegmentBatch, hidden: Tensor, past: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Run a layer, checkpointed if it asks for that.

    Args:
        layer: of transformers' Qwen2-VL, whatever is wrapped around it.
        batch: what is run.
        hidden: ``[1, N, D]``, segments end to end.
        past: keys and values ``[1, H_kv, K, d]`` of each segment that has a past.

    Returns:
        ``[1, N, D]``, then keys and values of all segments, their past included, unless the
        segments are the last.
    """
    cached, own = _CachedLayer(layer, batch), _own_layer(layer)
    if own.gradient_checkpointing and own.training:
        # A bound method of a module is what LLaMA-Factory's function expects.
        return own._gradient_checkpointing_func(cached.forward, hidden, *past)
    return cached.forward(hidden, *past)


class _CachedLayer(nn.Module):
    """Arguments and results as gradient checkpointing of either kind must know of them."""

    def __init__(self, layer: nn.Module, batch: SegmentBatch) -> None:
        super().__init__()
        self.layer = layer
        self.batch = batch

    def forward(self, hidden: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """As :func:`run_layer`."""
        attention = _SegmentAttention(self.batch, past)
        with _attending_to_segments(_own_layer(self.layer)):
            hidden = self.layer(
                hidden,
                attention_mask=None,
                position_embeddings=self.batch.position_embeddings,
                segment_attention=attention,
            )
        return (hidden, *attention.kept)


def _own_layer(layer: nn.Module) -> Any:
    """The LLM's own layer, within whatever is wrapped around it."""
    return next(m for m in layer.modules() if isinstance(m, GradientCheckpointingLayer))


@contextmanager
def _attending_to_segments(layer: Any) -> Iterator[None]:
    """Let a layer attend as segments do, and leave its checkpointing to us."""
    config, checkpointing = layer.self_attn.config, layer.gradient_checkpointing
    implementation = config._attn_implementation
    config._attn_implementation, layer.gradient_checkpointing = ATTENTION_NAME, False
    try:
        yield
    finally:
        config._attn_implementation, layer.gradient_checkpointing = implementation, checkpointing


class _SegmentAttention:
    """Attention of one layer, segment by segment, each over its own past.

    Attributes:
        kept: keys and values of all segments, with their past, in turn.
    """

    def __init__(self, batch: SegmentBatch, past: Sequence[Tensor]) -> None:
        self._batch = batch
        self._past = past
        self.kept: list[Tensor] = []

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """Attend: ``[1, H, N, d]`` and twice ``[1, H_kv, N, d]`` -> ``[1, N, H, d]``."""
        lengths = [new for new, _ in self._batch.sizes]
        parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        past = iter(self._past)
        outs = []
        for (queries, keys, values), (_, num_past), mask in zip(
            parts, self._batch.sizes, self._batch.masks, strict=True
        ):
            if num_past:
                keys = torch.cat([next(past), keys], dim=2)
                values = torch.cat([next(past), values], dim=2)
                mask = None if mask is None else mask.to(queries.dtype)
                out = _attend_over_past(queries, keys, values, mask, scale, dropout)
            else:
                out = F.scaled_dot_product_attention(
                    queries, keys, values, None, dropout, True, scale=scale, enable_gqa=True
                )
            outs.append(out.transpose(1, 2))
            if not self._batch.is_last:
                self.kept += [keys, values]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend_over_past(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Attention of one row's last tokens, key-value heads shared and not repeated.

    ``enable_gqa`` would do the same, but with a mask and on a GPU its scores are all kept. Here
    each key-value head is a row of the batch, so that its query heads see it by a view.

    Args:
        query: ``[1, H, L, d]``.
        keys: ``[1, H_kv, K, d]``.
        values: like ``keys``.
        mask: ``[L, K]``, added to the scores; ``None`` for a single query, which sees everything.
        scale: factor of the scores.
        dropout: probability.
    """
    num_kv_heads = keys.shape[1]
    grouped = query[0].unflatten(0, (num_kv_heads, -1))  # [H_kv, G, L, d]
    keys, values = (
        states.transpose(0, 1).expand(-1, grouped.shape[1], -1, -1) for states in (keys, values)
    )
    out = F.scaled_dot_product_attention(grouped, keys, values, mask, dropout, scale=scale)
    return out.flatten(0, 1)[None]


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    segment_attention: _SegmentAttention,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers."""
    return segment_attention(query, key, value, scaling, dropout), None


AttentionInterface.register(ATTENTION_NAME, _attention_function)
