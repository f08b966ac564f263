"""Region hit: what a crop shows of the evidence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import RegionError
from vpt.evaluation.scores.regions import best_iou, is_shown, share_shown

EVIDENCE = (10.0, 10.0, 30.0, 20.0)  # 20 x 10 = 200 px


@st.composite
def boxes(draw: st.DrawFn) -> tuple[float, float, float, float]:
    x0, y0 = draw(st.integers(0, 90)), draw(st.integers(0, 90))
    return x0, y0, draw(st.integers(x0 + 1, 100)), draw(st.integers(y0 + 1, 100))


def test_evidence_inside_a_crop_is_shown():
    crops = [(50, 50, 60, 60), (0, 0, 40, 40)]
    assert is_shown(crops, EVIDENCE)
    assert share_shown(crops, EVIDENCE) == 1
    assert best_iou(crops, EVIDENCE) == pytest.approx(200 / 1600)  # the crop is 40 x 40


def test_half_of_the_evidence_is_a_share_of_one_half():
    crops = [(0, 0, 20, 40)]  # cuts the evidence at x = 20, its middle
    assert not is_shown(crops, EVIDENCE)
    assert share_shown(crops, EVIDENCE) == 0.5
    assert best_iou(crops, EVIDENCE) == pytest.approx(100 / (800 + 200 - 100))


def test_one_pixel_of_rounding_is_forgiven():
    assert is_shown([(11, 11, 29, 19)], EVIDENCE)
    assert not is_shown([(11.01, 10, 30, 20)], EVIDENCE)
    assert share_shown([(11, 10, 30, 20)], EVIDENCE) == pytest.approx(0.95)  # no tolerance here


def test_two_halves_do_not_make_a_whole():
    crops = [(0, 0, 20, 40), (20, 0, 40, 40)]
    assert not is_shown(crops, EVIDENCE)
    assert share_shown(crops, EVIDENCE) == 0.5


def test_without_a_crop_nothing_is_shown():
    assert not is_shown([], EVIDENCE)
    assert share_shown([], EVIDENCE) == 0
    assert best_iou([], EVIDENCE) == 0


@given(st.lists(boxes(), max_size=4), boxes(), st.randoms())
def test_shares_lie_in_0_to_1_whatever_the_order_of_crops(crops, evidence, random):
    shuffled = random.sample(crops, len(crops))
    for measure in (share_shown, best_iou):
        assert 0 <= measure(crops, evidence) <= 1
        assert measure(crops, evidence) == measure(shuffled, evidence)
    if share_shown(crops, evidence) == 1:
        assert is_shown(crops, evidence)
    assert best_iou([*crops, evidence], evidence) == 1


@pytest.mark.parametrize("measure", [is_shown, share_shown, best_iou])
@pytest.mark.parametrize("evidence", [(10, 10, 10, 20), (30, 10, 10, 20), (0, 0, float("nan"), 1)])
def test_evidence_without_area_is_refused(measure, evidence):
    with pytest.raises(RegionError, match="evidence box XYXY with an area"):
        measure([(0, 0, 40, 40)], evidence)
