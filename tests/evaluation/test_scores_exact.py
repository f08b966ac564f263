"""Exact match and containment: what is folded away, and what is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.scores.exact import contains_answer, exact_match, normalize_text
from vpt.errors import DataError


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("  Red\n bus. ", "red bus"),
        ('"Stop!"', "stop"),
        ("**B**", "b"),
        ("\u201cIt\u2019s\u201d", "it's"),  # typographic quotes
        ("\u22125", "-5"),  # a typographic minus is a sign, not a mark
        ("\uff15", "5"),  # a full-width digit
        (".5", ".5"),
        ("-5%", "-5%"),
        ("$5", "$5"),
        ("STRASSE", "strasse"),
        ("?!", "?!"),  # nothing but marks is left as it is
        ("", ""),
    ],
)
def test_normalized_text_of_hand_worked_cases(text, normalized):
    assert normalize_text(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Red Bus.", ["red bus"], 1),
        ("red bus", ["bus", "red bus"], 1),  # any reference
        ("the red bus", ["red bus"], 0),  # articles count
        ("three", ["3"], 0),  # number words count
        ("-5", ["5"], 0),
        ("", ["red"], 0),
    ],
)
def test_exact_match_of_hand_worked_cases(prediction, references, expected):
    assert exact_match(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("It is a Red Bus.", ["red bus"], 1),
        ("It is a cart.", ["car"], 0),  # not as a whole word
        ("It costs 3.50", ["3"], 0),  # nor as a part of a number
        ("It costs 3.", ["3"], 1),
        ("1,300 people", ["300"], 0),
        ("It is C++.", ["C++"], 1),  # marks are no pattern
        ("not a red bus", ["red bus"], 1),  # it does not see negation, as documented
        ("anything", [""], 0),  # an empty reference stands nowhere
        ("bus", ["car", "bus"], 1),
    ],
)
def test_containment_of_hand_worked_cases(prediction, references, expected):
    assert contains_answer(prediction, references) == expected


@given(st.text(max_size=20), st.lists(st.text(max_size=10), min_size=1, max_size=3), st.randoms())
def test_both_give_1_to_a_reference_and_0_or_1_to_all(prediction, references, random):
    for score in (exact_match, contains_answer):
        value = score(prediction, references)
        assert value in (0, 1)
        assert score(prediction, random.sample(references, len(references))) == value
        assert score(prediction, [*references, prediction]) == 1


@given(st.text(max_size=20), st.text(max_size=10))
def test_an_exact_match_is_contained(prediction, reference):
    assert contains_answer(prediction, [reference]) >= exact_match(prediction, [reference])


@pytest.mark.parametrize("score", [exact_match, contains_answer])
def test_no_reference_is_refused(score):
    with pytest.raises(DataError, match="at least one reference"):
        score("red", [])
