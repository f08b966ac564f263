"""Requests on their way through the model's thread: admission, events in the loop, cancellation."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from vpt.images import LoadedImage
from vpt.inference.conversation import Conversation
from vpt.inference.events import (
    CallEvent,
    ContentEvent,
    ErrorEvent,
    Event,
    ResultEvent,
    TokenEvent,
)
from vpt.runtime import Runtime
from vpt.serving.metrics import Metrics
from vpt.serving.schema import APIError
from vpt.trace.records import CallRecord, ContentRecord, Trace
from vpt.view.wording import call_text, content_text, count_text

logger = logging.getLogger(__name__)

T = TypeVar("T")
Timed = tuple[Event, float]
"""An event and the time at which it happened."""

MAX_PIXELS_IN_FLIGHT = 2**30
"""Pixels of the images of all requests together; 3 GB of memory."""


@dataclass(frozen=True)
class Delta:
    """What an answer gained; without text, call and content nothing happened for a while."""

    text: str = ""
    call: dict[str, Any] | None = None
    content: dict[str, Any] | None = None
    reasoning: str = ""


class Desk:
    """Takes requests for one runtime, as many as it and its queue hold.

    Attributes:
        is_draining: no further request is taken.
    """

    def __init__(self, runtime: Runtime, max_queue: int) -> None:
        self.runtime = runtime
        self.worker = runtime.worker
        self.metrics = Metrics(self.worker)
        self.is_draining = False
        self.num_open = 0
        self._most = self.worker.engine.num_slots + max_queue
        self.num_pixels = 0
        self.lock = threading.Lock()
        self.inbox = Inbox()
        self._loading = ThreadPoolExecutor(4, "vpt-load")
        self._cancelling = ThreadPoolExecutor(1, "vpt-cancel")

    def check(self) -> None:
        """Raise ``APIError`` if no request can be taken now."""
        if self.worker.error is not None:
            raise APIError(503, "the model's thread has ended; the server must be started again")
        if self.is_draining:
            raise APIError(503, "the server is shutting down", retry_after_s=5)
        if self.num_open >= self._most:
            raise APIError(
                429,
                f"the queue is full: {self.num_open} requests run or wait; try again later",
                code="queue_full",
                retry_after_s=1,
            )

    async def in_pool(self, work: Callable[..., T], *args: Any) -> T:
        """Do work that takes a while, such as decoding images, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._loading, work, *args)

    def cancel(self, key: int) -> None:
        """Cancel a request of the worker without waiting for it."""
        self._cancelling.submit(self.worker.cancel, key)

    def close(self) -> None:
        """End the threads for loading and cancelling."""
        self._loading.shutdown(wait=False, cancel_futures=True)
        self._cancelling.shutdown(wait=False)


class Inbox:
    """Carries events from the model's thread to the loop.

    Many events take one wake-up: each costs a system call, and a turn of Python's global lock.
    """

    def __init__(self) -> None:
        self._events: deque[tuple[asyncio.Queue[Timed], Timed]] = deque()
        self._is_awake = False

    def put(
        self,
        loop: asyncio.AbstractEventLoop,
        queue: asyncio.Queue[Timed],
        event: Event,
        wakes: bool,
    ) -> None:
        """Send an event; one that does not wake the loop comes with the next that does."""
        self._events.append((queue, (event, time.perf_counter())))
        if wakes and not self._is_awake:
            self._is_awake = True
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_awake = False
        while self._events:
            queue, timed = self._events.popleft()
            queue.put_nowait(timed)


