"""What a detector and a segmenter share: a source that is loaded when needed, and kept results."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

from vpt.errors import PromptError

Source = TypeVar("Source")
Key = TypeVar("Key", bound=Hashable)
Found = TypeVar("Found")


class Finder(Generic[Source, Key, Found]):
    """Finds something in images, from any number of threads.

    Attributes:
        name: path, id, or class of the source; empty without one.
    """

    _lacking: str  # message without a source
    _most_kept: int  # results

    def __init__(
        self,
        source: str | os.PathLike[str] | Source | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._source, self._device = source, device
        self.name = "" if source is None else type(source).__qualname__
        if isinstance(source, str | os.PathLike):
            self.name = os.fspath(source)
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, Found] = OrderedDict()

    def check(self) -> None:
        """Raise ``PromptError`` if there is no source."""
        if self._source is None:
            raise PromptError(self._lacking)

    def load(self) -> Source:
        """Load the source, unless that was done.

        Raises:
            CheckpointError: if it cannot be loaded.
            PromptError: if there is none.
        """
        self.check()
        with self._lock:
            if isinstance(self._source, str | os.PathLike):
                self._source = self._load(os.fspath(self._source), self._device)
            assert self._source is not None  # or check would have refused
            return self._source

    @staticmethod
    def _load(source: str, device: torch.device | str) -> Source:
        raise NotImplementedError

    def _find(self, key: Key, find: Callable[[], Found]) -> Found:
        """What is kept of recent questions, or else found now, one question at a time."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = find()
            self._kept.move_to_end(key)
            if len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
            return self._kept[key]
