"""Confidence intervals of means and tests of paired scores, by scipy, which is imported late."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vpt.errors import DataError

NUM_RESAMPLES = 2000
NUM_FLIPS = 9999
"""Sign flips drawn; where there are no more than so many, all are tried: up to 13 pairs."""

_LEVEL = 0.95
_CHUNK = 2**21  # random numbers held at once
_DECIMALS = 12  # sums equal so far are ties; the rest is rounding

Float64Array = NDArray[np.float64]
Values = Sequence[float] | ArrayLike


@dataclass(frozen=True)
class Interval:
    """A mean of ``n`` values with its 95 % confidence interval.

    A bootstrap of very few values is too narrow, and that of a single one has no width.
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
    """A two-sided test, ``"mcnemar"`` or ``"sign_flip"``, that two runs are equally good."""

    name: str
    p_value: float


def mean_interval(values: Values, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Interval:
    """Mean of values: Wilson's interval if each is 0 or 1, otherwise a percentile bootstrap.

    Raises:
        DataError: if there are no values, or one is not finite; so do the functions below.
    """
    checked = _checked(values)
    if _is_binary(checked):
        return wilson_interval(int(checked.sum()), len(checked))
    return _bootstrap(checked, seed, num_resamples)


def wilson_interval(num_right: int, n: int) -> Interval:
    """Interval of a share (Wilson 1927), which stays in [0, 1] and is sound for few values."""
    if n < 1 or not 0 <= num_right <= n:
        raise DataError(f"expected 0 <= successes <= trials, trials > 0; got {num_right} of {n}")
    from scipy.stats import binomtest

    found = binomtest(num_right, n).proportion_ci(_LEVEL, method="wilson")
    return Interval(num_right / n, float(found.low), float(found.high), n)


def difference_interval(a: Values, b: Values, *, num_resamples: int = NUM_RESAMPLES) -> Interval:
    """Mean of ``a - b``, by a bootstrap of the pairs; swapping gives the mirror image."""
    return _bootstrap(_differences(a, b), 0, num_resamples)


def paired_test(a: Values, b: Values) -> PairedTest:
    """Test pairs: by McNemar's test if each score is 0 or 1, otherwise by flipping signs."""
    differences = _differences(a, b)
    if _is_binary(_checked(a)) and _is_binary(_checked(b)):
        num_a, num_b = int((differences > 0).sum()), int((differences < 0).sum())
        return PairedTest("mcnemar", mcnemar_p(num_a, num_b))
    return PairedTest("sign_flip", sign_flip_p(differences))


def mcnemar_p(num_only_a: int, num_only_b: int) -> float:
    """Exact McNemar test (1947), two-sided, of pairs that only one run got right; 1 for none."""
    from scipy.stats import binomtest

    num_pairs = num_only_a + num_only_b
    return float(binomtest(num_only_a, num_pairs, 0.5).pvalue) if num_pairs else 1.0


def sign_flip_p(differences: Values, *, seed: int = 0) -> float:
    """Two-sided permutation test (Fisher 1935): were the runs equal, any sign were as likely."""
    moved = _checked(differences)
    moved = moved[moved != 0]
    if len(moved) < 2:  # either sign of a single one is as far from 0
        return 1.0
    from scipy.stats import permutation_test

    def distance(flipped: Float64Array, axis: int) -> Float64Array:
        return np.abs(flipped.sum(axis=axis)).round(_DECIMALS)

    found = permutation_test(
        (moved,),
        distance,
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_FLIPS,
        batch=max(_CHUNK // len(moved), 1),
        alternative="greater",
        random_state=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _bootstrap(values: Float64Array, seed: int, num_resamples: int) -> Interval:
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, mean, mean, 1)
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=num_resamples,
        batch=max(_CHUNK // len(values), 1),
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    # Means that were drawn, not interpolated ones: negated values give the exact mirror image.
    ends = (1 - _LEVEL) / 2, (1 + _LEVEL) / 2
    low, high = np.quantile(found.bootstrap_distribution, ends, method="nearest")
    return Interval(mean, float(low), float(high), len(values))


def _differences(a: Values, b: Values) -> Float64Array:
    first, second = _checked(a), _checked(b)
    if len(first) != len(second):
        raise DataError(f"expected pairs, got {len(first)} and {len(second)} values")
    return first - second


def _checked(values: Values) -> Float64Array:
    checked = np.asarray(values, dtype=np.float64)
    if checked.ndim != 1 or not len(checked):
        raise DataError(f"expected a list of at least one value, got shape {checked.shape}")
    if not np.isfinite(checked).all():
        raise DataError("expected finite values; leave out what has no score")
    return checked


def _is_binary(values: Float64Array) -> bool:
    return bool(((values == 0) | (values == 1)).all())
