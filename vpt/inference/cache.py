"""Key-value cache of many streams: fixed buffers, written in place and read in place.

Each stream has a slot of ``capacity`` places in two buffers per layer. New keys and values are
written after the ones that are there; attention reads views of the buffers. Nothing grows or moves
while streams come and go, so that a captured decoding step stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class SlotCache:
    """Keys and values of up to ``num_slots`` streams of up to ``capacity`` tokens each.

    A slot has one place more, which takes what rows without a stream write; no stream reads it.

    Attributes:
        keys: per layer ``[num_slots * (capacity + 1), H_kv, d]``; ``values`` likewise. On a CPU the
            operating system provides the memory when it is first written to.
    """

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
        self.num_slots, self.capacity = num_slots, capacity
        shape = (num_slots * (capacity + 1), num_kv_heads, head_dim)
        self.keys = [_zeros(shape, device, dtype) for _ in range(num_layers)]
        self.values = [_zeros(shape, device, dtype) for _ in range(num_layers)]
        # [num_slots, H_kv, capacity + 1, d]
        self._key_views, self._value_views = (
            [buffer.unflatten(0, (num_slots, -1)).transpose(1, 2) for buffer in buffers]
            for buffers in (self.keys, self.values)
        )
        self._written = [0] * num_slots  # places that may hold other values than zeros

    @staticmethod
    def bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Memory of one token's keys and values."""
        return 2 * num_layers * num_kv_heads * head_dim * itemsize

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers, once all of it has been written to."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))

    def place(self, slot: int, index: int) -> int:
        """Place in the buffers of a slot's token; ``index`` -1 is the place that nobody reads."""
        return slot * (self.capacity + 1) + (self.capacity if index < 0 else index)

    def note_written(self, slot: int, length: int) -> None:
        """Remember that the first ``length`` places of a slot are about to be written."""
        self._written[slot] = max(self._written[slot], length)

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Write zeros over what a stream has left.

        Masked places have weight 0, and 0 times a stray NaN would be NaN.
        """
        if end := self._written[slot]:
            start = self.place(slot, 0)
            for buffer in (*self.keys, *self.values):
                buffer[start : start + end] = 0
        self._written[slot] = 0

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write ``[N, H_kv, d]`` keys and values at ``places`` ``[N]``."""
        self.keys[layer].index_copy_(0, places, keys)
        self.values[layer].index_copy_(0, places, values)

    def read(self, layer: int, slots: slice, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` keys and values of neighbouring slots, ``[n, H_kv, length, d]``."""
        keys, values = self._key_views[layer], self._value_views[layer]
        return keys[slots, :, :length], values[slots, :, :length]

    def copy_out(self, slot: int, length: int) -> Tensor:
        """A copy ``[num_layers, 2, length, H_kv, d]`` of a stream's first keys and values."""
        start = self.place(slot, 0)
        pairs = zip(self.keys, self.values, strict=True)
        parts = [part[start : start + length] for pair in pairs for part in pair]
        return torch.stack(parts).unflatten(0, (-1, 2))

    def copy_in(self, slot: int, kept: Tensor, length: int) -> None:
        """Begin a slot with the first ``length`` tokens of what :meth:`copy_out` returned."""
        start = self.place(slot, 0)
        self.note_written(slot, length)
        for layer, (keys, values) in enumerate(kept[:, :, :length]):
            self.keys[layer][start : start + length] = keys
            self.values[layer][start : start + length] = values


@dataclass(frozen=True)
class Segment:
    """Tokens of one stream in a pass that reads several, end to end.

    Attributes:
        rows: of the pass.
        past: tokens of the stream before them.
    """

    slot: int
    rows: slice
    past: int


@dataclass(frozen=True)
class SlotRun:
    """Neighbouring slots whose streams take one step together.

    Attributes:
        rows: of the step's batch.
        length: places that are read, of the longest stream its new token included.
        is_even: whether all of these streams have that length.
    """

    rows: slice
    slots: slice
    length: int
    is_even: bool


def slot_runs(slots: Sequence[int], lengths: Sequence[int]) -> tuple[SlotRun, ...]:
    """Runs of ascending ``slots``; ``lengths`` are those with the new token."""
    runs = []
    first = 0
    for end in range(1, len(slots) + 1):
        if end < len(slots) and slots[end] == slots[end - 1] + 1:
            continue
        longest = max(lengths[first:end])
        is_even = min(lengths[first:end]) == longest
        of_slots = slice(slots[first], slots[end - 1] + 1)
        runs.append(SlotRun(slice(first, end), of_slots, longest, is_even))
        first = end
    return tuple(runs)


def attend_step(
    cache: SlotCache,
    layer: int,
    query: Tensor,
    runs: Sequence[SlotRun],
    masks: Sequence[Tensor | None],
    scale: float,
) -> Tensor:
    """Attention of one new token per stream, ``[B, H, d]``, over all that the streams hold."""
    outs = []
    for run, mask in zip(runs, masks, strict=True):
        keys, values = cache.read(layer, run.slots, run.length)
        # Query heads that share a key-value head are lined up as if they were positions of it.
        lined_up = query[run.rows].unflatten(1, (keys.shape[1], -1))
        out = F.scaled_dot_product_attention(lined_up, keys, values, attn_mask=mask, scale=scale)
        outs.append(out.flatten(1, 2))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def step_masks(runs: Sequence[SlotRun], last: Tensor) -> list[Tensor | None]:
    """Masks ``[rows, 1, 1, length]`` of the runs; ``last`` ``[B]`` is each stream's last place."""
    masks: list[Tensor | None] = []
    for run in runs:
        places = torch.arange(run.length, device=last.device)
        seen = places <= last[run.rows, None]
        masks.append(None if run.is_even else seen[:, None, None])
    return masks


def attend_segment(
    cache: SlotCache, layer: int, query: Tensor, segment: Segment, mask: Tensor | None, scale: float
) -> Tensor:
    """Causal attention of a segment's tokens, ``[n, H, d]``, which the cache holds already.

    ``mask`` is that of :func:`segment_mask`.
    """
    length = segment.past + segment.rows.stop - segment.rows.start
    slots = slice(segment.slot, segment.slot + 1)
    keys, values = cache.read(layer, slots, length)
    num_queries, num_heads, _ = query.shape
    query = query.transpose(0, 1)[None]  # [1, H, n, d]
    if segment.past == 0 and num_queries > 1:
        out = F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    lined_up = query.reshape(1, keys.shape[1], -1, query.shape[-1])
    out = F.scaled_dot_product_attention(lined_up, keys, values, attn_mask=mask, scale=scale)
    return out.view(num_heads, num_queries, -1).transpose(0, 1)


def segment_mask(segment: Segment, groups: int, device: torch.device) -> Tensor | None:
    """Mask ``[1, 1, groups * n, K]`` of a segment that continues a stream; ``None`` without need.

    ``groups`` is the number of query heads per key-value head.
    """
    num_queries = segment.rows.stop - segment.rows.start
    if segment.past == 0 or num_queries == 1:
        return None
    length = segment.past + num_queries
    ones = torch.ones(num_queries, length, dtype=torch.bool, device=device)
    return ones.tril(segment.past).repeat(groups, 1)[None, None]


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # numpy's zeros take no memory until they are written to; torch's do.
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
