"""Prefixes of streams, kept for requests that begin the same way.

A stream is described by its *atoms*: token ids, and for each placeholder of an image a negative
number that stands for the image and its preprocessing. A request whose atoms begin like those of a
kept stream begins with a copy of its keys and values instead of a prefill.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

DEFAULT_PREFIX_BYTES = 512 * 2**20
_LEAST_SHARE = 4  # less than a fourth of a prompt is not worth a mask in its attention
_LEAST_REUSED = 16  # tokens
_MOST_KEPT = 128  # streams, however small
_MOST_NUMBERED = 4096  # images


@dataclass
class Atoms:
    """What a stream consists of, as far as it has been read.

    Attributes:
        ids: of tokens; of placeholders the number of their image.
        uncut: ``(low, high)``: a prefix may not end after ``low`` to ``high - 1`` atoms, which
            would be within an image, or between a call's start token and its features.
        saved: ``(end, positions)``: an image that ends there takes so many positions less than
            tokens.
        states: ``(index, branch, control state [D])`` of each action token.
    """

    ids: list[int] = field(default_factory=list)
    uncut: list[tuple[int, int]] = field(default_factory=list)
    saved: list[tuple[int, int]] = field(default_factory=list)
    states: list[tuple[int, str, Tensor]] = field(default_factory=list)

    def position(self, length: int) -> int:
        """M-RoPE position after the first ``length`` atoms."""
        return length - sum(positions for end, positions in self.saved if end <= length)

    def cut(self, length: int) -> int:
        """Length of the longest prefix of at most ``length`` atoms that a stream may begin with."""
        for low, high in reversed(self.uncut):
            if low <= length < high:
                length = low - 1
        return max(length, 0)

    def conditions(self, length: int) -> dict[str, Tensor]:
        """Branch -> control state of its latest call among the first ``length`` atoms."""
        return {branch: state for index, branch, state in self.states if index < length}


@dataclass(frozen=True)
class Kept:
    """A kept stream: its atoms, and its keys and values ``[num_layers, 2, length, H_kv, d]``."""

    atoms: Atoms
    ids: NDArray[np.int64]
    cache: Tensor


def common_length(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    differ = (one[:length] != other[:length]).nonzero()[0]
    return int(differ[0]) if len(differ) else length


class PrefixStore:
    """Streams used recently, ``max_bytes`` of them at most.

    Attributes:
        num_reused: tokens that began a stream without a prefill.
    """

    def __init__(self, max_bytes: int = DEFAULT_PREFIX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_reused = 0
        self._kept: OrderedDict[int, Kept] = OrderedDict()
        self._alike: defaultdict[bytes, list[int]] = defaultdict(list)  # keys of equal beginnings
        self._next_key = 0
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()
        self._num_numbered = 0

    def number(self, image: Hashable) -> int:
        """The negative number that stands for an image under its preprocessing, and no other."""
        if image not in self._numbers:
            self._num_numbered += 1
            self._numbers[image] = -self._num_numbered
            if len(self._numbers) > _MOST_NUMBERED:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(image)
        return self._numbers[image]

    def find(
        self, ids: NDArray[np.int64], actions: Collection[int] = ()
    ) -> tuple[Kept, int] | None:
        """The kept stream that shares the longest usable beginning with ``ids``, and its length.

        At least one atom is left over: the one whose reading yields the next token. It is none of
        ``actions``, indices of action tokens, which need the state of the atom before them.
        """
        best: tuple[Kept, int] | None = None
        least = max(_LEAST_REUSED, len(ids) // _LEAST_SHARE)
        for key in self._keys_like(ids):
            kept = self._kept[key]
            if best is None or common_length(kept.ids[: best[1] + 1], ids) > best[1]:
                length = min(common_length(kept.ids, ids), len(ids) - 1)
                length = kept.atoms.cut(length - 1 if length in actions else length)
                if length >= least and (best is None or length > best[1]):
                    best, found = (kept, length), key
        if best is not None:
            self._kept.move_to_end(found)
            self.num_reused += best[1]
        return best

    def covers(self, ids: NDArray[np.int64], num_bytes: int) -> bool:
        """Whether keeping a stream of so many bytes would add nothing, or not fit."""
        if num_bytes > self.max_bytes or len(ids) < _LEAST_REUSED:
            return True
        alike = (self._kept[key].ids for key in self._keys_like(ids))
        return any(common_length(one, ids) == len(ids) for one in alike)

    def put(self, atoms: Atoms, cache: Tensor) -> None:
        """Keep a stream in place of its own beginnings; the least recently used give way."""
        ids = np.array(atoms.ids, dtype=np.int64)
        for key in [*self._keys_like(ids)]:
            if common_length(kept := self._kept[key].ids, ids) == len(kept):
                self._drop(key)
        self._kept[self._next_key] = Kept(atoms, ids, cache)
        self._alike[_start(ids)].append(self._next_key)
        self._next_key += 1
        self.num_bytes += cache.nbytes
        while self.num_bytes > self.max_bytes or len(self._kept) > _MOST_KEPT:
            self._drop(next(iter(self._kept)))

    def _keys_like(self, ids: NDArray[np.int64]) -> Sequence[int]:
        """Keys of streams that may share a usable beginning with ``ids``."""
        return self._alike.get(_start(ids), ())

    def _drop(self, key: int) -> None:
        kept = self._kept.pop(key)
        self.num_bytes -= kept.cache.nbytes
        alike = self._alike[_start(kept.ids)]
        alike.remove(key)
        if not alike:
            del self._alike[_start(kept.ids)]


def _start(ids: NDArray[np.int64]) -> bytes:
    return ids[:_LEAST_REUSED].tobytes()
