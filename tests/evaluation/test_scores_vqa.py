"""VQA accuracy: the evaluation's spelling rules, and leaving each annotator out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import DataError
from vpt.evaluation.scores.texts import normalize_vqa, vqa_accuracy

answers = st.sampled_from(["yes", "no", "2", "two", "a dog", "red", "1,000", ""])


@pytest.mark.parametrize(
    ("answer", "spelled"),
    [
        ("The Dog", "dog"),  # case and articles
        ("two dogs", "2 dogs"),
        ("None", "0"),  # an oddity of the evaluation
        ("eleven", "eleven"),  # number words stop at ten
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),  # only one apostrophe may be missing
        ("couldnt've", "couldn't've"),
        ("its", "its"),  # a word of its own
        ("red/blue", "red blue"),  # a mark without a blank beside it parts words
        ("red / blue", "red blue"),  # with one it vanishes
        ("t-shirt", "t shirt"),
        ("mother's", "mother's"),  # apostrophes stay
        ("yes!", "yes"),
        ("1,000", "1000"),  # a comma between digits joins them
        ("1,000 red/blue", "1000 redblue"),  # and then every other mark joins too
        ("3.5", "3.5"),  # a period before a digit stays
        ("3.", "3"),
        ("p.m.", "pm"),
        ("10:30", "10:30"),  # colons are not in the evaluation's list
        ("  new\nyork\t", "new york"),
        ("A", "a"),  # an option letter: nothing would be left without its article
        (".." * 30, ""),  # all periods, not only the first 32
    ],
)
def test_spelling_of_hand_worked_answers(answer, spelled):
    assert normalize_vqa(answer) == spelled


@given(st.text(alphabet="aA1 ,./'-two", max_size=12))
def test_spelling_has_no_blanks_at_its_ends_nor_two_together(answer):
    spelled = normalize_vqa(answer)
    assert spelled == " ".join(spelled.split())


@pytest.mark.parametrize(
    ("num_same", "expected"),
    [
        (0, 0.0),
        (1, 0.3),  # 9 annotators see 1 match (1/3), the one who gave it sees 0
        (2, 0.6),  # 8 see 2 (2/3), 2 see 1 (1/3): (8*2 + 2*1) / 30
        (3, 0.9),  # 7 see 3 (1), 3 see 2 (2/3): (7*3 + 3*2) / 30
        (4, 1.0),  # each sees at least 3
        (10, 1.0),
    ],
)
def test_accuracy_against_ten_annotators(num_same, expected):
    references = ["red"] * num_same + ["blue"] * (10 - num_same)
    assert vqa_accuracy("Red.", references) == pytest.approx(expected)


def test_accuracy_against_four_annotators_needs_all_of_them():
    assert vqa_accuracy("red", ["red"] * 4) == 1
    # 3 of 4: the three see 2 others (2/3), the fourth sees 3 (1).
    assert vqa_accuracy("red", ["red"] * 3 + ["blue"]) == pytest.approx((3 * 2 / 3 + 1) / 4)


@pytest.mark.parametrize("references", [["red"], ["blue", "red"], ["blue", "green", "red"]])
def test_fewer_than_four_references_are_matched_exactly_with_any(references):
    assert vqa_accuracy("the red", references) == 1
    assert vqa_accuracy("pink", references) == 0


@given(answers, st.lists(answers, min_size=1, max_size=10), st.randoms())
def test_accuracy_lies_in_0_to_1_whatever_the_order_of_annotators(prediction, references, random):
    score = vqa_accuracy(prediction, references)
    assert 0 <= score <= 1
    shuffled = random.sample(references, len(references))
    assert vqa_accuracy(prediction, shuffled) == pytest.approx(score)
    assert vqa_accuracy(prediction, [prediction] * len(references)) == 1


def test_accuracy_without_references_is_refused():
    with pytest.raises(DataError, match="at least one reference"):
        vqa_accuracy("red", [])
