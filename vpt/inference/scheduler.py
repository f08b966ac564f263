"""Continuous batching: many conversations over one engine, each at its own pace.

In each round all waiting images are encoded together, one pass of bounded length reads prompts and
results of calls of all streams that have any, and all streams with one token take a step together.
A conversation that ends, or fails, makes room for the next at once.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from vpt.errors import NonFiniteError, VPTError, as_vpt_error
from vpt.inference.engine import Encoded, Engine, Prefill
from vpt.inference.events import Append, ErrorEvent, Event, Exchange, Step
from vpt.inference.request import Sampling
from vpt.inference.sampling import Choice
from vpt.inference.stream import Extension, Stream
from vpt.model.generation import NOT_FINITE, NOT_FINITE_WORDS
from vpt.model.processing import TokenPiece

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
Key = Any
"""Names a conversation to its caller."""


@dataclass(eq=False)
class _Active:
    """A conversation that holds a stream."""

    key: Key
    conversation: Exchange
    sampling: Sampling
    stream: Stream
    pending: Append
    keep: bool = False
    prefill: Prefill | None = None
    encode_ms: float = 0.0
    num_chosen: int = 0

    @property
    def choice(self) -> Choice:
        return Choice(self.pending.rule, self.sampling, self.num_chosen)


class Scheduler:
    """Runs conversations, up to ``batch_size`` at once, in the order in which they were added.

    An error that one of them raises, or that is raised while the engine works for it, ends that one
    with an ``ErrorEvent``; its slot is freed and the others continue. What fails for several
    together is tried for each alone.
    """

    def __init__(self, engine: Engine, batch_size: int) -> None:
        self.engine = engine
        self.batch_size = batch_size
        self.active: list[_Active] = []
        self.waiting: deque[tuple[Key, Exchange, Sampling, bool]] = deque()
        self._events: list[tuple[Key, Event]] = []

    @property
    def has_work(self) -> bool:
        """Whether a round would do anything."""
        return bool(self.active or self.waiting)

    def add(
        self, key: Key, conversation: Exchange, sampling: Sampling, *, keep: bool = False
    ) -> None:
        """Add a conversation, which is begun as soon as there is room.

        ``keep`` its stream, once it has ended, for one that begins the same way.
        """
        self.waiting.append((key, conversation, sampling, keep))

    def cancel(self, key: Key) -> None:
        """End a conversation, if it is there, without a further event of it; its slot is free."""
        for one in [one for one in self.active if one.key == key]:
            one.conversation.close()
            self._end(one)
        for entry in [entry for entry in self.waiting if entry[0] == key]:
            self.waiting.remove(entry)
            entry[1].close()
        self._events = [event for event in self._events if event[0] != key]

    def close(self) -> None:
        """Cancel all."""
        for key in [*(one.key for one in self.active), *(entry[0] for entry in self.waiting)]:
            self.cancel(key)

    @torch.inference_mode()
    def round(self) -> list[tuple[Key, Event]]:
        """Do a bounded amount of work for all; returns the events in the order they happened."""
        self._admit()
        self._prefill()
        self._decode()
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        while self.waiting and len(self.active) < self.batch_size:
            if self.active and not self.engine.num_free_slots:
                return
            key, conversation, sampling, keep = self.waiting.popleft()
            try:
                stream = self.engine.open()
            except VPTError as exc:  # somebody else holds all slots
                conversation.close()
                self._events.append((key, ErrorEvent(exc)))
                continue
            one = _Active(key, conversation, sampling, stream, Append((), None), keep)
            self.active.append(one)
            self._advance(one, None)

    def _prefill(self) -> None:
        waiting = [one for one in self.active if one.prefill is None and not self._is_step(one)]
        for ones, (encoded, encode_ms) in self._groups(waiting, self._encode):
            for one, features in zip(ones, encoded, strict=True):
                one.encode_ms = encode_ms
                begun = self._alone(
                    one, self.engine.begin, one.stream, one.pending.pieces, features
                )
                one.prefill = begun[0] if begun else None
        reading = [one for one in self.active if one.prefill is not None]
        for ones, _ in self._groups(reading, lambda ones: self.engine.prefill(_prefills(ones))):
            done = [one for one in ones if one.prefill and one.prefill.extension]
            for some, ids in self._groups(done, self._choose):
                for one, token_id, log_prob in zip(some, ids, self._score(some, ids), strict=True):
                    self._finish_prefill(one, token_id, log_prob)

    def _finish_prefill(self, one: _Active, token_id: int, log_prob: float | None) -> None:
        extension = _extension(one)
        one.prefill = None
        if one.num_chosen == 0 and token_id != NOT_FINITE:
            self._keep(one)  # others may share the prompt
        step = Step(
            token_id,
            num_tokens=len(extension.token_ids),
            num_reused=extension.num_reused,
            images=extension.images,
            encode_ms=one.encode_ms,
            run_ms=extension.run_ms,
            is_last=one.stream.is_full,
            log_prob=log_prob,
        )
        self._advance(one, step)

    def _decode(self) -> None:
        stepping = [one for one in self.active if one.prefill is None and self._is_step(one)]
        started = time.perf_counter()
        for ones, ids in self._groups(stepping, self._step):
            run_ms = (time.perf_counter() - started) * 1e3
            for one, token_id, log_prob in zip(ones, ids, self._score(ones, ids), strict=True):
                is_last = one.stream.is_full
                self._advance(
                    one, Step(token_id, run_ms=run_ms, is_last=is_last, log_prob=log_prob)
                )

    def _encode(self, ones: Sequence[_Active]) -> tuple[list[Encoded], float]:
        started = time.perf_counter()
        encoded = self.engine.encode([one.pending.pieces for one in ones])
        return encoded, (time.perf_counter() - started) * 1e3

    def _choose(self, ones: Sequence[_Active]) -> list[int]:
        return self.engine.choose([_extension(o).logits for o in ones], [o.choice for o in ones])

    def _step(self, ones: Sequence[_Active]) -> list[int]:
        ids = [one.pending.pieces[0].ids[0] for one in ones]  # type: ignore[union-attr]
        return self.engine.decode([one.stream for one in ones], ids, [o.choice for o in ones])

    def _score(self, ones: Sequence[_Active], ids: Sequence[int]) -> list[float | None]:
        """Log-probabilities of chosen tokens, where they were asked for."""
        found: list[float | None] = [None] * len(ones)
        if asked := [index for index, one in enumerate(ones) if one.pending.scored]:
            streams, choices = [ones[i].stream for i in asked], [ones[i].choice for i in asked]
            scores = self.engine.log_probs(streams, [ids[i] for i in asked], choices)
            for index, log_prob in zip(asked, scores, strict=True):
                found[index] = log_prob
        return found

    def _is_step(self, one: _Active) -> bool:
        pieces = one.pending.pieces
        if len(pieces) != 1 or not isinstance(pieces[0], TokenPiece):
            return False
        ids = pieces[0].ids
        return len(ids) == 1 and not self.engine.is_action(ids[0])

    def _advance(self, one: _Active, step: Step | None) -> None:
        """Resume a conversation up to its next Append, or its end."""
        if step is not None:
            one.num_chosen += 1
            if step.token_id == NOT_FINITE:
                self._fail(one, NonFiniteError(NOT_FINITE_WORDS))
                return
        while True:
            try:
                item = one.conversation.send(step)
            except StopIteration:
                if one.keep:
                    self._keep(one)
                self._end(one)
                return
            except Exception as exc:
                self._fail(one, exc)
                return
            if isinstance(item, Append):
                one.pending = item
                return
            self._events.append((one.key, item))
            step = None

    def _keep(self, one: _Active) -> None:
        try:
            self.engine.keep(one.stream)
        except Exception as exc:  # memory, most likely; the answer does not need it
            logger.warning("a prefix could not be kept: %s: %s", type(exc).__name__, exc)

    def _end(self, one: _Active) -> None:
        self.active.remove(one)
        self.engine.close(one.stream)

    def _fail(self, one: _Active, exc: Exception) -> None:
        """End a conversation with an error, and let go of what its frames hold."""
        one.conversation.close()
        self._end(one)
        traceback.clear_frames(exc.__traceback__)
        self._events.append((one.key, ErrorEvent(as_vpt_error(exc))))

    def _alone(self, one: _Active, work: Callable[..., _T], *args: Any) -> list[_T]:
        """The result of work for one, which fails if the work does: then there is none."""
        try:
            return [work(*args)]
        except Exception as exc:
            self._fail(one, exc)
            return []

    def _groups(
        self, ones: list[_Active], work: Callable[[list[_Active]], _T]
    ) -> list[tuple[list[_Active], _T]]:
        """Results of work for all together, or if that fails for each alone, each with its own."""
        if len(ones) > 1:
            try:
                return [(ones, work(ones))]
            except Exception:
                logger.info("work for %d streams failed; each is tried alone", len(ones))
        return [([one], result) for one in ones for result in self._alone(one, work, [one])]


def _prefills(ones: Sequence[_Active]) -> list[Prefill]:
    return [one.prefill for one in ones if one.prefill is not None]


def _extension(one: _Active) -> Extension:
    assert one.prefill is not None and one.prefill.extension is not None
    return one.prefill.extension
