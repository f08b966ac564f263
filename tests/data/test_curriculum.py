"""The share of the atomic task falls as it should, and each fault of a row is found."""

import json

import pytest
from aurora_samples import blocks

from vpt.data.check import RowChecker, check_rows
from vpt.data.content_rows import NOTE, CategoryBoxes, counting_rows, map_row, point_rows, read_note
from vpt.data.curriculum import Annealing, anneal, atomic_share, count_epochs
from vpt.data.points import Point
from vpt.errors import DataError
from vpt.protocol.calls import format_depth

CODES = [number % 128 for number in range(100)]


def depth_rows(name="a.jpg"):
    drawn = blocks(0) * 0
    drawn[:40] = 0.75
    points = (Point("A", 50, 250, 0.1), Point("B", 250, 50, 0.95))
    return map_row(name, CODES, {}), *point_rows(name, points, CODES, drawn, {})


def count_rows(name="a.jpg"):
    return counting_rows(name, CategoryBoxes("cat", ((0, 5, 40, 60), (100, 100, 335, 335))))


@pytest.fixture(scope="module")
def pools():
    rows = [depth_rows(f"{number}.jpg") for number in range(40)]
    return [r[0] for r in rows], [r[n] for n in (1, 2) for r in rows]


def test_the_share_falls_from_1_to_a_tenth_in_ten_epochs(pools):
    rows = list(anneal(*pools, Annealing()))
    assert len(rows) == 400
    epochs = count_epochs(rows)
    assert list(epochs) == list(range(1, 11))
    shares = [atomic_share(tasks) for tasks in epochs.values()]
    assert shares == pytest.approx([1 - 0.1 * epoch for epoch in range(10)], abs=0.02)
    assert [read_note(row)["epoch"] for row in rows] == sorted(n for n in epochs for _ in range(40))


def test_the_doctor_accepts_a_curriculum_and_counts_its_epochs(pools):
    rows = list(anneal(*pools, Annealing()))
    report = check_rows(rows, RowChecker({}))
    assert report.findings == {}
    assert report.epochs == count_epochs(rows)
    assert report.row_kinds["depth map"] == sum(t["depth-map"] for t in report.epochs.values())


def test_the_doctor_finds_a_shuffled_curriculum_and_doubles_within_an_epoch(pools):
    rows = list(anneal(*pools, Annealing(), num_per_epoch=5))
    swapped = [*rows[5:], *rows[:5]]
    findings = check_rows(swapped, RowChecker({})).findings
    assert list(findings) == ["epoch-order"] and len(findings["epoch-order"]) == 5
    findings = check_rows([*rows, rows[-1]], RowChecker({})).findings
    assert list(findings) == ["duplicate-row"]


def test_the_same_seed_gives_the_same_order(pools):
    one, two, other = (list(anneal(*pools, Annealing(), 10, seed)) for seed in (1, 1, 2))
    assert one == two != other


def test_all_rows_come_equally_often(pools):
    rows = list(anneal(*pools, Annealing(4, 0.5, 0.5), num_per_epoch=20))
    named = [row["images"][0] for row in rows if read_note(row)["task"] == "depth-map"]
    assert sorted(named) == sorted(f"{number}.jpg" for number in range(40))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "at least 1 epoch"),
        ((10, 0.1, 1.0), "expected shares of 1 to 0 that do not increase"),
        ((10, 1.2, 0.1), "expected shares of 1 to 0 that do not increase"),
    ],
)
def test_impossible_shares_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        Annealing(*arguments)


def test_rows_that_do_not_fit_are_refused(pools):
    atomic, others = pools
    with pytest.raises(DataError, match="epoch 1 needs 41 atomic rows, there are 40"):
        list(anneal(atomic, others, Annealing(), num_per_epoch=41))
    with pytest.raises(DataError, match="rows of an atomic task, row 0 has 'depth-steps'"):
        list(anneal(others, others, Annealing()))
    with pytest.raises(DataError, match="that is not atomic, row 0 has 'depth-map'"):
        list(anneal(atomic, atomic, Annealing()))
    with pytest.raises(DataError, match="no rows: 0 atomic ones"):
        list(anneal([], others, Annealing()))


# What the doctor finds in single rows


def said(row, answer):
    """The row with another answer."""
    messages = [row["messages"][0], {"role": "assistant", "content": answer}]
    return {**row, "messages": messages}


def noted(row, **changes):
    return {**row, NOTE: json.dumps({**read_note(row), **changes})}


def kinds_found(row, checker=None):
    _, findings = (checker or RowChecker({})).check(row)
    return [finding.kind for finding in findings]


