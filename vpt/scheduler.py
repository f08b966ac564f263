"""Continuous batching: many conversations over one engine, each at its own pace.

In each round all waiting branch encodes run together, then every stream that brings pieces is
extended, then all that bring one token take a step together. A conversation that ends makes room
for the next at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from vpt.controller import Append, Conversation, Event, Step
from vpt.decoding import Sampling
from vpt.engine import Engine, Extension, Stream
from vpt.processing import TokenPiece


@dataclass
class _Active:
    """A conversation that holds a stream."""

    index: int
    conversation: Conversation
    sampling: Sampling
    generator: torch.Generator | None
    stream: Stream
    pending: Append


def drive(
    engine: Engine, conversations: Iterable[tuple[Conversation, Sampling]], batch_size: int
) -> Iterator[tuple[int, Event]]:
    """Run conversations to their ends.

    Args:
        engine: with at least ``batch_size`` free slots.
        conversations: with the way their tokens are chosen; taken up as room is made.
        batch_size: conversations at once.

    Yields:
        ``(index of the conversation, event)``, in the order things happen. Streams are closed
        when the iterator is, also in the middle.
    """
    return _Scheduler(engine, batch_size).run(enumerate(conversations))


class _Scheduler:
    def __init__(self, engine: Engine, batch_size: int) -> None:
        self.engine = engine
        self.batch_size = batch_size
        self.active: list[_Active] = []

    def run(
        self, waiting: Iterator[tuple[int, tuple[Conversation, Sampling]]]
    ) -> Iterator[tuple[int, Event]]:
        try:
            while True:
                yield from self._admit(waiting)
                if not self.active:
                    return
                for one, step in self._round():
                    yield from self._advance(one, step)
        finally:
            for one in self.active:
                one.conversation.close()
                self.engine.close(one.stream)

    def _admit(
        self, waiting: Iterator[tuple[int, tuple[Conversation, Sampling]]]
    ) -> Iterator[tuple[int, Event]]:
        while len(self.active) < self.batch_size:
            entry = next(waiting, None)
            if entry is None:
                return
            index, (conversation, sampling) = entry
            one = _Active(
                index,
                conversation,
                sampling,
                sampling.generator(),
                self.engine.open(),
                Append((), None),
            )
            self.active.append(one)
            yield from self._advance(one, None)

    def _advance(self, one: _Active, step: Step | None) -> Iterator[tuple[int, Event]]:
        """Resume a conversation up to its next Append, or its end."""
        try:
            item = one.conversation.send(step)
            while not isinstance(item, Append):
                yield one.index, item
                item = next(one.conversation)
            one.pending = item
        except StopIteration:
            self.active.remove(one)
            self.engine.close(one.stream)

    @torch.inference_mode()
    def _round(self) -> list[tuple[_Active, Step]]:
        stepping = [one for one in self.active if self._is_step(one.pending)]
        extending = [one for one in self.active if not self._is_step(one.pending)]
        started = time.perf_counter()
        encoded = self.engine.encode([one.pending.pieces for one in extending])
        encode_ms = (time.perf_counter() - started) * 1e3
        done = []
        for one, features in zip(extending, encoded, strict=True):
            pending = one.pending
            extension = self.engine.extend(one.stream, pending.pieces, pending.reserve, features)
            token_id = self._choose(one, extension.logits)
            done.append((one, _to_step(token_id, extension, encode_ms)))
        if stepping:
            done += self._step(stepping)
        return done

    def _is_step(self, pending: Append) -> bool:
        if len(pending.pieces) != 1 or not isinstance(pending.pieces[0], TokenPiece):
            return False
        ids = pending.pieces[0].ids
        return len(ids) == 1 and not self.engine.is_action(ids[0])

    def _step(self, stepping: list[_Active]) -> list[tuple[_Active, Step]]:
        started = time.perf_counter()
        ids = [one.pending.pieces[0].ids[0] for one in stepping]  # type: ignore[union-attr]
        logits = self.engine.step([one.stream for one in stepping], ids)
        for one, row in zip(stepping, logits, strict=True):
            if one.pending.rule is not None:
                one.pending.rule.apply_(row)
        if all(one.generator is None for one in stepping):
            chosen = logits.argmax(-1).tolist()
        else:
            pairs = zip(stepping, logits, strict=True)
            chosen = [one.sampling.choose(row, one.generator) for one, row in pairs]
        run_ms = (time.perf_counter() - started) * 1e3
        steps = [Step(token_id, run_ms=run_ms) for token_id in chosen]
        return list(zip(stepping, steps, strict=True))

    def _choose(self, one: _Active, logits: torch.Tensor) -> int:
        if one.pending.rule is not None:
            logits = one.pending.rule.apply_(logits)
        return one.sampling.choose(logits, one.generator)


def _to_step(token_id: int, extension: Extension, encode_ms: float) -> Step:
    return Step(
        token_id,
        num_tokens=len(extension.token_ids),
        looks=extension.looks,
        encode_ms=extension.encode_ms + encode_ms,
        run_ms=extension.run_ms,
    )
