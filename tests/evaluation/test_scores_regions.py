"""Regions shown, and depth maps that support an answer."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vpt.errors import DataError, RegionError
from vpt.evaluation.records import Record
from vpt.evaluation.report.cards import CardMaker, PictureTable
from vpt.evaluation.runner import Task, find_conditions, finished_record
from vpt.evaluation.samples import ImageRef, ImageRoots, Sample
from vpt.evaluation.scores.regions import (
    best_iou,
    is_shown,
    map_supports_answer,
    read_points,
    share_shown,
)
from vpt.evaluation.scores.table import SCORES
from vpt.evaluation.splits import SPLITS, ask_as_is, read_split
from vpt.images import from_pixels
from vpt.trace.records import ContentRecord, ImageRecord, TokenRecord, Trace

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


POINTS = [{"letter": "A", "x": 30, "y": 100}, {"letter": "B", "x": 300, "y": 100}]
CODES = [1, 2, 3, 4]


def decode(codes):
    assert list(codes) == CODES
    return np.tile(np.linspace(0, 1, 32, dtype=np.float32), (32, 1))  # near on the right


def sample(points=POINTS, **more):
    facts = {} if points is None else {"points": points}
    image = ImageRef("a.png", "a.png")
    return Sample("1", (image,), "Which?", answers=("B",), choices=("A", "B"), facts=facts, **more)


def make_trace(answer="The answer is (B).", *contents):
    trace = Trace("Which?", "auto", answer=answer, stop_reason="stop", turns=["..."])
    trace.images = [ImageRecord("a.png", (64, 48), "d")]
    trace.tokens = [TokenRecord(i, "x", 0, 1.0) for i in range(9)]
    whole = ContentRecord("depth", 0, 0, 0, 6, True, 6.0, codes=CODES)
    trace.content = list(contents) or [whole]
    return trace


@pytest.mark.parametrize(("answer", "value"), [("B", 1.0), ("(A)", 0.0), ("The answer is A.", 0.0)])
def test_the_map_supports_the_answer_or_not(answer, value):
    assert map_supports_answer(make_trace(answer), sample(), decode) == value


def test_the_last_whole_map_counts():
    first = ContentRecord("depth", 0, 0, 0, 2, True, 1.0, codes=[9] * 4)
    second = ContentRecord("depth", 0, 0, 2, 4, True, 1.0, codes=CODES)
    cut = ContentRecord("depth", 0, 0, 4, 6, False, 1.0, codes=[9])
    assert map_supports_answer(make_trace("B", first, second, cut), sample(), decode) == 1


@pytest.mark.parametrize(
    "given",
    [
        (make_trace("B"), sample(points=None), decode),
        (make_trace("B"), sample(), None),
        (make_trace("neither"), sample(), decode),
        (make_trace("B", ContentRecord("depth", 0, 0, 0, 3, False, codes=[1])), sample(), decode),
        (make_trace("B", ContentRecord("boxes", 0, 0, 0, 4, True, boxes=[])), sample(), decode),
    ],
    ids=["no points", "no tokenizer", "no letter", "cut off", "boxes"],
)
def test_nothing_is_said_where_nothing_can_be(given):
    assert map_supports_answer(*given) is None


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("A", "expected 'points' to be a list, got str"),
        ([{"letter": "A", "x": 1}], "expected a point as"),
        (["A"], "expected a point as"),
        ([{"letter": "A", "x": "left", "y": 1}], "expected a point as"),
        (POINTS[::-1], "expected points A, B, got B, A"),
    ],
)
def test_points_that_make_no_sense_are_told(points, message):
    with pytest.raises(DataError, match=message):
        read_points(points)


def task():
    (condition,) = find_conditions(["auto"])
    return Task("HardBLINK_3", condition, ask_as_is, SCORES["multiple_choice"], 320)


def test_a_record_keeps_the_content_and_the_check():
    record = finished_record(task(), sample(), make_trace(), decode)
    assert (record.scores["multiple_choice"], record.scores["map_supports_answer"]) == (1, 1)
    again = Record.from_line(record.to_line())
    assert again.read_trace().content[0].codes == CODES
    assert "map_supports_answer" not in finished_record(task(), sample(), make_trace()).scores
    assert (
        finished_record(task(), sample(points=["?"]), make_trace(), decode).error["kind"] == "row"
    )


def test_a_card_shows_photo_with_boxes_and_map():
    boxes = ContentRecord(
        *("boxes", 0, 0, 6, 9, True), boxes=[(0, 0, 9, 9)], boxes_xyxy_px=[(4, 4, 20, 20)]
    )
    trace = make_trace("B")
    trace.content.append(boxes)
    trace.content[0].keep_depth_map(decode)
    photo = Image.new("RGB", (64, 48), "#336699")
    trace.keep_thumbnails([from_pixels(photo, "a.png")])
    record = finished_record(task(), sample(), trace, decode)
    card = CardMaker(lambda record: [], PictureTable()).make(record, "multiple_choice")
    assert not card.problem
    assert [figure.kind for figure in card.figures] == ["photo", "depth"]
    assert [outline.kind for outline in card.figures[0].outlines] == ["box"]
    assert [label.words for label in card.figures[0].labels] == ["b1"]
    assert card.figures[1].ends == ("far", "near")
    assert card.drawings == ["depth map of 4 codes", "1 box"]


def test_hardblink_questions_may_have_points(tmp_path):
    folder = tmp_path / "hardblink"
    folder.mkdir()
    points = [*POINTS, {"letter": "C", "x": 9, "y": 9}]
    rows = [
        {"question_id": i, "image": "0.png", "text": "Which?", **more}
        for i, more in enumerate(({"points": points}, {}))
    ]
    answers = [{"question_id": i, "text": "(A)"} for i in range(2)]
    for name, content in (("questions", rows), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    with_points, without = read_split(SPLITS["HardBLINK_3"], tmp_path, ImageRoots())
    assert read_points(with_points.facts["points"]).keys() == {"A", "B", "C"}
    assert "points" not in without.facts


def test_splits_that_are_answered_behind_drawings_have_room_for_them():
    for name in ("HardBLINK_3", "HardBLINK_5", "BLINK_count", "SEED_count"):
        assert SPLITS[name].max_new_tokens >= 102 + 64
