"""ANLS: hand-worked distances, the threshold, several references."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import DataError
from vpt.evaluation.scores.texts import anls, edit_distance

words = st.text(alphabet="abc ", max_size=8)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),  # three insertions
        ("kitten", "sitting", 3),  # k > s, e > i, + g: the textbook example
        ("flaw", "lawn", 2),  # - f, + n
        ("ab", "ba", 2),  # no transposition in Levenshtein's distance
    ],
)
def test_edit_distance_of_textbook_pairs(a, b, distance):
    assert edit_distance(a, b) == distance
    assert edit_distance(b, a) == distance


@given(words, words, words)
def test_edit_distance_obeys_the_triangle_inequality(a, b, c):
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Coca Cola", ["coca  cola "], 1.0),  # case and blanks do not count
        ("cola", ["cold"], 0.75),  # one of four characters
        ("abcd", ["abce", "abcdefgh"], 0.75),  # best of 1/4 and 4/8
        ("abc", ["abd"], 2 / 3),  # a distance of 1/3 is below the threshold
        ("ab", ["ac"], 0.0),  # exactly one half: the paper sets it to 0
        ("abc", ["xyz"], 0.0),
        ("", ["abc"], 0.0),  # nothing is as far as can be
        ("  ", [""], 1.0),  # both empty once blanks are gone
    ],
)
def test_anls_of_hand_worked_cases(prediction, references, expected):
    assert anls(prediction, references) == pytest.approx(expected)


def test_padding_does_not_raise_anls():
    # One of three characters is wrong, with blanks around it or without.
    assert anls("   cat   ", ["car"]) == anls("cat", ["car"]) == pytest.approx(2 / 3)


@given(words, st.lists(words, min_size=1, max_size=4), st.randoms())
def test_anls_lies_in_0_to_1_whatever_the_order_of_references(prediction, references, random):
    score = anls(prediction, references)
    assert score == 0 or 0.5 < score <= 1
    assert anls(prediction, random.sample(references, len(references))) == score
    assert anls(prediction, [*references, prediction]) == 1


def test_anls_without_references_is_refused():
    with pytest.raises(DataError, match="at least one reference"):
        anls("a", [])


def test_one_string_in_place_of_references_is_refused():
    with pytest.raises(DataError, match="sequence of references"):
        anls("a", "abc")