class Ticket:
    """A request's place among those that run or wait; leaving the context gives it back."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._num_pixels = 0
        self._is_open = True

    def reserve(self, image: LoadedImage) -> None:
        """Reserve memory for an image; raise ``APIError`` if those of others fill it."""
        wanted = image.size_wh[0] * image.size_wh[1]
        with self._desk.lock:
            if not self._is_open:
                raise APIError(499, "the client has left")
            total = self._desk.num_pixels + wanted
            if total > MAX_PIXELS_IN_FLIGHT:
                if self._num_pixels == self._desk.num_pixels:  # nobody else has images
                    raise APIError(400, "the images are too large together", "messages")
                raise APIError(503, "the images of other requests fill the memory", retry_after_s=2)
            self._desk.num_pixels = total
            self._num_pixels += wanted

    def __enter__(self) -> Ticket:
        self._desk.check()
        self._desk.num_open += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._desk.num_open -= 1
        with self._desk.lock:
            self._is_open = False
            self._desk.num_pixels -= self._num_pixels


class Run:
    """One conversation in the model's thread, its events taken in the event loop.

    Args:
        stops: texts that end the answer.
        silence_s: seconds after which :meth:`deltas` yields an empty one.
        is_live: whether text is wanted as it comes.

    Attributes:
        text: the answer, when it has ended.
        finish_reason: ``"stop"`` or ``"length"``.
        stop_reason: that of the trace, or the text of ``stops`` that ended it.
    """

    def __init__(
        self,
        desk: Desk,
        conversation: Conversation,
        stops: Sequence[str] = (),
        silence_s: float = 10,
        is_live: bool = True,
    ) -> None:
        self.conversation = conversation
        self.text = self.finish_reason = self.stop_reason = ""
        self._desk = desk
        self._silence_s = silence_s
        self._text = _Text(stops)
        self._started = self._last = time.perf_counter()
        self._is_over = False
        self._queue: asyncio.Queue[Timed] = asyncio.Queue()
        loop, sees_tokens = asyncio.get_running_loop(), bool(is_live or stops)

        def sink(event: Event) -> None:
            wakes = sees_tokens or not isinstance(event, TokenEvent)
            desk.inbox.put(loop, self._queue, event, wakes)

        request = conversation.request
        self._key = desk.worker.submit(
            conversation.run(), request.sampling, sink, keep=conversation.keep
        )

    @property
    def trace(self) -> Trace:
        """The record so far."""
        return self.conversation.recorder.trace

    async def deltas(self) -> AsyncGenerator[Delta]:
        """What the answer gains, up to its end; leaving early cancels the request.

        Raises:
            VPTError: if the request failed.
        """
        try:
            while not self._is_over:
                try:
                    timed = await self._next()
                except (TimeoutError, asyncio.TimeoutError):
                    yield Delta()
                    continue
                for delta in self._read(*timed):
                    yield delta
        finally:
            if not self._is_over:
                self._desk.cancel(self._key)

    async def _next(self) -> Timed:
        if not self._queue.empty():  # a timer costs as much as the rest
            return self._queue.get_nowait()
        return await asyncio.wait_for(self._queue.get(), self._silence_s)

    def _read(self, event: Event, now: float) -> list[Delta]:
        if isinstance(event, ErrorEvent):
            self._is_over = True
            raise event.error
        if isinstance(event, TokenEvent):
            return self._add_token(event, now)
        if isinstance(event, ContentEvent):
            return [Delta(content=content_fields(event.content), reasoning=_wrote(event.content))]
        if isinstance(event, CallEvent) and event.call.is_answered:
            return []  # its result follows
        if isinstance(event, CallEvent | ResultEvent):
            return [Delta(call=call_fields(self.trace, event.call), reasoning=_looked(event.call))]
        self._is_over = True
        reason = event.trace.stop_reason
        self._end(event.trace.answer, "length" if reason == "length" else "stop", reason)
        rest = self._text.end()
        return [Delta(rest)] if rest else []

    def _add_token(self, event: TokenEvent, now: float) -> list[Delta]:
        metrics, is_first = self._desk.metrics, self.trace.tokens[:1] == [event.token]
        (metrics.first_token if is_first else metrics.inter_token).observe(now - self._last)
        self._last = now
        text = self._text.add(event.token.turn, event.text)
        if (stop := self._text.stopped_by) is not None:
            self._is_over = True
            self._desk.cancel(self._key)
            self._end(self._text.turn_text.strip(), "stop", stop)
        return [Delta(text)] if text else []

    def _end(self, text: str, finish_reason: str, stop_reason: str) -> None:
        self.text, self.finish_reason, self.stop_reason = text, finish_reason, stop_reason
        self._desk.metrics.add_run(self.trace, time.perf_counter() - self._started, finish_reason)


class _Text:
    """Text of a growing answer, held back while it may be white space at an end, or a stop text.

    Attributes:
        turn_text: of the current turn, up to a stop text.
        stopped_by: the stop text that was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._turn = 0
        self._num_shown = 0  # characters of the turn
        self._has_shown = False
        self.turn_text = ""
        self.stopped_by: str | None = None

    def add(self, turn: int, text: str) -> str:
        """Add text of a token of a turn; returns what can be shown."""
        if turn != self._turn:
            self._turn, self._num_shown, self.turn_text = turn, 0, ""
        start = len(self.turn_text)
        self.turn_text += text
        places = [
            (self.turn_text.find(stop, max(start - len(stop) + 1, 0)), stop) for stop in self._stops
        ]
        if found := [one for one in places if one[0] >= 0]:
            place, self.stopped_by = min(found)
            self.turn_text = self.turn_text[:place]
            return self._show(len(self.turn_text))
        held = max((_overlap(self.turn_text, stop) for stop in self._stops), default=0)
        return self._show(len(self.turn_text) - held)

    def end(self) -> str:
        """The rest, when the answer has ended."""
        return self._show(len(self.turn_text))

    def _show(self, end: int) -> str:
        end = len(self.turn_text[:end].rstrip())
        shown = self.turn_text[self._num_shown : end]
        if not self._num_shown:
            shown = shown.lstrip()
        if not shown:
            return ""
        between = "\n" if self._has_shown and not self._num_shown else ""
        self._num_shown, self._has_shown = end, True
        return between + shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that a stop text begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def call_fields(trace: Trace, call: CallRecord) -> dict[str, Any]:
    """A call as it is sent to clients."""
    return {
        "index": next(i for i, one in enumerate(trace.calls) if one is call),
        "branch": call.branch,
        "image": call.image,
        "region": call.region,
        "box_xyxy_px": call.box_xyxy_px,
        "tokens": call.num_tokens,
        "ms": round(call.encode_ms + call.run_ms, 1),
        "outcome": call.outcome,
        **({} if call.phrase is None else {"phrase": call.phrase}),
    }


