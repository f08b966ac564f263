import math

import pytest

from vpt.data.rows import clean_cell


@pytest.mark.parametrize(
    ("value", "cleaned"),
    [
        (3.0, 3),
        (-0.0, 0),
        (3.5, 3.5),
        (math.nan, None),
        (None, None),
        (True, True),
        ("3.0", "3.0"),
        ("nan", "nan"),
        (b"x", b"x"),
        ([3.0, math.nan], [3, None]),
        ({"answers": [1.0, {"id": math.nan}]}, {"answers": [1, {"id": None}]}),
    ],
)
def test_a_cell_is_what_its_author_wrote(value, cleaned):
    result = clean_cell(value)
    assert result == cleaned
    assert type(result) is type(cleaned)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300])
def test_floats_that_are_no_integers_of_a_column_stay(value):
    assert isinstance(clean_cell(value), float)
