"""The streams of a batch, read by the LLM segment by segment, with gradients through all of it.

A segment is a run of tokens of one row that ends where a control state is needed. It attends to
itself and to the keys and values of the row's segments before it, so that nothing is run twice.
Segments of several rows are run end to end in one row: however long they are and wherever they
are cut, nothing is padded, and padding of the batch is left out too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vpt.branches import Features
from vpt.errors import PositionError
from vpt.model.segment_layers import SegmentBatch, run_layer


@dataclass(frozen=True)
class Call:
    """A control token in a batch, and the images that are re-encoded for it."""

    branch: str
    row: int
    position: int
    looks: list[tuple[Features, Tensor]]  # features of an image, [N] positions of its pads


def in_rounds(calls: Iterable[Call]) -> list[list[Call]]:
    """The first call of every row, the second of every row that has two, and so on."""
    rounds: list[list[Call]] = []
    num_seen: dict[int, int] = {}
    for call in sorted(calls, key=lambda call: (call.row, call.position)):
        number = num_seen.setdefault(call.row, 0)
        num_seen[call.row] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(call)
    return rounds


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
        position_ids: ``[3, B, S]``.

    Raises:
        PositionError: if the LLM has sliding-window layers.
    """

    def __init__(
        self, language_model: Any, attention_mask: Tensor | None, position_ids: Tensor
    ) -> None:
        self._language_model = language_model
        if "sliding_attention" in language_model.config.layer_types:
            raise PositionError("sliding-window attention is not supported where calls are read")
        self._position_ids = position_ids[-3:]  # a fourth axis in front would count packed texts
        _, *self._shape = self._position_ids.shape
        present = torch.ones(self._shape) if attention_mask is None else attention_mask.cpu()
        self._rows = [_Row(row.nonzero().flatten().tolist()) for row in present]

    def read(self, embeds: Tensor, until: Mapping[int, int], *, is_last: bool = False) -> None:
        """Read some rows on.

        Args:
            embeds: ``[B, S, D]`` of the whole streams; what has been read is not looked at.
            until: row -> place in front of which to stop.
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
        batch = SegmentBatch(
            [(len(span), row.num_read) for span, row in zip(spans, rows, strict=True)],
            self._language_model.rotary_emb(hidden, positions),
            hidden.dtype,
            is_last,
        )
        for index, layer in enumerate(self._language_model.layers):
            past = [tensor for row in rows if row.num_read for tensor in row.past[index]]
            hidden, *kept = run_layer(layer, batch, hidden, past)
            for row, pair in zip(rows, zip(kept[::2], kept[1::2], strict=True), strict=False):
                row.past[index : index + 1] = [pair]
        states = self._language_model.norm(hidden)[0].split([len(span) for span in spans])
        for row, span, values in zip(rows, spans, states, strict=True):
            row.states.append(values)
            row.num_read += len(span)

    def last_state(self, row: int) -> Tensor:
        """``[D]`` final hidden state of the last token that was read of a row.

        Raises:
            PositionError: if nothing of it was.
        """
        if not (states := self._rows[row].states):
            raise PositionError(f"a call stands at the start of row {row}; nothing precedes it")
        return states[-1][-1]

    def restart(self, rows: Iterable[int]) -> None:
        """Forget what was read of these rows, so that they are read from their start."""
        for row in rows:
            self._rows[row] = _Row(self._rows[row].columns)

    def hidden_states(self) -> Tensor:
        """``[B, S, D]`` final hidden states of all that was read; 0 at padding."""
        read = [(number, row) for number, row in enumerate(self._rows) if row.num_read]
        places = self._flat_places(
            [number for number, _ in read], [row.columns[: row.num_read] for _, row in read]
        )
        states = torch.cat([values for _, row in read for values in row.states])
        hidden = states.new_zeros(self._shape[0] * self._shape[1], states.shape[-1])
        return hidden.index_copy(0, places, states).unflatten(0, self._shape)

    def _flat_places(self, numbers: Sequence[int], spans: Sequence[Sequence[int]]) -> Tensor:
        """Places in the batch, rows end to end, of columns of some rows."""
        pairs = zip(numbers, spans, strict=True)
        places = [number * self._shape[1] + column for number, span in pairs for column in span]
        return torch.tensor(places, device=self._position_ids.device)
