"""A chat: questions that continue one token stream, so that earlier looks stay in sight."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from vpt.answer import Answer
from vpt.errors import RunError
from vpt.images import LoadedImage
from vpt.inference.conversation import Transcript
from vpt.inference.events import ErrorEvent, Event, StopEvent
from vpt.inference.request import Message


class Chat:
    """A conversation with a model, made by :meth:`vpt.runtime.Runtime.chat`.

    A question costs what it appends: the stream so far is kept, and if it had to give way to
    others, it is read again. A question that fails, or whose events are not read to their end,
    leaves the chat as it was.

    Args:
        runtime: a :class:`vpt.runtime.Runtime`.
        images: shown with the first question.
        options: of each question, unless it has its own; see :meth:`vpt.runtime.Runtime.request`.

    Attributes:
        answers: so far.
    """

    def __init__(
        self, runtime: Any, images: Sequence[LoadedImage], options: Mapping[str, Any]
    ) -> None:
        self._runtime = runtime
        self._options = dict(options)
        self._first_images = list(images)
        self._running = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the images that the chat began with."""
        self.answers: list[Answer] = []
        self._messages: list[Message] = []
        self._transcript: Transcript | None = None

    @property
    def messages(self) -> Sequence[Message]:
        """All turns so far, without the calls."""
        return tuple(self._messages)

    @property
    def num_images(self) -> int:
        """Images of the stream, given and cut out: indices of ``look_at``."""
        before = self._transcript
        return len(self._first_images if before is None else before.images)

    def ask(self, question: str, images: Any = (), **options: Any) -> Answer:
        """Ask the next question, with further images if any; see ``Runtime.request`` for errors.

        Raises:
            VPTError: if the question cannot be used, or its run fails.
        """
        for _ in self.stream(question, images, **options):
            pass
        return self.answers[-1]

    def stream(self, question: str, images: Any = (), **options: Any) -> Iterator[Event]:
        """Ask the next question and get events as they happen; the last is a ``StopEvent``."""
        before = self._transcript
        loaded = self._runtime.load_images(images)
        if before is None:
            loaded = [*self._first_images, *loaded]
        request = self._runtime.request(
            loaded, question, history=self._messages, **{**self._options, **options}
        )
        return self._stream(self._runtime.converse(request, before))

    def _stream(self, conversation: Any) -> Iterator[Event]:
        if not self._running.acquire(blocking=False):
            raise RunError("this chat is answering another question; ask when it has ended")
        try:
            conversation.keep = True
            with closing(self._runtime.watch_many([conversation], batch_size=1)) as snapshots:
                for one in snapshots:
                    if isinstance(one.event, ErrorEvent):
                        raise one.event.error
                    if isinstance(one.event, StopEvent):
                        self._add(conversation)
                    yield one.event
        finally:
            self._running.release()

    def _add(self, conversation: Any) -> None:
        request, trace = conversation.request, conversation.recorder.trace
        self._transcript = conversation.transcript
        self._messages += [request.messages[-1], Message("assistant", trace.answer)]
        given = [image for message in self._messages for image in message.images]
        trace.keep_thumbnails(given)
        self.answers.append(Answer.from_trace(trace))
