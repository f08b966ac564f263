"""An axis of a chart: where along it, in percent of its length, a value lies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers.

    Attributes:
        low: at 0 percent.
        high: at 100 percent; above ``low``.
    """

    low: float
    high: float

    def at(self, value: float) -> float:
        """Percent along the axis; what lies beyond an end is put there."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 3)

    def ticks(self) -> list[float]:
        """Five values, evenly spaced, both ends among them."""
        return [self.low + (self.high - self.low) * step / 4 for step in range(5)]


def axis_from_zero(values: Iterable[float]) -> Axis:
    """From 0 (or below, if need be) to 1, or to a round number above every value."""
    listed = list(values)
    low, high = min([0.0, *listed]), max([1.0, *listed])
    return Axis(-_round_up(-low) if low < 0 else 0.0, 1.0 if high <= 1 else _round_up(high))


def axis_around_zero(values: Iterable[float]) -> Axis:
    """With 0 in the middle, to a round number beyond every value."""
    reach = _round_up(max([0.01, *map(abs, values)]))
    return Axis(-reach, reach)


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 4, 5, 8, 10) if power * step >= value * (1 - 1e-9))
