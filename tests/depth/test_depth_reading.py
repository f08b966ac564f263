"""What a map says about points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.depth.maps import answer_from_map
from vpt.errors import DataError

RIGHT_IS_NEAR = np.tile(np.linspace(0, 1, 320, dtype=np.float32), (320, 1))


def test_the_point_with_the_greatest_value_is_the_nearest():
    read = answer_from_map(RIGHT_IS_NEAR, {"A": (30, 10), "B": (300, 200), "C": (168, 330)})
    assert read.nearest == "B"
    assert list(read.depths) == ["A", "B", "C"]
    assert read.depths["B"] == pytest.approx(300 / 336, abs=0.01)
    assert read.lead == pytest.approx((300 - 168) / 336, abs=0.01)


def test_points_of_the_same_depth_have_no_nearest():
    read = answer_from_map(RIGHT_IS_NEAR, {"A": (50, 10), "B": (50, 300), "C": (9, 9)})
    assert read.nearest is None and read.lead == 0


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.lists(st.tuples(st.integers(0, 335), st.integers(0, 335)), min_size=2, max_size=5),
)
def test_every_point_of_the_grid_is_read_from_a_map_of_any_size(shape, places):
    depth = np.random.default_rng(0).random(shape, dtype=np.float32)
    read = answer_from_map(depth, {str(i): place for i, place in enumerate(places)})
    assert set(read.depths.values()) <= set(depth.flatten().tolist())
    assert read.nearest is None or read.depths[read.nearest] == max(read.depths.values())


def test_the_corners_of_the_grid_are_the_corners_of_the_map():
    depth = np.arange(6, dtype=np.float32).reshape(2, 3) / 5
    corners = {"A": (0, 0), "B": (335, 0), "C": (0, 335), "D": (335, 335)}
    read = answer_from_map(depth, corners)
    assert list(read.depths.values()) == pytest.approx([0, 0.4, 0.6, 1])
    assert answer_from_map(depth, {"A": (0, 0), "B": (7, 7)}, num_pixels=8).nearest == "B"


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"A": (1, 1)}, "expected at least two points to compare, got 1"),
        ({"A": (1, 1), "B": (336, 0)}, "point B is at 336, 0; expected 0 to 335"),
        ({"A": (1, -1), "B": (0, 0)}, "point A is at 1, -1; expected 0 to 335"),
    ],
)
def test_points_that_make_no_sense_are_refused(points, message):
    with pytest.raises(DataError, match=message):
        answer_from_map(RIGHT_IS_NEAR, points)
