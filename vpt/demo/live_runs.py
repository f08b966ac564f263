"""Runs that are watched: the trace of each as far as it has come, for several people at once."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence

from vpt.inference.request import Request
from vpt.runtime import Runtime, Snapshot


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
        """Answer requests side by side, images kept; closing the iterator ends the computation."""
        snapshots = self.runtime.watch_many(requests, batch_size=max(len(requests), 1))
        try:
            while True:
                with self._turn:
                    one = next(snapshots, None)
                if one is None:
                    return
                if one.trace and any(image.thumbnail is None for image in one.trace.images):
                    one.trace.keep_thumbnails(requests[one.index].images)
                yield one
        finally:
            with self._turn:
                snapshots.close()
