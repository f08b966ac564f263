"""Exact match and containment: what is folded away, and what is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import DataError
from vpt.evaluation.scores.choices import contains_answer
from vpt.evaluation.scores.texts import exact_match, normalize_text


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
        ("「红色」。", "红色"),
        ("有３个人", "有 3 个人"),  # words of other scripts stand by themselves
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
        # A letter has to be what the answer comes to: "a" is a word of almost any sentence.
        ("The picture shows a boat, so B.", ["A"], 0),
        ("The picture shows a boat, so B.", ["B"], 1),
        ("A boat.", ["A"], 0),
        ("The sign is what I think, K.", ["I"], 0),
        ("A.", ["A"], 1),
        ("(a)", ["A"], 1),
        ("The answer is A, a boat.", ["(A)"], 1),
        ("(A) is far away. The answer is (B).", ["B"], 1),
        ("A or B", ["A"], 0),  # neither
        ("It says K on the door", ["K"], 1),  # the only one that stands alone
        ("The variable is x.", ["x"], 1),
        ("X-ray", ["X"], 0),
        # So have yes and no.
        ("Yes, there is no cat in front of it.", ["no"], 0),
        ("There is no dog.", ["no"], 1),
        ("nothing", ["no"], 0),
        ("Yes.", ["yes"], 1),
        ("It is 13", ["3"], 0),
        ("It is -3 degrees", ["3"], 0),
        ("2-3 people", ["3"], 1),
        # Chinese sets no blanks between words.
        ("这是红色的公交车。", ["红色"], 1),
        ("图中有3个人", ["3"], 1),
        ("图中有13个人", ["3"], 0),
        ("这是iPhone手机", ["iphone"], 1),
        ("不是红的", ["红"], 0),  # one character is a word of many
        ("红。", ["红"], 1),
        ("不是", ["是"], 0),
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