MAP, STEPS, DIRECT = depth_rows()
BOXES, COUNT, NUMBER = count_rows()
WHOLE = format_depth(CODES)


@pytest.mark.parametrize("row", [MAP, STEPS, DIRECT, BOXES, COUNT, NUMBER])
def test_sound_rows_are_left_alone(row):
    assert kinds_found(row) == []
    without_note = {key: value for key, value in row.items() if key != NOTE}
    assert kinds_found(without_note) == []


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        (WHOLE.replace("<DEPTH_5>", "", 1), ["bad-depth-map"]),
        (WHOLE.replace("<DEPTH_5>", "<DEPTH_5><DEPTH_5>", 1), ["bad-depth-map"]),
        (WHOLE.replace("<DEPTH_5>", "<DEPTH_128>", 1), ["bad-depth-map"]),
        (WHOLE.replace("<DEPTH_5>", "<PIXEL_5>", 1), ["bad-depth-map"]),
        (WHOLE.replace("<DEPTH_5>", "<DEPTH_five>", 1), ["unknown-token", "bad-depth-map"]),
        (WHOLE.replace("<DEPTH_END>", ""), ["bad-depth-map", "answer-mismatch"]),
        (WHOLE + "<DEPTH_3>", ["bad-depth-map", "answer-mismatch"]),
        (WHOLE + " Well.", ["answer-mismatch"]),
        (WHOLE + WHOLE, ["answer-mismatch"]),
    ],
)
def test_faults_of_depth_maps_are_found(answer, kinds):
    assert kinds_found(said(MAP, answer)) == kinds


def edited(row, old, new):
    answer = row["messages"][1]["content"]
    assert old in answer
    return said(row, answer.replace(old, new, 1))


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        (edited(BOXES, "<PIXEL_60>", ""), ["bad-box"]),
        (edited(BOXES, "<PIXEL_40>", "<PIXEL_336>"), ["bad-box"]),
        (edited(BOXES, "<PIXEL_0><PIXEL_5>", "<PIXEL_41><PIXEL_5>"), ["bad-box"]),
        (edited(BOXES, "<PIXEL_40>", "<PIXEL_-1>"), ["unknown-token", "bad-box"]),
        (edited(BOXES, "<PIXEL_40>", "<PIXEL_39>"), ["answer-mismatch"]),
        (edited(BOXES, ".", " and that is all."), ["answer-mismatch"]),
        (edited(COUNT, "is 2", "is 3"), ["answer-mismatch"]),
        (edited(COUNT, ", <PIXEL_100><PIXEL_100><PIXEL_335><PIXEL_335>", ""), ["answer-mismatch"]),
        (said(NUMBER, "3"), ["answer-mismatch"]),
        (said(NUMBER, "many"), ["answer-mismatch"]),
        (said(NUMBER, "<PIXEL_0><PIXEL_5><PIXEL_40><PIXEL_60> 2"), ["answer-mismatch"]),
        (edited(STEPS, "is (B)", "is (A)"), ["answer-mismatch"]),
        (edited(STEPS, "B 75", "B 00"), ["answer-mismatch"]),
        (edited(STEPS, ", B 75", ""), ["answer-mismatch"]),
        (edited(STEPS, "A at x 050", "A at x 051"), ["answer-mismatch"]),
        (edited(STEPS, WHOLE, "dark."), ["answer-mismatch"]),
        (said(DIRECT, "(A)"), ["answer-mismatch"]),
        (said(DIRECT, "none of them"), ["answer-mismatch"]),
        (noted(DIRECT, answer="A"), ["bad-note"]),
        (noted(DIRECT, points=[]), ["bad-note"]),
        (noted(DIRECT, points=[{"letter": "A"}] * 2), ["bad-note"]),
        (noted(NUMBER, count=3), ["bad-note"]),
        (noted(NUMBER, boxes=None), ["bad-note"]),
        (noted(NUMBER, task="sing"), ["bad-note"]),
        ({**NUMBER, NOTE: '{"task": '}, ["bad-note"]),
    ],
)
def test_faults_of_boxes_answers_and_notes_are_found(row, kinds):
    assert kinds_found(row) == kinds


def test_content_in_a_question_is_found():
    asked = {"role": "user", "content": f"<image>\nIs this it? {WHOLE}"}
    assert kinds_found({**MAP, "messages": [asked, MAP["messages"][1]]}) == ["misplaced-token"]


def test_rows_without_a_note_are_told_by_what_they_hold():
    for row, kind in ((MAP, "depth map"), (COUNT, "boxes"), (NUMBER, "direct")):
        plain = {key: value for key, value in row.items() if key != NOTE}
        assert RowChecker({}).check(plain)[0] == kind
