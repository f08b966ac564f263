"""Continuous batching: many conversations over one engine, each at its own pace.

In each round all waiting images are encoded together, every stream with several tokens or images to
append is extended, and all with one token take a step together. A conversation that ends, or fails,
makes room for the next at once.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from vpt.errors import NonFiniteError, VPTError, as_vpt_error
from vpt.inference.engine import Encoded, Engine, Stream
from vpt.inference.events import Append, ErrorEvent, Event, Exchange, Step
from vpt.inference.request import Sampling
from vpt.model.generation import NOT_FINITE, NOT_FINITE_WORDS, apply_rule_, likeliest
from vpt.model.processing import TokenPiece

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_FLOAT32 = torch.finfo(torch.float32)


class Sampler:
    """Chooses the tokens of one stream from their logits."""

    def __init__(self, sampling: Sampling) -> None:
        self.is_greedy = sampling.temperature == 0
        self._sampling = sampling
        self._generator = torch.Generator()
        if not self.is_greedy:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """Draw one id from logits ``[V]``, in float32 on the CPU, so that devices agree.

        The result is ``NOT_FINITE`` if the largest logit is NaN or infinite.
        """
        if self.is_greedy:
            return int(likeliest(logits))
        logits = logits.float().cpu()
        if not (largest := logits.max()).isfinite():
            return NOT_FINITE
        # Differences to the largest: quotients of extreme temperatures stay numbers.
        temperature = min(max(self._sampling.temperature, _FLOAT32.tiny), _FLOAT32.max)
        scaled = (logits - largest) / temperature
        order = scaled.argsort(descending=True, stable=True)
        probabilities = scaled[order].softmax(-1)
        keep = probabilities.cumsum(-1) - probabilities < self._sampling.top_p
        if 0 < self._sampling.top_k < len(keep):
            keep[self._sampling.top_k :] = False
        keep[0] = True  # also where top_p is 0 in float32
        drawn = torch.multinomial(probabilities * keep, 1, generator=self._generator)
        return int(order[drawn])


@dataclass
class _Active:
    """A conversation that holds a stream."""

    index: int
    conversation: Exchange
    sampler: Sampler
    stream: Stream
    pending: Append


Waiting = Iterator[tuple[int, tuple[Exchange, Sampling] | VPTError]]


def drive(
    engine: Engine, conversations: Iterable[tuple[Exchange, Sampling] | VPTError], batch_size: int
) -> Iterator[tuple[int, Event]]:
    """Run conversations to their ends, ``batch_size`` at once, taken up as room is made.

    An error that one of them raises, or that is raised while the engine works for it, ends that one
    with an ``ErrorEvent``; its slot is freed and the others continue. What fails for several
    together is tried for each alone. Closing the iterator closes the streams.

    Args:
        engine: with at least ``batch_size`` free slots.
        conversations: with the way their tokens are chosen, or the error for which there is none.
        batch_size: conversations at once.

    Yields:
        ``(index of the conversation, event)``, in the order things happen.
    """
    return _Scheduler(engine, batch_size).run(enumerate(conversations))


class _Scheduler:
    def __init__(self, engine: Engine, batch_size: int) -> None:
        self.engine = engine
        self.active: list[_Active] = []
        self.batch_size = batch_size
        self.idle: list[Stream] = []
        self.failed: list[tuple[int, ErrorEvent]] = []  # not reported yet

    def run(self, waiting: Waiting) -> Iterator[tuple[int, Event]]:
        try:
            # All slots are taken at once: other runs of this engine may begin and end meanwhile.
            self.idle = [self.engine.open() for _ in range(self.batch_size)]
            while True:
                yield from self._admit(waiting)
                while self.failed:
                    yield self.failed.pop(0)
                if not self.active:
                    return
                for one, step in self._round():
                    yield from self._advance(one, step)
        finally:
            for one in self.active:
                one.conversation.close()
                self.engine.close(one.stream)
            for stream in self.idle:
                self.engine.close(stream)

    def _admit(self, waiting: Waiting) -> Iterator[tuple[int, Event]]:
        while self.idle:
            if (entry := next(waiting, None)) is None:
                return
            index, given = entry
            if isinstance(given, VPTError):
                yield index, ErrorEvent(given)
                continue
            conversation, sampling = given
            stream = self.idle.pop(0)
            one = _Active(index, conversation, Sampler(sampling), stream, Append((), None))
            self.active.append(one)
            yield from self._advance(one, None)

    def _advance(self, one: _Active, step: Step | None) -> Iterator[tuple[int, Event]]:
        """Resume a conversation up to its next Append, or its end."""
        if step is not None and step.token_id == NOT_FINITE:
            self._fail(one, NonFiniteError(NOT_FINITE_WORDS))
            return
        while True:
            try:
                item = one.conversation.send(step)
            except StopIteration:
                self._end(one)
                return
            except Exception as exc:
                self._fail(one, exc)
                return
            if isinstance(item, Append):
                one.pending = item
                return
            yield one.index, item
            step = None

    def _end(self, one: _Active) -> None:
        self.active.remove(one)
        self.engine.close(one.stream)
        self.idle.append(self.engine.open())

    def _fail(self, one: _Active, exc: Exception) -> None:
        """End a conversation with an error, and let go of what its frames hold."""
        one.conversation.close()
        self._end(one)
        traceback.clear_frames(exc.__traceback__)
        self.failed.append((one.index, ErrorEvent(as_vpt_error(exc))))

    @torch.inference_mode()
    def _round(self) -> list[tuple[_Active, Step]]:
        stepping = [one for one in self.active if self._is_step(one.pending)]
        extending = [one for one in self.active if not self._is_step(one.pending)]
        done: list[tuple[_Active, Step]] = []

        def step(ones: list[_Active]) -> Tensor:
            ids = [one.pending.pieces[0].ids[0] for one in ones]  # type: ignore[union-attr]
            return self.engine.step([one.stream for one in ones], ids)

        for ones, (encoded, encode_ms) in self._groups(extending, self._encode):
            for one, features in zip(ones, encoded, strict=True):
                steps = self._alone(one, self._extend, one, features, encode_ms)
                done += [(one, step) for step in steps]
        started = time.perf_counter()
        for ones, logits in self._groups(stepping, step):
            chosen = self._choose(ones, logits)
            run_ms = (time.perf_counter() - started) * 1e3
            done += [
                (one, Step(token_id, run_ms=run_ms, is_last=one.stream.is_full))
                for one, token_id in chosen
            ]
        return done

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

    def _is_step(self, pending: Append) -> bool:
        if len(pending.pieces) != 1 or not isinstance(pending.pieces[0], TokenPiece):
            return False
        ids = pending.pieces[0].ids
        return len(ids) == 1 and not self.engine.is_action(ids[0])

    def _encode(self, extending: list[_Active]) -> tuple[list[Encoded], float]:
        started = time.perf_counter()
        encoded = self.engine.encode([one.pending.pieces for one in extending])
        return encoded, (time.perf_counter() - started) * 1e3

    def _extend(self, one: _Active, features: Encoded, encode_ms: float) -> Step:
        pending = one.pending
        extension = self.engine.extend(one.stream, pending.pieces, pending.reserve, features)
        token_id = one.sampler.choose(_ruled(one, extension.logits))
        return Step(
            token_id,
            num_tokens=len(extension.token_ids),
            images=extension.images,
            encode_ms=encode_ms,
            run_ms=extension.run_ms,
            is_last=one.stream.is_full,
        )

    def _choose(self, ones: list[_Active], logits: Tensor) -> list[tuple[_Active, int]]:
        """Choose from rows of logits ``[B, V]``; all ids come over at once if all are greedy."""
        pairs = list(zip(ones, logits, strict=True))
        ruled = [(one, row) for one, row in pairs if self._alone(one, _ruled, one, row)]
        if len(ruled) == len(ones) and all(one.sampler.is_greedy for one in ones):
            return list(zip(ones, likeliest(logits).tolist(), strict=True))
        return [
            (one, token_id)
            for one, row in ruled
            for token_id in self._alone(one, one.sampler.choose, row)
        ]


def _ruled(one: _Active, logits: Tensor) -> Tensor:
    """Logits ``[V]`` with those of what may not come set to -inf, in place."""
    rule = one.pending.rule
    return logits if rule is None else apply_rule_(rule, logits)
