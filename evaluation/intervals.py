"""How sure a number is: intervals of means, and tests of paired scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vpt.errors import DataError

NUM_RESAMPLES = 2000
NUM_FLIPS = 9999
MOST_EXACT_FLIPS = 12  # pairs that differ, up to which every way to flip their signs is tried

_CHUNK = 2**21  # drawn numbers held at once
_TIE = 1e-9  # sums that differ by less are equal but for rounding

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean, with the interval in which it could as well lie.

    Attributes:
        mean: of the values.
        low: lower end.
        high: upper end.
        n: number of values. A bootstrap of very few values is narrower than it should be, and
            that of a single one has no width: look at ``n`` too.
    """

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float]:
        """JSON-serialisable content."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PairedTest:
    """A test of "both runs are equally good".

    Attributes:
        name: ``"mcnemar"`` or ``"sign_flip"``.
        p_value: two-sided.
    """

    name: str
    p_value: float


def mean_interval(
    values: Sequence[float] | ArrayLike,
    *,
    level: float = 0.95,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Mean of values: by Wilson's interval if each is 0 or 1, else by a bootstrap.

    The bootstrap (Efron 1979) takes the percentiles of the means of resampled values.

    Args:
        values: ``[n]``, at least one, finite.
        level: share of intervals that hold the true mean.
        seed: of the resampling.
        num_resamples: number of resampled means.

    Raises:
        DataError: if there are no values, or one is not finite.
    """
    checked = _checked(values)
    if _is_binary(checked):
        return wilson_interval(int(checked.sum()), len(checked), level=level)
    return _bootstrap(checked, level, seed, num_resamples)


def wilson_interval(num_right: int, n: int, *, level: float = 0.95) -> Interval:
    """Interval of a share (Wilson 1927), which stays in [0, 1] and is sound for few values.

    Args:
        num_right: successes.
        n: trials, at least one.
        level: share of intervals that hold the true share.

    Raises:
        DataError: if ``num_right`` is not in ``0..n``, or ``n`` is not positive.
    """
    if n < 1 or not 0 <= num_right <= n:
        raise DataError(f"expected 0 <= successes <= trials, trials > 0; got {num_right} of {n}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, weight = num_right / n, 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / weight
    reach = z / weight * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    low = 0.0 if num_right == 0 else centre - reach
    high = 1.0 if num_right == n else centre + reach
    return Interval(share, low, high, n)


def difference_interval(
    a: Sequence[float] | ArrayLike,
    b: Sequence[float] | ArrayLike,
    *,
    level: float = 0.95,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Mean of ``a - b`` over pairs, by a bootstrap of the pairs.

    ``difference_interval(b, a)`` is the exact mirror image.

    Args:
        a: ``[n]``, one value per pair.
        b: ``[n]``, in the same order.
        level: share of intervals that hold the true difference.
        seed: of the resampling.
        num_resamples: number of resampled means.

    Raises:
        DataError: if there are no pairs, lengths differ, or a value is not finite.
    """
    return _bootstrap(_differences(a, b), level, seed, num_resamples)


def paired_test(
    a: Sequence[float] | ArrayLike, b: Sequence[float] | ArrayLike, *, seed: int = 0
) -> PairedTest:
    """Test pairs: by McNemar's test if each score is 0 or 1, else by flipping signs.

    Args:
        a: ``[n]``, one score per pair.
        b: ``[n]``, in the same order.
        seed: of the drawn flips.

    Raises:
        DataError: if there are no pairs, lengths differ, or a value is not finite.
    """
    differences = _differences(a, b)
    if _is_binary(_checked(a)) and _is_binary(_checked(b)):
        num_a, num_b = int((differences > 0).sum()), int((differences < 0).sum())
        return PairedTest("mcnemar", mcnemar_p(num_a, num_b))
    return PairedTest("sign_flip", sign_flip_p(differences, seed=seed))


def mcnemar_p(num_only_a: int, num_only_b: int) -> float:
    """Exact McNemar test (1947): were both runs equal, each disagreement would be a coin toss.

    Args:
        num_only_a: pairs that only ``a`` got right.
        num_only_b: pairs that only ``b`` got right.

    Returns:
        Two-sided p-value; 1 if they never disagree.
    """
    n, fewer = num_only_a + num_only_b, min(num_only_a, num_only_b)
    term = total = 1  # binomial coefficients, exact: n may be thousands
    for k in range(fewer):
        term = term * (n - k) // (k + 1)
        total += term
    p_value: float = 2 * total / 2**n
    return min(p_value, 1.0)


def sign_flip_p(differences: Sequence[float] | ArrayLike, *, seed: int = 0) -> float:
    """Permutation test (Fisher 1935): were both runs equal, each difference could have either sign.

    All flips are tried for up to `MOST_EXACT_FLIPS` pairs that differ; otherwise `NUM_FLIPS` are
    drawn, and the one that was observed counts as one more.

    Args:
        differences: ``[n]``, one per pair.
        seed: of the drawn flips.

    Returns:
        Two-sided p-value; 1 if no pair differs.
    """
    moved = _checked(differences)
    moved = moved[moved != 0]
    if not len(moved):
        return 1.0
    least = abs(moved.sum()) - _TIE * np.abs(moved).sum()
    if len(moved) <= MOST_EXACT_FLIPS:
        ways = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float((np.abs((2 * ways - 1) @ moved) >= least).mean())
    generator, hits, left = np.random.default_rng(seed), 0, NUM_FLIPS
    while left:
        rows = min(left, max(_CHUNK // len(moved), 1))
        signs = 2 * generator.integers(0, 2, (rows, len(moved)), dtype=np.int8) - 1
        hits += int((np.abs(signs @ moved) >= least).sum())
        left -= rows
    return (hits + 1) / (NUM_FLIPS + 1)


def _bootstrap(values: Floats, level: float, seed: int, num_resamples: int) -> Interval:
    generator = np.random.default_rng(seed)
    means: Floats = np.empty(num_resamples)
    step = max(_CHUNK // len(values), 1)
    for start in range(0, num_resamples, step):
        rows = min(step, num_resamples - start)
        drawn = generator.integers(0, len(values), (rows, len(values)))
        means[start : start + rows] = values[drawn].mean(axis=1)
    means.sort()
    # Order statistics at equal distance from both ends, so that negated values give the mirror.
    cut = round((1 - level) / 2 * num_resamples)
    low, high = means[cut], means[num_resamples - 1 - cut]
    return Interval(float(values.mean()), float(low), float(high), len(values))


def _differences(a: Sequence[float] | ArrayLike, b: Sequence[float] | ArrayLike) -> Floats:
    first, second = _checked(a), _checked(b)
    if len(first) != len(second):
        raise DataError(f"expected pairs, got {len(first)} and {len(second)} values")
    return first - second


def _checked(values: Sequence[float] | ArrayLike) -> Floats:
    checked = np.asarray(values, dtype=np.float64)
    if checked.ndim != 1 or not len(checked):
        raise DataError(f"expected a list of at least one value, got shape {checked.shape}")
    if not np.isfinite(checked).all():
        raise DataError("expected finite values; leave out what has no score")
    return checked


def _is_binary(values: Floats) -> bool:
    return bool(((values == 0) | (values == 1)).all())
