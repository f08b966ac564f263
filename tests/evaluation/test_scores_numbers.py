"""Numbers in answers: how they are read, relaxed accuracy, count accuracy."""

import pytest
from fuzz.limits import within_limits
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import DataError
from vpt.evaluation.scores.numbers import (
    Quantity,
    count_accuracy,
    extract_count,
    first_number,
    read_quantity,
    relaxed_accuracy,
)


@pytest.mark.parametrize(
    ("text", "quantity"),
    [
        ("5", Quantity(5)),
        ("-1,234.5", Quantity(-1234.5)),
        ("\u22125", Quantity(-5)),
        (".5", Quantity(0.5)),
        ("1e3", Quantity(1000)),
        ("12 %", Quantity(12, 0.01)),
        ("12 percent", Quantity(12, 0.01)),
        ("5 million", Quantity(5, 1e6)),
        ("5M", Quantity(5, 1e6)),
        ("5 m", Quantity(5, None, "m")),  # apart and small: metres
        ("$5.2bn", Quantity(5.2, 1e9, "$")),
        ("-$5", Quantity(-5, None, "$")),
        ("5 dollars", Quantity(5, None, "$")),
        ("3 years", Quantity(3, None, "year")),
        ("3.5 km per hour.", Quantity(3.5, None, "km per hour")),
        ("about 20 m2", Quantity(20, None, "m2")),
        ("twenty-one dogs", Quantity(21, None, "dog")),
    ],
)
def test_a_quantity_is_read_with_its_scale_and_unit(text, quantity):
    assert read_quantity(text) == quantity


@pytest.mark.parametrize(
    "text", ["", "red", "10-12", "2015-16", "12:30", "10/20", "5 or 6", "1,23", "nan", "inf", "x5"]
)
def test_what_is_not_one_number_is_no_quantity(text):
    assert read_quantity(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("There are 3 dogs.", 3),
        ("There are three dogs and 2 cats.", 3),  # the first one
        ("twenty-one", 21),
        ("two hundred and five people", 205),
        ("one hundred", 100),
        ("1,234", 1234),
        ("3 thousand", 3000),
        ("3-4", 3),
        ("-3", -3),
        ("The one on the left has 4.", 4),  # a pronoun
        ("No one; 2 dogs.", 2),
        ("A 3D print of the 2nd of 5 cats", 5),  # digits of other words
        ("图中有3个人。", 3),
        ("共有１２只", 12),
        ("version v2", None),
        ("someone", None),
        ("", None),
    ],
)
def test_the_first_number_of_a_text(text, number):
    assert first_number(text) == number


def test_a_number_word_repeated_many_times_is_read_at_once():
    with within_limits("number words", max_cpu_s=1):
        assert first_number("one hundred " * 5000) == 101  # "one hundred one"


@given(st.integers(-(10**9), 10**9))
def test_digits_are_read_back_with_and_without_separators(value):
    for text in (str(value), f"{value:,}"):
        assert first_number(text) == value
        assert read_quantity(text) == Quantity(value)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("105", ["100"], 1),  # exactly 5 %
        ("95", ["100"], 1),
        ("106", ["100"], 0),
        ("94", ["100"], 0),
        ("1.05", ["1"], 1),  # 5 % as well, though 1.05 - 1 is a hair more in binary
        ("-100", ["100"], 0),
        ("0.0", ["0"], 1),
        ("0.1", ["0"], 0),  # 5 % of nothing
        ("1,050", ["1000"], 1),
        ("52%", ["50%"], 1),
        ("50%", ["50"], 1),  # a scale on one side only is forgiven,
        ("50%", ["0.5"], 1),  # in either reading,
        ("50", ["0.5"], 0),  # but not made up
        ("0.5%", ["50%"], 0),
        ("5 million", ["5,000,000"], 1),
        ("5 million", ["5"], 1),  # the axis says "in millions"
        ("5 million", ["5 thousand"], 0),
        ("5 kg", ["5"], 1),
        ("5 kg", ["5 kgs"], 1),
        ("5 cm", ["5 mm"], 0),
        ("$5", ["\u20ac5"], 0),
        ("$5", ["5 dollars"], 1),
        ("twelve", ["12"], 1),
        ("blue", ["Blue."], 1),  # text: exact match
        ("light blue", ["blue"], 0),
        ("10-12", ["10"], 0),  # a range is text
        ("10-12", ["10-12"], 1),
        ("7", ["blue", "6.9"], 1),  # any reference
        ("1960", ["2020"], 1),  # years are numbers, as documented
        ("5", ["1" * 400], 0),  # infinite as a float
    ],
)
def test_relaxed_accuracy_of_hand_worked_cases(prediction, references, expected):
    assert relaxed_accuracy(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("three", ["3"], 1),
        ("There are 3 dogs.", ["three"], 1),
        ("3.0", ["3"], 1),
        ("3 dogs", ["4"], 0),
        ("None.", ["0"], 1),
        ("There are no dogs.", ["0"], 1),
        ("No, there are 2.", ["2"], 1),  # a number goes before "no"
        ("many", ["3"], 0),
        ("Many.", ["many"], 1),  # a reference without a number is text
        ("5", ["4", "5"], 1),
    ],
)
def test_count_accuracy_of_hand_worked_cases(prediction, references, expected):
    assert count_accuracy(prediction, references) == expected


def test_a_text_without_number_has_no_count():
    assert extract_count("many") is None
    assert extract_count("nobody") == 0


numbers = st.one_of(
    st.integers(-10_000, 10_000).map(str),
    st.floats(-1000, 1000).map(lambda value: f"{value:.2f}%"),
    st.text(max_size=10),
)


@given(numbers, st.lists(numbers, min_size=1, max_size=3), st.randoms())
def test_both_give_1_to_a_reference_and_0_or_1_to_all(prediction, references, random):
    for score in (relaxed_accuracy, count_accuracy):
        value = score(prediction, references)
        assert value in (0, 1)
        assert score(prediction, random.sample(references, len(references))) == value
        assert score(prediction, [*references, prediction]) == 1


@pytest.mark.parametrize("score", [relaxed_accuracy, count_accuracy])
def test_no_reference_is_refused(score):
    with pytest.raises(DataError, match="at least one reference"):
        score("3", [])
