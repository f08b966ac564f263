"""Conversations run in this thread over any engine, such as that of the released protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vpt.errors import VPTError
from vpt.inference.events import ErrorEvent, Event, Exchange
from vpt.inference.request import Sampling
from vpt.inference.scheduler import Scheduler


def drive(
    engine: Any, conversations: Iterable[tuple[Exchange, Sampling] | VPTError], batch_size: int
) -> Iterator[tuple[int, Event]]:
    """Run conversations to their ends in this thread, ``batch_size`` at once.

    Args:
        engine: with free slots.
        conversations: with the way their tokens are chosen, or the error for which there is none;
            taken up as room is made.
        batch_size: conversations at once.

    Yields:
        ``(index of the conversation, event)``, in the order things happen. Closing the iterator
        closes the streams.
    """
    scheduler, entries = Scheduler(engine, batch_size), enumerate(conversations)
    try:
        while True:
            while len(scheduler.active) + len(scheduler.waiting) < batch_size:
                if (entry := next(entries, None)) is None:
                    break
                index, given = entry
                if isinstance(given, VPTError):
                    yield index, ErrorEvent(given)
                else:
                    scheduler.add(index, *given)
            if not scheduler.has_work:
                return
            yield from scheduler.round()
    finally:
        scheduler.close()
