"""Which samples are shown: a fixed number, spread evenly over groups of unequal size."""

from __future__ import annotations

import hashlib
from bisect import insort
from collections import defaultdict
from collections.abc import Hashable
from typing import Generic, TypeVar

SEED = 0
Item = TypeVar("Item")


class EvenChoice(Generic[Item]):
    """Takes items one by one and keeps a bounded number of them.

    Each group ends with as many items as every other, as far as it has them. Within a group those
    stay whose key has the lowest hash: the same keys in each group, so that a sample is shown
    under all conditions or none.

    Args:
        most: items to keep at most; up to twice as many are held meanwhile.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.num_offered = 0
        self._groups: dict[Hashable, list[tuple[str, Item]]] = defaultdict(list)
        self._num_held = 0

    def offer(self, group: Hashable, key: str, item: Item) -> None:
        """Take an item, or pass it over.

        Args:
            group: that it belongs to.
            key: whose hash decides.
            item: to keep.
        """
        rank = hashlib.sha256(f"{SEED} {key}".encode("utf-8", "surrogatepass")).hexdigest()
        insort(self._groups[group], (rank, item), key=lambda entry: entry[0])
        self.num_offered += 1
        self._num_held += 1
        if self._num_held > 2 * self.most:
            self._trim()

    def chosen(self) -> list[Item]:
        """The items that were kept, group by group."""
        self._trim()
        return [item for group in self._groups.values() for _, item in group]

    def _trim(self) -> None:
        # What leaves the largest group now would have left it at the end too: groups only grow.
        while self._num_held > self.most:
            max(self._groups.values(), key=len).pop()
            self._num_held -= 1
