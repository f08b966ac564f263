"""The thread that runs the model: requests enter from any thread, events come out of it."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from vpt.errors import RunError, VPTError, as_vpt_error
from vpt.inference.engine import Engine
from vpt.inference.events import ErrorEvent, Event, Exchange, StopEvent
from vpt.inference.request import Sampling
from vpt.inference.scheduler import Scheduler

logger = logging.getLogger(__name__)

Sink = Callable[[Event], None]
"""Takes the events of a request, in the worker's thread; must not wait."""


class Worker:
    """Owns an engine and its scheduler; the thread begins with the first request.

    Requests are served in the order in which they come; as many run at once as the engine has
    slots. All methods may be called from any thread.

    Attributes:
        engine: only to be used elsewhere while no request runs.
        error: what broke the thread, or ``None``; then no request is taken any more.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: VPTError | None = None
        self._scheduler = Scheduler(engine, engine.num_slots)
        self._sinks: dict[int, Sink] = {}
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._keys = itertools.count()
        self._thread: threading.Thread | None = None
        self._state = threading.RLock()  # of the thread: a request is taken before it ends, or not

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._scheduler.active)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._sinks) - self.num_running

    def submit(
        self, conversation: Exchange, sampling: Sampling, sink: Sink, *, keep: bool = False
    ) -> int:
        """Run a conversation; returns the key to cancel it by.

        ``keep`` its stream for a follow-up question.

        The last event is a ``StopEvent`` or an ``ErrorEvent``, unless it is cancelled. A sink that
        raises cancels its request.

        Raises:
            RunError: if the thread has ended with an error.
        """
        key = next(self._keys)

        def add() -> None:
            self._sinks[key] = sink
            self._scheduler.add(key, conversation, sampling, keep=keep)

        with self._state:
            if self.error is not None:
                raise RunError(f"the model's thread has ended: {self.error}") from self.error
            self._commands.put(add)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vpt-model", daemon=True)
                self._thread.start()
        return key

    def cancel(self, *keys: int) -> None:
        """End requests that still run; their slots are free when this returns."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            return  # it has ended all, perhaps with the interpreter
        done = threading.Event()

        def drop() -> None:
            for key in keys:
                if self._sinks.pop(key, None) is not None:
                    self._scheduler.cancel(key)
            done.set()

        self._commands.put(drop)
        if threading.current_thread() is not thread:
            while not done.wait(0.1) and thread.is_alive():
                pass

    def stop(self) -> None:
        """End the thread; requests that still run end with an error."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            return
        self._commands.put(None)
        if threading.current_thread() is not thread:
            thread.join()

    def _run(self) -> None:
        error: VPTError = RunError("the runtime was closed before the request had ended")
        try:
            while self._take_commands():
                for key, event in self._scheduler.round():
                    self._deliver(key, event)
        except Exception as exc:
            logger.exception("the model's thread has ended with an error")
            error = self.error = as_vpt_error(exc)
        finally:
            self._end(error)

    def _take_commands(self) -> bool:
        """Do what was asked; waits while there is nothing else to do. False to stop."""
        while not self._commands.empty() or not self._scheduler.has_work:
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _deliver(self, key: int, event: Event) -> None:
        is_last = isinstance(event, StopEvent | ErrorEvent)
        if (sink := self._sinks.pop(key, None) if is_last else self._sinks.get(key)) is None:
            return  # it raised at an earlier event of this round
        try:
            sink(event)
        except Exception:
            logger.exception("nobody takes the events of a request, which is cancelled")
            self._sinks.pop(key, None)
            self._scheduler.cancel(key)

    def _end(self, error: VPTError) -> None:
        """Answer every request with what ended the thread."""
        with self._state:
            while not self._commands.empty():
                if (command := self._commands.get()) is not None:
                    command()
            self._thread = None
            try:
                self._scheduler.close()
            finally:
                for key in list(self._sinks):
                    self._deliver(key, ErrorEvent(error))
