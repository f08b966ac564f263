"""Boxes: the released table, and round trips between all frames."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vpt.boxes import (
    Box,
    GridBox,
    clamp,
    compose,
    contains,
    coverage,
    crop_box_px,
    grid_box_covering,
    iou,
    rescale,
    to_unit,
)
from vpt.errors import RegionError

REGION_TABLE = Path(__file__).parent / "goldens" / "goldens" / "region_table.json"

sizes = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@st.composite
def grid_boxes(draw: st.DrawFn, grid_size: int = 8) -> GridBox:
    cells = st.integers(0, grid_size - 1)
    x_min, x_max = sorted((draw(cells), draw(cells)))
    y_min, y_max = sorted((draw(cells), draw(cells)))
    return GridBox(x_min, y_min, x_max, y_max)


@st.composite
def boxes_in(draw: st.DrawFn, size_wh: tuple[int, int]) -> tuple[int, int, int, int]:
    """Whole-pixel boxes with an area, inside an image."""
    x0 = draw(st.integers(0, size_wh[0] - 1))
    y0 = draw(st.integers(0, size_wh[1] - 1))
    x1 = draw(st.integers(x0 + 1, size_wh[0]))
    y1 = draw(st.integers(y0 + 1, size_wh[1]))
    return x0, y0, x1, y1


sizes_and_boxes = sizes.flatmap(lambda size: st.tuples(st.just(size), boxes_in(size)))


def released_crops() -> list[tuple[str, GridBox, tuple[int, int], list[int]]]:
    cases = []
    for entry in json.loads(REGION_TABLE.read_text())["entries"]:
        for crops in entry["crops"]:
            for region, crop in zip(entry["regions"], crops.get("boxes", ()), strict=False):
                if "error" in region:
                    continue
                grid_box = GridBox(*region["min"], *region["max"])
                cases.append((entry["name"], grid_box, tuple(crops["image_size"]), crop["box"]))
    return cases


def test_region_table_is_read_whole() -> None:
    entries = json.loads(REGION_TABLE.read_text())["entries"]
    num_regions = sum(
        len(entry["crops"]) for entry in entries for r in entry["regions"] or () if "min" in r
    )
    assert num_regions >= 80


@pytest.mark.parametrize(("name", "region", "size_wh", "expected"), released_crops())
def test_crop_box_equals_the_released_one(
    name: str, region: GridBox, size_wh: tuple[int, int], expected: list[int]
) -> None:
    assert list(crop_box_px(region, size_wh)) == expected


@given(grid_boxes(), sizes, st.integers(0, 8))
def test_crop_box_equals_the_released_formula_and_is_never_empty(
    region: GridBox, size_wh: tuple[int, int], margin: int
) -> None:
    width, height = size_wh
    x0, y0, x1, y1 = crop_box_px(region, size_wh, margin=margin)
    assert x0 == int(max(region.x_min - margin, 0) * (width / 8))
    assert y0 == int(max(region.y_min - margin, 0) * (height / 8))
    assert x1 == max(int(min(region.x_max + 1 + margin, 8) * (width / 8)), x0 + 1)
    assert y1 == max(int(min(region.y_max + 1 + margin, 8) * (height / 8)), y0 + 1)
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height


@pytest.mark.parametrize("cell", range(8))
def test_crop_of_a_one_pixel_image_is_that_pixel(cell: int) -> None:
    assert crop_box_px(GridBox(cell, cell, cell, cell), (1, 1), margin=0) == (0, 0, 1, 1)


@given(st.integers(1, 60), sizes)
def test_whole_grid_is_the_whole_image_for_every_grid_size(
    grid_size: int, size_wh: tuple[int, int]
) -> None:
    whole = GridBox(0, 0, grid_size - 1, grid_size - 1)
    assert crop_box_px(whole, size_wh, grid_size=grid_size) == (0, 0, *size_wh)


def test_region_beyond_the_grid_is_refused() -> None:
    with pytest.raises(RegionError, match=r"x_max=8.* does not fit a grid of 8x8 cells"):
        crop_box_px(GridBox(0, 0, 8, 0), (100, 100))
    with pytest.raises(RegionError, match="does not fit a grid of 4x4 cells"):
        crop_box_px(GridBox(0, 0, 0, 4), (100, 100), grid_size=4)


def test_negative_margin_is_refused() -> None:
    with pytest.raises(RegionError, match="margin of at least 0 cells, got -1"):
        crop_box_px(GridBox(0, 0, 1, 1), (100, 100), margin=-1)


@pytest.mark.parametrize("cells", [(-1, 0, 0, 0), (0, -1, 0, 0), (2, 0, 1, 0), (0, 2, 0, 1)])
def test_impossible_grid_box_is_refused(cells: tuple[int, int, int, int]) -> None:
    with pytest.raises(RegionError, match=r"0 <= min <= max on both axes, got GridBox\("):
        GridBox(*cells)


@given(sizes_and_boxes, st.integers(1, 20))
def test_covering_region_covers_the_box_and_no_smaller_one_does(
    size_and_box: tuple[tuple[int, int], tuple[int, int, int, int]], grid_size: int
) -> None:
    size_wh, box = size_and_box

    def covers(region: GridBox) -> bool:
        return contains(crop_box_px(region, size_wh, grid_size=grid_size, margin=0), box)

    region = grid_box_covering(box, size_wh, grid_size=grid_size)
    assert covers(region)
    x_min, y_min, x_max, y_max = region.x_min, region.y_min, region.x_max, region.y_max
    # On an axis with fewer pixels than cells a cell may own none, so shrinking may change nothing.
    if min(size_wh) >= grid_size:
        assert x_min == x_max or not covers(GridBox(x_min + 1, y_min, x_max, y_max))
        assert x_min == x_max or not covers(GridBox(x_min, y_min, x_max - 1, y_max))
        assert y_min == y_max or not covers(GridBox(x_min, y_min + 1, x_max, y_max))
        assert y_min == y_max or not covers(GridBox(x_min, y_min, x_max, y_max - 1))


@given(grid_boxes(), st.tuples(st.integers(8, 5000), st.integers(8, 5000)))
def test_region_to_pixels_to_region_is_the_same(region: GridBox, size_wh: tuple[int, int]) -> None:
    assert grid_box_covering(crop_box_px(region, size_wh, margin=0), size_wh) == region


def test_covering_ignores_what_lies_outside_the_image() -> None:
    assert grid_box_covering((-50, -1, 10.5, 999), (80, 80)) == GridBox(0, 0, 1, 7)
    assert grid_box_covering((79.9, 79.9, 80, 80), (80, 80)) == GridBox(7, 7, 7, 7)


@pytest.mark.parametrize(
    "box",
    [(5, 5, 5, 9), (9, 5, 5, 9), (80, 0, 90, 10), (-9, 0, 0, 10), (0, -9, 10, -1), (0, 80, 9, 99)],
)
def test_covering_refuses_boxes_that_cover_nothing(box: Box) -> None:
    with pytest.raises(RegionError, match="covers nothing of an image of 80x80 px"):
        grid_box_covering(box, (80, 80))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_boxes_are_refused(bad: float) -> None:
    with pytest.raises(RegionError, match="four finite numbers"):
        grid_box_covering((0, 0, bad, 10), (80, 80))


def test_grid_without_cells_is_refused() -> None:
    with pytest.raises(RegionError, match="at least one cell, got grid_size=0"):
        grid_box_covering((0, 0, 1, 1), (80, 80), grid_size=0)


@pytest.mark.parametrize("size_wh", [(0, 5), (5, 0), (-1, 5)])
def test_images_without_pixels_are_refused(size_wh: tuple[int, int]) -> None:
    with pytest.raises(RegionError, match=r"size \(W, H\) of at least 1x1 px"):
        crop_box_px(GridBox(0, 0, 1, 1), size_wh)
    with pytest.raises(RegionError, match=r"size \(W, H\) of at least 1x1 px"):
        to_unit((0, 0, 1, 1), size_wh)
    with pytest.raises(RegionError, match=r"size \(W, H\) of at least 1x1 px"):
        rescale((0, 0, 1, 1), (1, 1), size_wh)


@given(sizes_and_boxes, sizes)
def test_round_trips_between_pixels_units_and_sizes(
    size_and_box: tuple[tuple[int, int], Box], other_wh: tuple[int, int]
) -> None:
    size_wh, box = size_and_box
    unit = to_unit(box, size_wh)
    assert all(0 <= value <= 1 for value in unit)
    assert rescale(unit, (1, 1), size_wh) == pytest.approx(box)
    assert rescale(rescale(box, size_wh, other_wh), other_wh, size_wh) == pytest.approx(box)


def test_conversions_by_hand() -> None:
    assert to_unit((10, 20, 50, 50), (100, 200)) == (0.1, 0.1, 0.5, 0.25)
    assert rescale((10, 20, 50, 50), (100, 200), (50, 400)) == (5, 40, 25, 100)
    assert clamp((-3, 5, 200, 90), (100, 80)) == (0, 5, 100, 80)


@given(sizes_and_boxes, st.data())
def test_crop_of_a_crop_is_found_in_the_image(
    size_and_box: tuple[tuple[int, int], tuple[int, int, int, int]], data: st.DataObject
) -> None:
    size_wh, outer = size_and_box
    inner = data.draw(boxes_in((outer[2] - outer[0], outer[3] - outer[1])))
    composed = compose(outer, inner)
    assert contains(outer, composed)
    assert contains((0, 0, *size_wh), composed)
    assert (composed[2] - composed[0], composed[3] - composed[1]) == (
        inner[2] - inner[0],
        inner[3] - inner[1],
    )


def test_crop_of_a_crop_has_the_same_pixels() -> None:
    image = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30))
    outer, inner = (5, 2, 25, 18), (3, 4, 11, 9)
    assert image.crop(compose(outer, inner)) == image.crop(outer).crop(inner)


@pytest.mark.parametrize("inner", [(0, 0, 21, 5), (-1, 0, 5, 5), (5, 5, 4, 9), (0, 0, 5, 17)])
def test_crop_beyond_its_crop_is_refused(inner: tuple[int, int, int, int]) -> None:
    with pytest.raises(RegionError, match="does not lie in a crop of 20x16 px"):
        compose((5, 2, 25, 18), inner)


def test_overlap_by_hand() -> None:
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert coverage((0, 0, 2, 2), (1, 1, 3, 3)) == 0.25
    assert iou((0, 0, 1, 1), (5, 5, 6, 6)) == 0.0
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0
    assert not contains((0, 0, 2, 2), (1, 1, 3, 2))
    assert not contains((0, 0, 2, 2), (2, 0, 1, 1))


@given(boxes_in((50, 50)), boxes_in((50, 50)))
def test_overlap_invariants(a: Box, b: Box) -> None:
    assert iou(a, a) == 1.0
    assert iou(a, b) == iou(b, a)
    assert 0 <= iou(a, b) <= min(coverage(a, b), coverage(b, a)) <= 1
    assert contains(a, b) == (coverage(a, b) == 1.0)


def test_coverage_of_an_empty_box_is_refused() -> None:
    with pytest.raises(RegionError, match="inner box with an area"):
        coverage((0, 0, 2, 2), (1, 1, 1, 2))
