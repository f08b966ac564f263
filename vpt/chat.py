"""A chat: questions that continue one token stream, so that earlier looks stay in sight."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from vpt.answer import Answer
from vpt.errors import PromptError, RunError
from vpt.images import LoadedImage
from vpt.inference.conversation import Conversation, Transcript
from vpt.inference.events import ErrorEvent, Event, StopEvent
from vpt.inference.request import Message, Request
from vpt.trace.records import save_traces


@dataclass(frozen=True, eq=False)
class _Past:
    """What was said so far; replaced as a whole, so that it is never half of a question."""

    messages: tuple[Message, ...] = ()
    transcript: Transcript | None = None
    answers: tuple[Answer, ...] = ()


class Chat:
    """A conversation with a model, made by :meth:`vpt.runtime.Runtime.chat`.

    A question costs what it appends: the stream so far is kept, and if it had to give way to
    others, it is read again. A question that fails, or whose events are not read to their end,
    leaves the chat as it was.

    Args:
        runtime: a :class:`vpt.runtime.Runtime`.
        images: shown with the first question.
        options: of each question, unless it has its own; see :meth:`vpt.runtime.Runtime.request`.
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
        """Restart with the images that the chat began with; a running question is not added."""
        self._past = _Past()

    @property
    def answers(self) -> list[Answer]:
        """All answers so far."""
        return list(self._past.answers)

    @property
    def messages(self) -> Sequence[Message]:
        """All turns so far, without the calls."""
        return self._past.messages

    @property
    def num_images(self) -> int:
        """Images of the stream, given and cut out: indices of ``look_at``."""
        before = self._past.transcript
        return len(self._first_images if before is None else before.images)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the traces of all answers; see :func:`vpt.trace.records.load_traces`."""
        save_traces([answer.trace for answer in self._past.answers], path)

    def ask(self, question: str, images: Any = (), **options: Any) -> Answer:
        """Ask the next question, with further images if any; see ``Runtime.request`` for errors.

        Raises:
            VPTError: if the question cannot be used, or its run fails.
        """
        *_, last = self.stream(question, images, **options)
        assert isinstance(last, StopEvent), "a stream that does not fail ends with it"
        return Answer.from_trace(last.trace)

    def stream(self, question: str, images: Any = (), **options: Any) -> Iterator[Event]:
        """Ask the next question and get events as they happen; the last is a ``StopEvent``."""
        return self._stream(self.request(question, images, **options))

    def request(self, question: str, images: Any = (), **options: Any) -> Request:
        """Check the next question, for :meth:`watch`; arguments and errors as for :meth:`ask`."""
        past, loaded = self._past, self._runtime.load_images(images)
        if past.transcript is None:
            loaded = [*self._first_images, *loaded]
        elif "system" in options:
            raise PromptError("system: a chat has one system turn; give it with the first question")
        options = {**self._options, **options}
        request = Request.of(loaded, question, options, history=past.messages)
        prepared: Request = self._runtime.prepare(request, past.transcript)
        return prepared

    def watch(self, request: Request, *others: Request) -> Generator[Any]:
        """Answer a question of :meth:`request`, and others at the same time, outside of the chat.

        Yields:
            :class:`vpt.runtime.Snapshot`, that of the question with index 0.

        Raises:
            RunError: if the chat is answering another question, or has done so since the request
                was made.
        """
        if not self._running.acquire(blocking=False):
            raise RunError("this chat is answering another question; ask when it has ended")
        try:
            past = self._past
            if [*map(id, request.history)] != [*map(id, past.messages)]:
                raise RunError("the chat has changed since this question was made; ask it again")
            conversation = self._runtime.take(request, past.transcript)
            conversation.keep = True
            runs = [conversation, *others]
            with closing(self._runtime.watch_many(runs, batch_size=len(runs))) as snapshots:
                for one in snapshots:
                    if one.index == 0 and isinstance(one.event, StopEvent):
                        self._add(past, conversation)
                    yield one
        finally:
            self._running.release()

    def _stream(self, request: Request) -> Iterator[Event]:
        with closing(self.watch(request)) as snapshots:
            for one in snapshots:
                if isinstance(one.event, ErrorEvent):
                    raise one.event.error
                yield one.event

    def _add(self, past: _Past, conversation: Conversation) -> None:
        request, trace = conversation.request, conversation.recorder.trace
        trace.keep_thumbnails(request.all_images)
        messages = (*request.messages, Message("assistant", trace.answer))
        answers = (*past.answers, Answer.from_trace(trace))
        new = _Past(messages, conversation.transcript, answers)
        if self._past is past:  # else it was reset in the meantime
            self._past = new
