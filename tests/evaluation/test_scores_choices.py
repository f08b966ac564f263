"""Options, yes and no read from answers."""

from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import DataError
from vpt.evaluation.scores.choices import (
    extract_choice,
    extract_yes_no,
    multiple_choice,
    pope,
    yes_no_accuracy,
)

CHOICES = ("dog", "cat", "hot dog", "the red bus")
TEMPLATES = (
    "{}",
    "({})",
    "{}.",
    "[{}]",
    "**{}**",
    "The answer is {}.",
    "The answer is ({}).",
    "answer: {}",
    "Answer: ({})",
    "The correct option is {}",
    "<answer>{}</answer>",
    "The answer is\n\n{}",
    "$\\boxed{{{}}}$",
    "$\\boxed{{\\text{{{}}}}}$",
    "I choose {}.",
    "Option {}",
    "({}) is correct.",
    "{} is the right answer",
    "{}, because it is near.",
    "Therefore, ({}).",
    "It says so below.\n{}",
    "{}\nIt is near.",
)


@given(st.sampled_from(TEMPLATES), st.integers(1, 8), st.data())
def test_a_letter_in_any_usual_form_is_read(template, num, data):
    letter = data.draw(st.sampled_from(ascii_uppercase[:num]))
    assert extract_choice(template.format(letter), num) == letter


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("b", "B"),  # alone, a small letter is one too
        ("(b).", "B"),
        ("a", "A"),
        ("cat", "B"),
        ("The cat.", "B"),
        ("It is the cat on the left.", "B"),  # contained, and no other option is
        ("The hot dog is nearest.", "C"),  # "dog" inside "hot dog" is not option A
        ("A dog is closest", "A"),  # by its text; see below for the article
        ("A cat is closest", "B"),
        ("The answer is a cat.", "B"),
        ("The dog is far. The answer is the cat.", "B"),  # a statement by text
        ("B. cat", "B"),
        ("B: cat", "B"),
        ("B) it is", "B"),
        ("B. dog", "B"),  # the letter at the beginning counts, not the wrong text behind it
        ("(A) is far away and so is (C). The answer is (B).", "B"),
        ("The answer is A. No, wait: the answer is B.", "B"),  # the last statement
        ("The answer is A because it is near.", "A"),
        ("The answer is B: the cat, not the dog", "B"),
        ("A. dog\nB. cat\nThe answer is B", "B"),  # options repeated
        ("So the dog is far away. So (D).", "D"),
        ("Option A is wrong. Option B looks right.", "B"),
        ("It's B.", "B"),
        ("Ｂ", "B"),
        ("（Ｂ）", "B"),
        ("（B）猫", "B"),
        ("答案是B。", "B"),
        ("正确答案是：（B）", "B"),
        ("答案为 A", "A"),
        ("选B", "B"),
        ("不选A，选B。", "B"),
        ("选项A是正确的。", "A"),
        ("A不对，B是正确的。", "B"),
        ("我认为B更合适", "B"),
        ("B、猫", "B"),
    ],
)
def test_the_option_that_is_named_is_read(prediction, letter):
    assert extract_choice(prediction, CHOICES) == letter


@pytest.mark.parametrize(
    "prediction",
    [
        "",
        "I do not know.",
        "The dog and the cat",  # two options by text
        "The answer is B or C",
        "The answer is (B) or (C).",
        "A. dog\nB. cat",  # options repeated, and nothing more
        "(B) is not correct",
        "not (B)",
        "I think (B), the dog",  # letter and text disagree
        "E",  # there are four options
        "D.C. is the capital",
        "Definitely",  # a capital of a word
        "A或B",
        "不是B",
        "选择题",
    ],
)
def test_what_names_no_option_or_several_is_unreadable(prediction):
    assert extract_choice(prediction, CHOICES) is None
    assert multiple_choice(prediction, CHOICES, ["B"]) == 0


@pytest.mark.parametrize(
    "prediction", ["A dog is closest", "A dog.", "The answer is A dog", "a dog"]
)
def test_the_article_is_not_option_a(prediction):
    assert extract_choice(prediction, 4) is None
    assert extract_choice(prediction, ("horse", "dog")) == "B"


def test_the_pronoun_is_not_option_i():
    assert extract_choice("The answer is I think unclear", 9) is None
    assert extract_choice("The answer is I.", 9) == "I"


@pytest.mark.parametrize(
    ("reference", "expected"), [("B", 1), ("(b)", 1), ("Cat.", 1), ("A", 0), ("dog", 0)]
)
def test_references_are_letters_or_texts(reference, expected):
    assert multiple_choice("The answer is B", CHOICES, [reference]) == expected


def test_any_right_option_will_do_in_any_order():
    for references in (["A", "B"], ["B", "A"]):
        assert multiple_choice("B", CHOICES, references) == 1


def test_a_reference_that_is_a_letter_means_its_option_even_if_a_text_is_that_letter():
    # A text-reading question: which letter is on the sign? (A) "B" (B) "A"
    assert multiple_choice("(A)", ("B", "A"), ["A"]) == 1


def test_chinese_option_texts_are_read_and_full_width_references_are_letters():
    choices = ("黑色", "红色")
    assert multiple_choice("答案是红色的。", choices, ["Ｂ"]) == 1
    assert multiple_choice("图中的车是红色的", choices, ["红色"]) == 1


def test_equal_option_texts_cannot_be_told_apart():
    assert extract_choice("the cat", ("cat", "cat")) is None


@given(st.text(max_size=40), st.integers(1, 26))
def test_any_text_gives_an_option_there_is_or_none(prediction, num):
    letter = extract_choice(prediction, num)
    assert letter is None or letter in ascii_uppercase[:num]


@given(
    st.lists(
        st.from_regex(r"[a-z]{2,5}( [a-z]{2,5})?", fullmatch=True),
        min_size=1,
        max_size=6,
        unique=True,
    ),
    st.data(),
)
def test_the_text_of_an_option_names_it(choices, data):
    place = data.draw(st.integers(0, len(choices) - 1))
    assert multiple_choice(choices[place], choices, [choices[place]]) == 1


@pytest.mark.parametrize("choices", [0, 27, (), "abc"])
def test_impossible_options_are_refused(choices):
    with pytest.raises(DataError, match="1 to 26 options"):
        extract_choice("A", choices)


@pytest.mark.parametrize("reference", ["horse", "E", ""])
def test_a_reference_that_is_no_option_is_refused(reference):
    with pytest.raises(DataError, match="letter or the text of one option"):
        multiple_choice("A", CHOICES, [reference])


def test_no_right_option_is_refused():
    with pytest.raises(DataError, match="at least one right option"):
        multiple_choice("A", CHOICES, [])


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
