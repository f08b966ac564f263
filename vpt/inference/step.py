"""One decoding step: ids in, ids out, over fixed buffers; on CUDA captured as a graph.

:meth:`DecodingStep.forward` is the step. It runs eagerly on a CPU, over exactly the streams that
take a step. On CUDA the same function is captured once per number of slots and length (powers of
two), the first time that it is needed; rows of slots that take no step write to a place that nobody
reads. The host sends one tensor of integers and one of numbers, and reads one row of ids.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpt.inference.cache import SlotRun, slot_runs
from vpt.inference.decoder import Decoder
from vpt.inference.sampling import TENSORS, Choice, Choices, RuleTable, choose, pack
from vpt.inference.stream import Stream

logger = logging.getLogger(__name__)

_LEAST_LENGTH = 256  # places that a captured step reads at least


@dataclass(frozen=True)
class _Reading:
    """What a step reads: ``[4, B]`` ids, positions, places and last places; and the runs."""

    inputs: Tensor
    runs: tuple[SlotRun, ...]


class DecodingStep:
    """Reads one token of each of several streams and chooses the next ones."""

    def __init__(self, decoder: Decoder, embed: Any, head: Any, rules: RuleTable) -> None:
        self._decoder, self._embed, self._head, self._rules = decoder, embed, head, rules
        self._device = embed.weight.device
        self._graphs: dict[tuple[int, int, bool, bool], _Graph] = {}
        self._captures = self._device.type == "cuda"
        self.pool: Any = None  # memory that the captured steps share

    def forward(
        self, inputs: Tensor, runs: Sequence[SlotRun], choices: Choices
    ) -> tuple[Tensor, Tensor]:
        """Ids ``[B]`` and final states ``[B, D]``; ``inputs`` as in :class:`_Reading`."""
        logits, states = self._read(inputs, runs)
        return choose(logits, choices, self._rules), states

    def _read(self, inputs: Tensor, runs: Sequence[SlotRun]) -> tuple[Tensor, Tensor]:
        ids, positions, places, last = inputs
        states = self._decoder.step(self._embed(ids), positions, places, last, runs)
        return self._head(states), states

    def logits(self, streams: Sequence[Stream], ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits ``[B, V]`` and final states, without a choice; streams ordered by slot."""
        reading = self._reading(streams, ids)
        return self._read(reading.inputs, reading.runs)

    def ids(
        self, streams: Sequence[Stream], ids: Sequence[int], choices: Sequence[Choice]
    ) -> tuple[list[int], Tensor]:
        """Chosen ids and final states ``[B, D]``; streams ordered by slot."""
        if self._captures:
            try:
                return self._replay(streams, ids, choices)
            except RuntimeError as exc:
                self._captures = False
                logger.warning("decoding runs without CUDA graphs: %s", exc)
        reading = self._reading(streams, ids)
        chosen, states = self.forward(reading.inputs, reading.runs, pack(choices, self._rules))
        return chosen.tolist(), states

    def _reading(self, streams: Sequence[Stream], ids: Sequence[int]) -> _Reading:
        columns = [self._column(one, token_id) for one, token_id in zip(streams, ids, strict=True)]
        slots, lengths = [one.slot for one in streams], [one.length + 1 for one in streams]
        return _Reading(self._inputs(columns), slot_runs(slots, lengths))

    def _column(self, stream: Stream, token_id: int) -> list[int]:
        """Inputs of a stream, see :class:`_Reading`; its slot is about to be written to."""
        cache = self._decoder.cache
        cache.note_written(stream.slot, stream.length + 1)
        place = cache.place(stream.slot, stream.length)
        return [token_id, stream.position, place, stream.length]

    def _inputs(self, columns: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(columns).T.contiguous().to(self._device, non_blocking=True)

    def _replay(
        self, streams: Sequence[Stream], ids: Sequence[int], choices: Sequence[Choice]
    ) -> tuple[list[int], Tensor]:
        cache = self._decoder.cache
        slots = [one.slot for one in streams]
        num_rows = _power_of_two(max(slots) + 1, 1, cache.num_slots)
        longest = max(one.length for one in streams) + 1
        length = _power_of_two(longest, _LEAST_LENGTH, cache.capacity)
        columns = [[0, 0, cache.place(slot, -1), 0] for slot in range(num_rows)]  # of idle slots
        wanted = [Choice()] * num_rows
        for one, token_id, choice in zip(streams, ids, choices, strict=True):
            columns[one.slot], wanted[one.slot] = self._column(one, token_id), choice
        inputs, packed = self._inputs(columns), pack(wanted, self._rules)
        key = (num_rows, length, packed.samples, packed.sorts)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self, inputs, length, packed)
        chosen, states = self._graphs[key].replay(inputs, packed)
        all_ids = chosen.tolist()
        return [all_ids[slot] for slot in slots], states[slots]


class _Graph:
    """A captured step, with its own input and output tensors."""

    def __init__(self, step: DecodingStep, inputs: Tensor, length: int, choices: Choices) -> None:
        started = time.perf_counter()
        num_rows = inputs.shape[1]
        runs = (SlotRun(slice(0, num_rows), slice(0, num_rows), length, is_even=False),)
        self._inputs, self._choices = inputs.clone(), _cloned(choices)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up outside of the capture
            for _ in range(2):
                step.forward(self._inputs, runs, self._choices)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=step.pool):
            self._ids, self._states = step.forward(self._inputs, runs, self._choices)
        step.pool = self._graph.pool()
        ms = (time.perf_counter() - started) * 1e3
        logger.info("captured a step of %d rows and %d places in %.0f ms", num_rows, length, ms)

    def replay(self, inputs: Tensor, choices: Choices) -> tuple[Tensor, Tensor]:
        """Run the step; what it returns is overwritten by the next one."""
        self._inputs.copy_(inputs)
        for one in TENSORS:
            getattr(self._choices, one).copy_(getattr(choices, one))
        self._graph.replay()
        return self._ids, self._states


def _cloned(choices: Choices) -> Choices:
    tensors = {name: getattr(choices, name).clone() for name in TENSORS}
    return Choices(**tensors, samples=choices.samples, sorts=choices.sorts)


def _power_of_two(least: int, smallest: int, largest: int) -> int:
    """The smallest power of two of at least ``least``, within bounds."""
    return min(max(1 << (least - 1).bit_length(), smallest), largest)
