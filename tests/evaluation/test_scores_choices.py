"""Multiple choice: what names an option, what does not, and what is unreadable."""

from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import DataError
from vpt.evaluation.scores.choices import extract_choice, multiple_choice

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
