"""Yes or no: what is read, and POPE's measures worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import DataError
from vpt.evaluation.scores.choices import extract_yes_no, pope, yes_no_accuracy


@pytest.mark.parametrize(
    ("prediction", "said"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("**Yes**, there is a dog.", "yes"),
        ("Yes, there is no cat in front of it.", "yes"),  # the first word
        ("There is no dog.", "no"),  # the only one of the two
        ("At first: no. But the answer is yes.", "yes"),  # a statement goes before all
        ("Answer: no", "no"),
        ("The answer is no. Wait. The answer is yes.", "yes"),  # the last one
        ("There is a dog.", None),  # neither word
        ("Maybe yes, maybe no", None),  # both
        ("", None),
        ("nothing", None),  # no word of its own
        ("yesterday", None),
        ("Ｙｅｓ", "yes"),
        ("是", "yes"),
        ("是的，图中有一只狗。", "yes"),
        ("否。", "no"),
        ("不是的", "no"),
        ("没有，图中没有狗。", "no"),
        ("图中没有狗。", "no"),  # as "There is no dog."
        ("图中有一只狗。", None),  # as "There is a dog."
        ("答案是“否”。", "no"),
        ("答案：是", "yes"),
        ("答案是Yes。", "yes"),
        ("答案是否定的。", "no"),
        ("是否有狗？", None),  # a question
        ("有没有狗", None),
        ("不知道", None),
        ("对于这张图", None),
        ("№ 5", None),
    ],
)
def test_yes_and_no_are_read(prediction, said):
    assert extract_yes_no(prediction) == said


def test_an_unreadable_answer_is_wrong_whatever_the_truth():
    assert yes_no_accuracy("perhaps", ["yes"]) == 0
    assert yes_no_accuracy("perhaps", ["no"]) == 0
    assert yes_no_accuracy("Yes.", ["yes"]) == 1


@pytest.mark.parametrize("references", [[], ["maybe"], ["yes", "no"]])
def test_references_must_agree_on_yes_or_no(references):
    with pytest.raises(DataError, match="say yes or no"):
        yes_no_accuracy("yes", references)


def test_pope_of_a_hand_worked_table():
    # truth yes: said yes, yes, no, unreadable; truth no: said yes, no, no, no
    said = ["yes", "yes", "no", None, "yes", "no", "no", "no"]
    truth = ["yes"] * 4 + ["no"] * 4
    assert pope(said, truth) == pytest.approx(
        {
            "accuracy": 5 / 8,  # 2 right yes, 3 right no; the unreadable one is wrong
            "precision": 2 / 3,  # 3 said yes, 2 rightly
            "recall": 2 / 4,  # 4 are yes, 2 found: the unreadable one is not found
            "f1": 4 / 7,  # 2 * 2/3 * 1/2 / (2/3 + 1/2)
            "yes_ratio": 3 / 7,  # of 7 readable answers; of the truth it would be 4/8
            "unparsed": 1 / 8,
        }
    )


def test_pope_without_a_yes_is_0_not_an_error():
    summary = pope(["no", None], ["yes", "yes"])
    assert summary["precision"] == summary["recall"] == summary["f1"] == summary["yes_ratio"] == 0


def test_pope_of_unreadable_answers_only():
    assert pope([None], ["no"])["accuracy"] == 0
    assert pope([None], ["no"])["unparsed"] == 1


def test_pope_of_nothing_is_empty():
    assert pope([], []) == {}


def test_pope_needs_one_answer_per_sample():
    with pytest.raises(DataError, match="got 1 for 2"):
        pope(["yes"], ["yes", "no"])


@given(
    st.lists(st.tuples(st.sampled_from(["yes", "no", None]), st.sampled_from(["yes", "no"]))),
    st.randoms(),
)
def test_pope_lies_in_0_to_1_whatever_the_order_of_samples(pairs, random):
    summary = pope([a for a, _ in pairs], [b for _, b in pairs])
    assert all(0 <= value <= 1 for value in summary.values())
    shuffled = random.sample(pairs, len(pairs))
    assert pope([a for a, _ in shuffled], [b for _, b in shuffled]) == summary


@given(st.lists(st.sampled_from(["yes", "no"]), min_size=1))
def test_pope_of_the_truth_is_perfect(truth):
    summary = pope(truth, truth)
    assert summary["accuracy"] == 1
    assert summary["yes_ratio"] == truth.count("yes") / len(truth)
    if "yes" in truth:
        assert summary["precision"] == summary["recall"] == summary["f1"] == 1