def content_fields(content: ContentRecord) -> dict[str, Any]:
    """A depth map or boxes as they are sent to clients, without the picture."""
    fields = asdict(content)
    del fields["picture"]
    return fields


def _looked(call: CallRecord) -> str:
    if call.outcome != "executed":
        return f"[wanted to look again: {call_text(call)}; {call.outcome.replace('_', ' ')}]\n"
    box = "" if call.box_xyxy_px is None else f" → box {','.join(map(str, call.box_xyxy_px))}"
    tokens = count_text(call.num_tokens, "token")
    where = f"{call_text(call)}{box} of image {call.image}"
    return f"[looks again: {where}, {tokens}, {call.encode_ms + call.run_ms:.0f} ms]\n"


def _wrote(content: ContentRecord) -> str:
    return f"[writes: {content_text(content)}]\n"


def usage(trace: Trace, names: tuple[str, str] = ("prompt", "completion")) -> dict[str, Any]:
    """Token counts; results of calls are part of the prompt."""
    read, counts = names[0], trace.counts
    total = counts.prompt_tokens + counts.appended_tokens
    images = sum(one.num_tokens for one in trace.images)  # given ones and crops
    images += sum(call.num_tokens for call in trace.calls if call.result_image is None)
    return {
        f"{read}_tokens": total,
        f"{names[1]}_tokens": counts.generated_tokens,
        "total_tokens": total + counts.generated_tokens,
        f"{read}_tokens_details": {
            "cached_tokens": counts.reused_tokens,
            "image_tokens": images,
            "text_tokens": total - images,
        },
        f"{names[1]}_tokens_details": {"reasoning_tokens": 0},
    }
