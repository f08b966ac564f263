"""The LLM's layers over the slot cache: segments of many streams in one pass, or one token each.

The modules of transformers hold the weights and multiply by them; what lies between the
multiplications is written out here, once for both kinds of pass. There is no host synchronisation
and no shape that depends on data in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt.errors import PositionError
from vpt.inference.cache import (
    Segment,
    SlotCache,
    SlotRun,
    attend_segment,
    attend_step,
    segment_mask,
    step_masks,
)

Rotation = tuple[Tensor, Tensor]
"""Cosine and signed sine ``[N, 1, d]`` of a pass."""


class Decoder:
    """Runs a language model of transformers (its layers and last norm) over a cache."""

    def __init__(self, language_model: Any, cache: SlotCache) -> None:
        self._layers = list(language_model.layers)
        self._norm = language_model.norm
        self.cache = cache
        config = language_model.config
        rotary = language_model.rotary_emb
        if rotary.rope_type in ("dynamic", "longrope"):
            raise PositionError(
                f"rope_type {rotary.rope_type!r} changes with the length of a stream, which the "
                "stream cache does not support; use 'default', 'linear' or 'yarn'"
            )
        self._inv_freq = rotary.inv_freq.float()
        self._rotary_scale = float(rotary.attention_scaling)
        self._axes = torch.tensor(_axes(rotary, config), device=self._inv_freq.device)
        attentions = [layer.self_attn for layer in self._layers]
        names = ("q_norm", "k_norm")  # of heads, in some families
        self._head_norms = [[getattr(one, name, None) for name in names] for one in attentions]
        attention = attentions[0]
        self._head_dim = attention.head_dim
        self._scale = attention.scaling
        self._groups = config.num_attention_heads // config.num_key_value_heads

    def step(
        self, embeds: Tensor, positions: Tensor, places: Tensor, last: Tensor, runs: Sequence[Any]
    ) -> Tensor:
        """Read one token of each stream; returns its final state ``[B, D]``.

        Args:
            embeds: ``[B, D]``.
            positions: ``[B]``, the same on all axes.
            places: ``[B]`` in the cache, where keys and values are written.
            last: ``[B]``, last place of each slot that is read.
            runs: of slots, which cover the rows in order.
        """
        rotation = self._rotation(positions.expand(3, -1), embeds.dtype)
        masks = step_masks(runs, last)
        hidden = embeds
        for index in range(len(self._layers)):
            hidden = self._step_layer(index, hidden, rotation, places, runs, masks)
        return self._normed(self._norm, hidden)

    def _step_layer(
        self,
        index: int,
        hidden: Tensor,
        rotation: Rotation,
        places: Tensor,
        runs: Sequence[SlotRun],
        masks: Sequence[Tensor | None],
    ) -> Tensor:
        def attend(query: Tensor) -> Tensor:
            return attend_step(self.cache, index, query, runs, masks, self._scale)

        return self._layer(index, hidden, rotation, places, attend)

    def prefill(
        self, embeds: Tensor, positions: Tensor, places: Tensor, segments: Sequence[Segment]
    ) -> Tensor:
        """Read segments of several streams, end to end; returns their last states ``[n, D]``.

        Args:
            embeds: ``[N, (1 + L) * D]``: embeddings, then what is added after each of the first
                ``L`` layers (deepstack).
            positions: ``[3, N]``.
            places: ``[N]`` in the cache.
        """
        embeds, *deeper = embeds.split(self._norm.weight.shape[0], dim=-1)
        rotation = self._rotation(positions, embeds.dtype)
        masks = [segment_mask(one, self._groups, embeds.device) for one in segments]
        pairs = list(zip(segments, masks, strict=True))
        hidden = embeds
        for index in range(len(self._layers) - 1):

            def attend(query: Tensor, index: int = index) -> Tensor:
                parts = [
                    attend_segment(self.cache, index, query[one.rows], one, mask, self._scale)
                    for one, mask in pairs
                ]
                return parts[0] if len(parts) == 1 else torch.cat(parts)

            hidden = self._layer(index, hidden, rotation, places, attend)
            if index < len(deeper):
                hidden = hidden + deeper[index]
        return self._normed(self._norm, self._last_layer(hidden, rotation, places, segments))

    def _last_layer(
        self, hidden: Tensor, rotation: Rotation, places: Tensor, segments: Sequence[Segment]
    ) -> Tensor:
        """Of the last layer all keys and values are needed, but one output per segment only."""
        index = len(self._layers) - 1
        ends = torch.tensor([one.rows.stop - 1 for one in segments], device=hidden.device)
        runs = [
            SlotRun(slice(i, i + 1), slice(one.slot, one.slot + 1), _length(one), True)
            for i, one in enumerate(segments)
        ]
        masks = [None] * len(runs)

        def attend(query: Tensor) -> Tensor:
            return attend_step(self.cache, index, query, runs, masks, self._scale)

        return self._layer(index, hidden, rotation, places, attend, ends)

    def _layer(
        self,
        index: int,
        hidden: Tensor,
        rotation: Rotation,
        places: Tensor,
        attend: Callable[[Tensor], Tensor],
        kept: Tensor | None = None,
    ) -> Tensor:
        """One layer over ``[N, D]``; all rows are read, those ``kept`` are returned."""
        layer = self._layers[index]
        attention = layer.self_attn
        normed = self._normed(layer.input_layernorm, hidden)
        query_norm, key_norm = self._head_norms[index]
        key = self._heads(attention.k_proj(normed), key_norm)
        value = self._heads(attention.v_proj(normed))
        self.cache.write(index, places, _rotate(key, rotation), value)
        if kept is not None:
            normed, hidden = normed[kept], hidden[kept]
            rotation = (rotation[0][kept], rotation[1][kept])
        query = _rotate(self._heads(attention.q_proj(normed), query_norm), rotation)
        hidden = hidden + attention.o_proj(attend(query).flatten(1))
        normed = self._normed(layer.post_attention_layernorm, hidden)
        return hidden + layer.mlp(normed)

    def _heads(self, states: Tensor, norm: Any = None) -> Tensor:
        """``[N, H, d]``, normed by head if there is a norm."""
        heads = states.unflatten(-1, (-1, self._head_dim))
        return heads if norm is None else self._normed(norm, heads)

    @staticmethod
    def _normed(norm: Any, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Of positions ``[3, N]``."""
        angles = positions[self._axes].T * self._inv_freq  # [N, d / 2]
        cos = (angles.cos() * self._rotary_scale).to(dtype)
        sin = (angles.sin() * self._rotary_scale).to(dtype)
        return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


@torch.inference_mode()
def _axes(rotary: Any, config: Any) -> list[int]:
    """The axis (time, height, width) whose position turns each frequency."""
    device = rotary.inv_freq.device
    one_axis_each = torch.eye(3, dtype=torch.long, device=device)[..., None]  # [3, B=3, 1]
    _, sine = rotary(torch.zeros(1, device=device), one_axis_each)
    if sine.ndim == 3:  # [B, 1, d]: the axes are mixed already, as we do it
        return sine[:, 0, : len(rotary.inv_freq)].argmax(0).tolist()
    sections = config.rope_parameters["mrope_section"]
    return [axis % 3 for axis, size in enumerate(sections) for _ in range(size)]


def _rotate(states: Tensor, rotation: Rotation) -> Tensor:
    """Turn ``[N, H, d]`` by position; the sine bears the sign of the half that it multiplies."""
    cos, sin = rotation
    return states * cos + states.roll(states.shape[-1] // 2, -1) * sin


def _length(segment: Segment) -> int:
    return segment.past + segment.rows.stop - segment.rows.start
