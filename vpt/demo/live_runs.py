"""Runs that are watched: the trace of each as far as it has come, for several people at once."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from vpt.boxes import PixelBox
from vpt.images import LoadedImage, from_pixels
from vpt.inference.conversation import (
    CallEvent,
    ContentEvent,
    Event,
    ResultEvent,
    StopEvent,
    TokenEvent,
)
from vpt.inference.request import Request
from vpt.runtime import Runtime
from vpt.trace.records import CallRecord, Trace


@dataclass(frozen=True)
class Snapshot:
    """A run at the moment when something has happened.

    Attributes:
        index: of the request.
        event: what has happened.
        trace: the record so far, images included; it goes on growing unless ``event`` is an
            ``ErrorEvent``.
    """

    index: int
    event: Event
    trace: Trace


class LiveRuns:
    """Lets several threads ask one runtime; they take turns, token by token.

    Args:
        runtime: answers all of them.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        # Reentrant: collecting an abandoned run in the middle of another closes it.
        self._turn = threading.RLock()

    def watch(self, requests: Sequence[Request]) -> Generator[Snapshot]:
        """Answer requests side by side; closing the iterator ends the computation."""
        runs = [_GrowingTrace(self.runtime, request) for request in requests]
        events = self.runtime.stream_many(requests, batch_size=max(len(requests), 1))
        try:
            while True:
                with self._turn:
                    found = next(events, None)
                if found is None:
                    return
                index, event = found
                runs[index].take(event)
                yield Snapshot(index, event, runs[index].trace)
        finally:
            with self._turn:
                events.close()  # type: ignore[attr-defined]


class _GrowingTrace:
    """The record of a run, built from its events until the last one brings the whole."""

    def __init__(self, runtime: Runtime, request: Request) -> None:
        self._given = list(request.images)
        self.trace = Trace(
            request.question,
            request.perception,
            settings={"grid_size": runtime.vocabulary.grid_size},
            model=dict(runtime.description),
        )
        for image in self._given:
            self.trace.add_image(image)
        self.trace.keep_thumbnails(self._given)

    def take(self, event: Event) -> None:
        """Take in what has happened."""
        trace = self.trace
        if isinstance(event, TokenEvent):
            is_fresh = not trace.tokens or trace.tokens[-1].turn != event.token.turn
            trace.answer = event.text.lstrip() if is_fresh else trace.answer + event.text
            trace.tokens.append(event.token)
        elif isinstance(event, ContentEvent):
            trace.content.append(event.content)
        elif isinstance(event, CallEvent):
            trace.calls.append(event.call)
        elif isinstance(event, ResultEvent):
            self._add_crop(event.call)
        elif isinstance(event, StopEvent):
            self.trace = event.trace
            self.trace.keep_thumbnails(self._given)

    def _add_crop(self, call: CallRecord) -> None:
        if call.box_xyxy_px is None:
            return
        crop = _cut(self._given[self.trace.root(call.image)], call.box_xyxy_px)
        self.trace.add_image(crop, parent=call.image, box_xyxy_px=call.box_xyxy_px)
        self.trace.keep_thumbnails(self._given)


def _cut(image: LoadedImage, box: PixelBox) -> LoadedImage:
    return from_pixels(image.pixels.crop(box), image.source)
