"""Exact match, VQA accuracy, ANLS and caption scores by hand."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import DataError, PromptError
from vpt.evaluation.scores.choices import contains_answer
from vpt.evaluation.scores.texts import (
    anls,
    chrf,
    corpus_bleu,
    edit_distance,
    exact_match,
    normalize_text,
    normalize_vqa,
    rouge_l,
    vqa_accuracy,
)


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


sentences = st.lists(
    st.sampled_from(["a", "the", "cat", "dog", "sat", "ran"]), min_size=1, max_size=8
).map(" ".join)


@pytest.fixture
def rouge():
    pytest.importorskip("rouge_score")


@pytest.fixture
def bleu():
    pytest.importorskip("sacrebleu")


def test_rouge_l_of_a_hand_worked_pair(rouge):
    # The longest common subsequence of "the cat sat" and "the dog sat" is "the ... sat": 2 words of
    # 3 on either side, so precision, recall and F are 2/3.
    assert rouge_l("the cat sat", ["The dog sat."]) == pytest.approx(2 / 3)
    # 2 of 3 words and 2 of 2: F = 2 * 2/3 * 1 / (2/3 + 1)
    assert rouge_l("the cat sat", ["the cat"]) == pytest.approx(0.8)


def test_rouge_l_takes_the_best_reference(rouge):
    assert rouge_l("the cat sat", ["a dog", "the cat"]) == pytest.approx(0.8)


def test_rouge_l_of_a_text_without_latin_letters_is_0(rouge):
    assert rouge_l("猫", ["猫"]) == 0


def test_chrf_of_a_hand_worked_pair(bleu):
    # "ab" against "ac", blanks apart: of 2 characters 1 is shared, of 1 pair none; longer n-grams
    # do not exist. Precision and recall are both (1/2 + 0) / 2, and so is their F.
    assert chrf("ab", ["ac"]) == pytest.approx(0.25)
    assert chrf("ab", ["xy", "ab"]) == pytest.approx(1)
    assert chrf("", ["ab"]) == 0


def test_corpus_bleu_of_a_hand_worked_pair(bleu):
    # "a b c d e" against "a b c d f": n-gram precisions 4/5, 3/4, 2/3, 1/2, same length:
    # (4/5 * 3/4 * 2/3 * 1/2) ** (1/4) = 0.2 ** 0.25
    assert corpus_bleu(["a b c d e"], [["a b c d f"]]) == pytest.approx(0.2**0.25)


def test_corpus_bleu_adds_up_before_it_divides(bleu):
    # Of 1-grams 4 + 5 of 5 + 5 are right, of 2-grams 3 + 4 of 4 + 4, and so on.
    expected = (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25
    pairs = {"a b c d e": "a b c d f", "g h i j k": "g h i j k"}
    assert corpus_bleu(list(pairs), [[text] for text in pairs.values()]) == pytest.approx(expected)


def test_corpus_bleu_takes_unequal_numbers_of_references(bleu):
    predictions = ["the cat sat on the mat", "a dog ran in the park"]
    references = [["a dog", predictions[0]], [predictions[1]]]
    assert corpus_bleu(predictions, references) == pytest.approx(1)


@given(sentences, st.lists(sentences, min_size=1, max_size=3), st.randoms())
def test_sentence_scores_lie_in_0_to_1_whatever_the_order(prediction, references, random):
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    for score in (rouge_l, chrf):
        value = score(prediction, references)
        assert 0 <= value <= 1
        assert score(prediction, random.sample(references, len(references))) == value
        assert score(prediction, [*references, prediction]) == pytest.approx(1)


def test_captions_without_references_are_refused(rouge, bleu):
    for score in (rouge_l, chrf):
        with pytest.raises(DataError, match="at least one reference"):
            score("a cat", [])
    with pytest.raises(DataError, match="at least one reference"):
        corpus_bleu(["a cat"], [[]])
    with pytest.raises(DataError, match="2 predictions and 1 sets"):
        corpus_bleu(["a cat", "a dog"], [["a cat"]])
    with pytest.raises(DataError, match="0 predictions"):
        corpus_bleu([], [])


@pytest.mark.parametrize(
    ("package", "score"), [("rouge_score.rouge_scorer", rouge_l), ("sacrebleu", chrf)]
)
def test_a_missing_library_says_how_to_install_it(monkeypatch, package, score):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(PromptError, match=r'pip install -e "\.\[eval\]"'):
        score("a cat", ["a cat"])
