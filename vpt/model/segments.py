"""The streams of a batch, read by the LLM segment by segment, with gradients through all of it.

A segment is a run of tokens of one row that ends where a control state is needed. It attends to
itself and to the keys and values of the row's segments before it, so that nothing is run twice.
Segments of several rows are run end to end in one row, without padding. Past keys and values go
into a layer, and new ones come out, as plain tensors, for gradient checkpointing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from vpt.errors import PositionError

ATTENTION_NAME = "segments_sdpa"


@dataclass
class _Row:
    """How far one row has been read."""

    columns: list[int]  # places of the tokens that are there, in the padded row
    num_read: int = 0
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # per layer [1, H_kv, K, d]
    states: list[Tensor] = field(default_factory=list)  # [L, D] of each segment


class SegmentReader:
    """Reads the rows of a batch, each as far as is asked, then further.

    Args:
        language_model: the LLM without its head; its layers are run one by one.
        attention_mask: ``[B, S]``, 0 at padding; ``None`` for no padding.
        deeper: ``[B, S, D]`` of the first layers each, which are added to their outputs.
    """

    def __init__(
        self,
        language_model: Any,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        deeper: Sequence[Tensor] = (),
    ) -> None:
        self._language_model = language_model
        if "sliding_attention" in (getattr(language_model.config, "layer_types", None) or ()):
            raise PositionError("sliding-window attention is not supported where calls are read")
        self._deeper = deeper
        self._position_ids = position_ids[-3:]  # a fourth axis in front would count packed texts
        _, *self._shape = self._position_ids.shape
        present = torch.ones(self._shape) if attention_mask is None else attention_mask.cpu()
        self._rows = [_Row(row.nonzero().flatten().tolist()) for row in present]

    def read(self, embeds: Tensor, until: Mapping[int, int], *, is_last: bool = False) -> None:
        """Continue to read some rows.

        Args:
            embeds: ``[B, S, D]`` of the whole streams.
            until: row -> column before which to stop.
            is_last: whether these rows need not be read further.
        """
        ends = {row: bisect_left(self._rows[row].columns, end) for row, end in until.items()}
        numbers = [row for row, end in ends.items() if end > self._rows[row].num_read]
        if not numbers:
            return
        rows = [self._rows[row] for row in numbers]
        spans = [
            row.columns[row.num_read : ends[number]]
            for number, row in zip(numbers, rows, strict=True)
        ]
        places = self._flat_places(numbers, spans)
        hidden = embeds.flatten(0, 1).index_select(0, places)[None]  # [1, N, D]
        positions = self._position_ids.flatten(1).index_select(1, places)[:, None]  # [3, 1, N]
        sizes = [(len(span), row.num_read) for span, row in zip(spans, rows, strict=True)]
        masks = [  # made once: all layers keep the same for the gradient
            hidden.new_full((new, past + new), -torch.inf).triu(past + 1)
            if past and new > 1
            else None
            for new, past in sizes
        ]
        rotary = self._language_model.rotary_emb(hidden, positions)
        batch = _SegmentBatch(sizes, masks, rotary, is_last)
        for index, layer in enumerate(self._language_model.layers):
            past = [tensor for row in rows if row.num_read for tensor in row.past[index]]
            cached, own = _CachedLayer(layer, batch), _own_layer(layer)
            run = cached.forward
            if own.gradient_checkpointing and own.training:
                # A bound method of a module is what LLaMA-Factory's function expects.
                run = partial(own._gradient_checkpointing_func, cached.forward)
            hidden, *kept = run(hidden, *past)
            if index < len(self._deeper):
                added = self._deeper[index].flatten(0, 1).index_select(0, places)
                hidden = hidden + added.to(hidden)[None]
            for row, pair in zip(rows, zip(kept[::2], kept[1::2], strict=True), strict=False):
                row.past[index : index + 1] = [pair]
        states = self._language_model.norm(hidden)[0].split([len(span) for span in spans])
        for row, span, values in zip(rows, spans, states, strict=True):
            row.states.append(values)
            row.num_read += len(span)

    def last_state(self, row: int) -> Tensor:
        """``[D]`` final hidden state of the last token that was read of a row."""
        if not (states := self._rows[row].states):
            raise PositionError(f"a call stands at the start of row {row}; nothing precedes it")
        return states[-1][-1]

    def restart(self, rows: Iterable[int]) -> None:
        """Read these rows from their start again."""
        for row in rows:
            self._rows[row] = _Row(self._rows[row].columns)

    def hidden_states(self) -> Tensor:
        """``[B, S, D]`` final hidden states of all that was read; 0 at padding."""
        spans = [row.columns[: row.num_read] for row in self._rows]
        places = self._flat_places(range(len(spans)), spans)
        states = torch.cat([values for row in self._rows for values in row.states])
        hidden = states.new_zeros(self._shape[0] * self._shape[1], states.shape[-1])
        return hidden.index_copy(0, places, states).unflatten(0, self._shape)

    def _flat_places(self, numbers: Sequence[int], spans: Sequence[Sequence[int]]) -> Tensor:
        """Indices in the batch, rows end to end, of columns of some rows."""
        pairs = zip(numbers, spans, strict=True)
        places = [number * self._shape[1] + column for number, span in pairs for column in span]
        return torch.tensor(places, device=self._position_ids.device)


@dataclass(frozen=True)
class _SegmentBatch:
    """What all layers share while they read segments of several rows, end to end."""

    sizes: Sequence[tuple[int, int]]  # tokens and past tokens of each segment
    masks: Sequence[Tensor | None]  # [L, K] of each, added to the scores
    position_embeddings: tuple[Tensor, Tensor]
    is_last: bool  # whether keys and values need not be kept


class _CachedLayer(nn.Module):
    """A layer whose past and new keys and values are arguments and results, for checkpointing."""

    def __init__(self, layer: nn.Module, batch: _SegmentBatch) -> None:
        super().__init__()
        self.layer = layer
        self.batch = batch

    def forward(self, hidden: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Run the layer over segments that stand end to end.

        Args:
            hidden: ``[1, N, D]``.
            past: keys and values ``[1, H_kv, K, d]`` of each segment that has a past.

        Returns:
            ``[1, N, D]``, then keys and values of all segments with their past, unless they are
            the last.
        """
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
    """Make a layer use our attention, and not checkpoint by itself."""
    config, checkpointing = layer.self_attn.config, layer.gradient_checkpointing
    implementation = config._attn_implementation
    config._attn_implementation, layer.gradient_checkpointing = ATTENTION_NAME, False
    try:
        yield
    finally:
        config._attn_implementation, layer.gradient_checkpointing = implementation, checkpointing


class _SegmentAttention:
    """Attention of one layer, segment by segment, each over its own past."""

    def __init__(self, batch: _SegmentBatch, past: Sequence[Tensor]) -> None:
        self._batch = batch
        self._past = past
        self.kept: list[Tensor] = []  # keys and values of each segment, with their past

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
    """Attention of one row's last tokens, ``[1, H, L, d]`` over ``[1, H_kv, K, d]``.

    ``enable_gqa`` would do the same, but with a mask and on a GPU it keeps all scores. Here each
    key-value head is a row of the batch, and its query heads share it by a view.
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
    return segment_attention(query, key, value, scaling, dropout), None


AttentionInterface.register(ATTENTION_NAME, _attention_function)
