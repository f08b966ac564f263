"""The filters above a gallery: what can be chosen among the cards that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Shown = TypeVar("Shown")
Facts = Callable[[Shown], Mapping[str, str]]


@dataclass(frozen=True)
class Filter:
    """A choice above the gallery.

    Attributes:
        name: of the fact it filters by.
        label: in front of it.
        options: value, words and number of cards.
    """

    name: str
    label: str
    options: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Entry(Generic[Shown]):
    """A card with the facts it is filtered by."""

    card: Shown
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Gallery(Generic[Shown]):
    """Cards and their filters.

    Attributes:
        entries: in the order shown.
        filters: in the order shown; one with a single option is left out.
        num_all: of which the cards were chosen.
    """

    entries: Sequence[Entry[Shown]]
    filters: Sequence[Filter]
    num_all: int


def make_gallery(
    cards: Iterable[Shown],
    facts: Facts[Shown],
    labels: Mapping[str, str],
    words: Mapping[str, Mapping[str, str]],
    num_all: int,
) -> Gallery[Shown]:
    """Give cards their filters.

    Args:
        cards: in the order shown.
        facts: card -> fact -> value; an empty value is none.
        labels: fact -> label of its filter, in order.
        words: fact -> value -> words, where the value itself does not say it; also the order.
        num_all: of which the cards were chosen.
    """
    entries = [Entry(card, facts(card)) for card in cards]
    filters = []
    for name, label in labels.items():
        counts = Counter(entry.facts[name] for entry in entries if entry.facts[name])
        known = words.get(name, {})
        values = [*(v for v in known if v in counts), *sorted(v for v in counts if v not in known)]
        options = tuple((value, known.get(value, value), counts[value]) for value in values)
        if len(options) > 1:
            filters.append(Filter(name, label, options))
    return Gallery(entries, filters, num_all)
