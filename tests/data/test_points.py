"""Points are apart, at clearly different depths, and marked where they are."""

from itertools import combinations

import numpy as np
import pytest
from aurora_samples import blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vpt.data.points import (
    LAYOUTS,
    Point,
    PointRule,
    draw_points,
    label_box_px,
    nearest,
    place_points,
    position_px,
)
from vpt.depth.maps import depth_at
from vpt.errors import DataError


def place(seed, num_points, rule, depth=None):
    depth = blocks(seed) if depth is None else depth
    return place_points(depth, num_points, rule, np.random.default_rng(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.sampled_from(LAYOUTS))
def test_points_keep_their_distances(seed, num_points, layout):
    rule = PointRule(layout, min_distance=0.1, min_difference=0.05)
    depth = blocks(seed)
    try:
        points = place(seed, num_points, rule, depth)
    except DataError as exc:
        assert "too few possible points" in str(exc)
        return
    assert "".join(point.letter for point in points) == "ABCDE"[:num_points]
    for one, other in combinations(points, 2):
        assert np.hypot(one.x - other.x, one.y - other.y) >= 0.1 * 336
        assert abs(one.depth - other.depth) >= 0.05 - 1e-3
    for point in points:
        assert point.depth == pytest.approx(depth_at(depth, point.x, point.y), abs=1e-4)
        low, high = (0.35, 0.65) if layout == "centre" else (0.08, 0.92)
        assert low * 336 <= point.y + 1 and point.y <= high * 336


def test_the_same_seed_gives_the_same_points():
    assert place(3, 4, PointRule()) == place(3, 4, PointRule())
    assert place(3, 4, PointRule()) != place(4, 4, PointRule(), blocks(3))


def test_letters_and_heights_give_nothing_away():
    placed = [place(seed, 3, PointRule("centre")) for seed in range(300)]
    letters = [nearest(points).letter for points in placed]
    ranks = [sorted(points, key=lambda p: -p.y).index(nearest(points)) for points in placed]
    for counts in ([letters.count(letter) for letter in "ABC"], [ranks.count(r) for r in range(3)]):
        assert min(counts) > 65, counts  # of 300: by chance 100 each


def test_too_few_possible_points_is_said():
    flat = np.full((40, 40), 0.5, np.float32)
    with pytest.raises(
        DataError, match=r"too few possible points: no 2 with a distance of 0\.12 of"
    ):
        place(0, 2, PointRule(), flat)
    with pytest.raises(DataError, match="expected 2 to 5 points, got 6"):
        place(0, 6, PointRule())


@pytest.mark.parametrize("rule", [("middle",), ("centre", 0), ("centre", 0.1, 1.0)])
def test_an_impossible_rule_is_refused(rule):
    with pytest.raises(DataError, match=r"unknown layout 'middle'|between 0 and 1"):
        PointRule(*rule)


coordinates, sides_px = st.integers(30, 305), st.integers(224, 500)


@settings(max_examples=40, deadline=None)
@given(coordinates, coordinates, sides_px, sides_px, st.floats(1, 2))
def test_a_circle_is_drawn_around_its_point(x, y, width, height, scale):
    photo = Image.new("RGB", (width, height), (40, 90, 40))
    point = Point("B", x, y, 0.5)
    marked = np.asarray(draw_points(photo, [point], scale)).astype(int)
    assert np.asarray(photo).std(axis=(0, 1)).max() == 0  # the photo is left as it is
    column, row = position_px(point, photo.size)
    reds = np.argwhere((marked[..., 0] > 150) & (marked[..., 1] < 90))
    middle = (reds.min(0) + reds.max(0)) / 2 + 0.5
    assert abs(middle - (row, column)).max() <= 1.6
    x0, y0, x1, y1 = label_box_px(point, photo.size, scale)
    assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
    label = marked[round(y0) : round(y1), round(x0) : round(x1)]
    assert label.min() < 30 and label.max() > 100  # a white letter on black


def test_letters_differ():
    photo = Image.new("RGB", (336, 336))
    drawn = {draw_points(photo, [Point(letter, 100, 100, 0)]).tobytes() for letter in "ABCDE"}
    assert len(drawn) == 5
