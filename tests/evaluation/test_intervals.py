"""Intervals and paired tests: values worked out by hand, and what must hold of any."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt.errors import DataError
from vpt.evaluation.intervals import (
    NUM_FLIPS,
    Interval,
    difference_interval,
    mcnemar_p,
    mean_interval,
    paired_test,
    sign_flip_p,
    wilson_interval,
)

scores = st.floats(0, 1, allow_subnormal=False)
lists = st.lists(scores, min_size=1, max_size=20)
pairs = st.lists(st.tuples(scores, scores), min_size=1, max_size=20)


# Means


def test_wilson_by_hand():
    # 8 of 10, z = 1.959964: centre (0.8 + 0.19207) / 1.38415, reach 1.41595 * sqrt(0.0256036).
    interval = wilson_interval(8, 10)
    assert interval.mean == 0.8
    assert interval.low == pytest.approx(0.4901625, abs=1e-6)
    assert interval.high == pytest.approx(0.9433178, abs=1e-6)


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_wilson_at_the_ends_reaches_them_exactly(n):
    none, every = wilson_interval(0, n), wilson_interval(n, n)
    assert none.low == 0 and 0 < none.high < 1
    assert every.high == 1 and every.low == pytest.approx(1 - none.high)


def test_zeros_and_ones_are_given_wilsons_interval():
    assert mean_interval([1, 0, 1.0, True]) == wilson_interval(3, 4)
    assert mean_interval([1, 0, 0.5]).low == 0  # resampled: all three may be the 0


def test_equal_values_have_no_spread():
    assert mean_interval([0.25] * 4) == Interval(0.25, 0.25, 0.25, 4)
    assert mean_interval([0.3]).to_dict() == {"mean": 0.3, "low": 0.3, "high": 0.3, "n": 1}


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_values():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    interval = mean_interval(values, num_resamples=5000)
    reach = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - reach, abs=0.15 * reach)
    assert interval.high == pytest.approx(values.mean() + reach, abs=0.15 * reach)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    drawn = np.random.default_rng(2).uniform(size=(300, 40))
    held = [i.low <= 0.5 <= i.high for i in (mean_interval(v, num_resamples=400) for v in drawn)]
    assert 0.90 <= np.mean(held) <= 0.98


def test_the_seed_decides():
    values = np.random.default_rng(3).random(15)
    assert mean_interval(values, seed=4) == mean_interval(list(values), seed=4)
    assert mean_interval(values, seed=4) != mean_interval(values, seed=5)


def test_drawing_in_parts_changes_nothing_but_memory(monkeypatch):
    values = np.random.default_rng(3).random(50)
    whole = mean_interval(values)
    monkeypatch.setattr("vpt.evaluation.intervals._CHUNK", 1000)
    assert mean_interval(values) == whole


@settings(deadline=None, max_examples=40)
@given(lists)
def test_an_interval_lies_within_the_values_or_from_0_to_1(values):
    interval = mean_interval(values, num_resamples=100)
    assert 0 <= interval.low <= interval.high <= 1
    assert interval.n == len(values)


@pytest.mark.parametrize("values", [[], [[1, 2]], [math.nan], [0.5, math.inf]])
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(DataError, match="expected"):
        mean_interval(values)


@pytest.mark.parametrize(("num_right", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_an_impossible_share_is_refused(num_right, n):
    with pytest.raises(DataError, match="expected 0 <= successes <= trials"):
        wilson_interval(num_right, n)


# Differences


def test_a_constant_difference_is_certain():
    interval = difference_interval([0.5, 0.75, 1], [0.25, 0.5, 0.75])
    assert interval == Interval(0.25, 0.25, 0.25, 3)


def test_pairs_tell_more_than_two_means():
    rng = np.random.default_rng(0)
    easy = rng.random(50)
    paired = difference_interval(easy + 0.05 + 0.01 * rng.random(50), easy)
    assert 0.05 <= paired.low <= paired.high <= 0.06


@settings(deadline=None, max_examples=40)
@given(pairs)
def test_swapped_runs_give_the_exact_mirror(both):
    a, b = [x for x, _ in both], [y for _, y in both]
    there = difference_interval(a, b, num_resamples=100)
    back = difference_interval(b, a, num_resamples=100)
    assert (there.mean, there.low, there.high) == (-back.mean, -back.high, -back.low)
    assert paired_test(a, b) == paired_test(b, a)
    assert 0 < paired_test(a, b).p_value <= 1


@pytest.mark.parametrize("function", [difference_interval, paired_test])
def test_lists_of_different_length_are_no_pairs(function):
    with pytest.raises(DataError, match="expected pairs, got 2 and 3 values"):
        function([1, 0], [1, 0, 1])


# Tests of pairs


@pytest.mark.parametrize(
    ("num_a", "num_b", "p"),
    [
        (0, 0, 1),
        (3, 3, 1),  # 2 * 42 / 64 is above 1
        (5, 0, 2 / 32),
        (1, 7, 2 * (1 + 8) / 256),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar_by_hand(num_a, num_b, p):
    assert mcnemar_p(num_a, num_b) == mcnemar_p(num_b, num_a) == p


def test_mcnemar_of_thousands_agrees_with_the_normal_approximation():
    z = (2600 - 2400 - 1) / math.sqrt(5000)  # continuity corrected
    assert mcnemar_p(2600, 2400) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert mcnemar_p(3000, 0) < 1e-300


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([0.5], 1),  # both signs are as far from 0
        ([0.1, 0.1, 0.1], 2 / 8),
        ([0.1, 0.1, 0, 0, 0.1], 2 / 8),
        ([0.3, 0.2, -0.1], 4 / 8),  # sums 6, 4, 2, 0, each twice: |4| and |6| of eight
        ([0, 0], 1),
    ],
)
def test_sign_flips_by_hand(differences, p):
    assert sign_flip_p(differences) == p


def test_flips_are_all_tried_where_there_are_few():
    differences = [0.11, -0.52, 0.38, 0.07, 0.91, -0.05]
    sums = [abs(np.dot(s, differences)) for s in product([-1, 1], repeat=len(differences))]
    expected = np.mean([s >= abs(sum(differences)) - 1e-12 for s in sums])
    assert sign_flip_p(differences) == expected


def test_drawn_flips_agree_with_the_normal_approximation():
    differences = np.random.default_rng(5).normal(0.2, 1, 150)
    z = differences.sum() / math.sqrt((differences**2).sum())
    p = sign_flip_p(differences, seed=1)
    assert p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.02)
    assert p == sign_flip_p(differences, seed=1) == sign_flip_p(-differences, seed=1)


def test_a_drawn_p_value_is_never_zero():
    assert sign_flip_p([0.5] * 40) == 1 / (NUM_FLIPS + 1)


def test_the_kind_of_scores_chooses_the_test():
    assert paired_test([1, 1, 0, 1], [0, 1, 0, 0]).name == "mcnemar"
    assert paired_test([1, 1, 0, 1], [0, 1, 0, 0.5]).name == "sign_flip"


def test_equal_runs_are_called_different_about_as_often_as_allowed():
    rng = np.random.default_rng(6)
    p_values = [sign_flip_p(rng.normal(size=10)) for _ in range(400)]
    assert 0.02 <= np.mean([p <= 0.05 for p in p_values]) <= 0.08
