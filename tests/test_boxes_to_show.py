"""The region chosen for a box is the smallest whose crop shows it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt.boxes import GridBox, contains, crop_box_px, region_to_show
from vpt.errors import RegionError

sizes = st.tuples(st.integers(1, 700), st.integers(1, 700))
grids = st.sampled_from([1, 2, 3, 8])


@st.composite
def boxes_in(draw, size_wh):
    """A box with an area, of whole or broken pixels, inside an image."""
    sides = []
    for length in size_wh:
        points = st.one_of(st.integers(0, length), st.floats(0, length))
        low, high = sorted((draw(points), draw(points)))
        sides.append((low, high) if low < high else (0, length))
    (x0, x1), (y0, y1) = sides
    return x0, y0, x1, y1


def every_region(grid_size):
    cells = range(grid_size)
    spans = [(low, high) for low in cells for high in range(low, grid_size)]
    return [GridBox(x0, y0, x1, y1) for x0, x1 in spans for y0, y1 in spans]


def num_shown(region, grid_size):
    """Cells of a region's crop: one more on each side, as far as the grid goes."""
    x = min(region.x_max + 1, grid_size - 1) - max(region.x_min - 1, 0) + 1
    y = min(region.y_max + 1, grid_size - 1) - max(region.y_min - 1, 0) + 1
    return x, y


def num_named(region):
    return (region.x_max - region.x_min + 1) * (region.y_max - region.y_min + 1)


@settings(deadline=None)  # the first of a size makes a table
@given(st.data(), sizes, grids)
def test_the_crop_of_the_region_covers_the_box(data, size_wh, grid_size):
    box = data.draw(boxes_in(size_wh))
    region = region_to_show(box, size_wh, grid_size=grid_size)
    assert contains(crop_box_px(region, size_wh, grid_size=grid_size), box)


@settings(deadline=None)  # the first of a size makes a table
@given(st.data(), st.tuples(st.integers(8, 700), st.integers(8, 700)), grids)
def test_no_smaller_region_covers_the_box(data, size_wh, grid_size):
    box = data.draw(boxes_in(size_wh))
    chosen = region_to_show(box, size_wh, grid_size=grid_size)
    crop = crop_box_px(chosen, size_wh, grid_size=grid_size)
    for other in every_region(grid_size):
        other_crop = crop_box_px(other, size_wh, grid_size=grid_size)
        if not contains(other_crop, box):
            continue
        least, shown = num_shown(chosen, grid_size), num_shown(other, grid_size)
        assert least[0] <= shown[0] and least[1] <= shown[1]
        assert num_named(chosen) <= num_named(other) or shown != least
        assert other_crop == crop or not contains(crop, other_crop)


@pytest.mark.parametrize(
    ("box", "region"),
    [
        ((300, 300, 330, 330), (3, 3, 3, 3)),  # inside one cell: that cell, so it is in the middle
        ((0, 0, 10, 10), (0, 0, 0, 0)),
        ((110, 110, 150, 150), (0, 0, 0, 0)),  # the crop of the corner cell shows two cells
        ((790, 790, 800, 800), (7, 7, 7, 7)),
        ((100, 0, 700, 800), (2, 1, 5, 6)),  # the crop shows just the cells of the box
        ((0, 0, 800, 800), (1, 1, 6, 6)),
        ((210, 210, 390, 390), (2, 2, 2, 2)),  # two cells: of equals the one up and left
        ((210, 210, 399, 399), (3, 3, 3, 3)),  # or the one whose crop is nearer to the middle
        ((-50, 300, 30, 330), (0, 3, 0, 3)),  # what lies outside is ignored
    ],
)
def test_regions_of_boxes_worked_out_by_hand(box, region):
    assert region_to_show(box, (800, 800)) == GridBox(*region)


@pytest.mark.parametrize("box", [(10, 10, 10, 20), (900, 0, 950, 10), (20, 0, 10, 10)])
def test_a_box_that_covers_nothing_is_refused(box):
    with pytest.raises(RegionError, match="covers nothing of an image of 800x800 px"):
        region_to_show(box, (800, 800))


def test_a_box_that_is_not_finite_is_refused():
    with pytest.raises(RegionError, match="expected four finite numbers"):
        region_to_show((0, 0, float("nan"), 5), (80, 80))
