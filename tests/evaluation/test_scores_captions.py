"""Caption scores: hand-worked values, several references, and what happens without libraries."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt.errors import DataError, PromptError
from vpt.evaluation.scores.texts import chrf, corpus_bleu, rouge_l

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
