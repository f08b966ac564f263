"""The table of scores: each row's values per sample and over records."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vpt.evaluation.scores
from vpt.errors import DataError
from vpt.evaluation.records import Record
from vpt.evaluation.samples import Sample
from vpt.evaluation.scores import SCORES

NAMES = {
    "anls",
    "caption",
    "contains",
    "count_accuracy",
    "exact_match",
    "multiple_choice",
    "relaxed_accuracy",
    "vqa_accuracy",
    "yes_no",
}
ERROR = {"kind": "run", "message": "out of memory"}


def sample(*answers: str, choices: tuple[str, ...] = ()) -> Sample:
    return Sample(id="1", images=(), question="?", answers=answers, choices=choices)


def record(name: str, prediction: str, of: Sample) -> Record:
    scores = dict(SCORES[name].per_sample(prediction, of))
    return Record("split", "auto", of.id, "?", prediction, of.answers, scores)


def test_exported_names_are_sorted_and_there():
    names = vpt.evaluation.scores.__all__
    assert names == sorted(names)
    assert all(hasattr(vpt.evaluation.scores, name) for name in names)


def test_the_table_has_each_score_under_its_name():
    assert set(SCORES) == NAMES
    assert all(score.name == name and score.about for name, score in SCORES.items())


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_right_answer_gets_1_under_the_name_of_the_score(name):
    if name == "caption":
        pytest.importorskip("rouge_score")
        pytest.importorskip("sacrebleu")
    answer = "yes" if name == "yes_no" else "three cats on a mat"
    values = SCORES[name].per_sample(answer, sample(answer, choices=("two dogs", answer)))
    assert next(iter(values)) == name
    assert values[name] == pytest.approx(1)
    summary = SCORES[name].aggregate(
        [record(name, answer, sample(answer, choices=("two dogs", answer)))]
    )
    assert next(iter(summary)) == name
    assert summary[name] == pytest.approx(1)


TEXTS = st.one_of(
    st.text(max_size=40),
    st.text("AaBbIxno 0123.,-%$()[]*\\n'\"是不有没答案选Ｂ。、（）３①Ⅳ٣²∞", max_size=40),
)
READABLE = {
    "multiple_choice": st.sampled_from(["A", "(b)", "Ｂ", "dog", "two cats"]),
    "yes_no": st.sampled_from(["yes", "No.", "Ｎｏ", "是", "不是的", "答案是否"]),
    "caption": st.from_regex(r"[a-z]{1,5}( [a-z]{1,5}){0,4}", fullmatch=True),
}
"""Right answers of scores that cannot read every text as one."""


@pytest.mark.parametrize("name", sorted(NAMES))
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_text_scores_from_0_to_1_and_a_right_answer_1(name, data):
    if name == "caption":
        pytest.importorskip("rouge_score")
        pytest.importorskip("sacrebleu")
    answer = data.draw(READABLE.get(name, TEXTS))
    of = sample(answer, choices=("dog", "two cats"))
    values = SCORES[name].per_sample(data.draw(TEXTS), of)
    assert all(0 <= value <= 1 for value in values.values())
    assert SCORES[name].per_sample(answer, of)[name] == pytest.approx(1)


def test_means_are_over_records_without_error():
    records = [
        record("exact_match", "red", sample("red")),
        record("exact_match", "blue", sample("red")),
        Record("split", "auto", "3", "?", error=ERROR),
    ]
    assert SCORES["exact_match"].aggregate(records) == {"exact_match": 0.5}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_scored_record_gives_no_summary(name):
    assert SCORES[name].aggregate([]) == {}
    assert SCORES[name].aggregate([Record("split", "auto", "1", "?", error=ERROR)]) == {}


def test_unreadable_choices_and_counts_are_reported():
    options = sample("B", choices=("dog", "cat"))
    choices = [record("multiple_choice", text, options) for text in ("B", "A", "hm", "cat")]
    assert SCORES["multiple_choice"].aggregate(choices) == {
        "multiple_choice": 0.5,
        "unparsed": 0.25,
    }
    counts = [record("count_accuracy", text, sample("3")) for text in ("three", "many")]
    assert SCORES["count_accuracy"].aggregate(counts) == {"count_accuracy": 0.5, "unparsed": 0.5}


def test_yes_no_is_summarised_by_popes_measures():
    truth = {"Yes.": "yes", "no": "yes", "No!": "no", "hm": "no"}
    records = [record("yes_no", said, sample(answer)) for said, answer in truth.items()]
    assert records[0].scores == {"yes_no": 1, "said_yes": 1, "is_yes": 1, "unparsed": 0}
    assert SCORES["yes_no"].aggregate(records) == pytest.approx(
        {
            "yes_no": 2 / 4,  # accuracy: "Yes." and "No!"
            "precision": 1,  # one yes, and right
            "recall": 1 / 2,
            "f1": 2 / 3,
            "yes_ratio": 1 / 3,  # of three readable answers
            "unparsed": 1 / 4,
        }
    )


def test_captions_are_summarised_with_bleu_over_all():
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    texts = ("a b c d e", "g h i j k")
    records = [
        record("caption", texts[0], sample("a b c d f")),
        record("caption", texts[1], sample("g h i j k", "x")),
        Record("split", "auto", "3", "?", error=ERROR),
    ]
    summary = SCORES["caption"].aggregate(records)
    assert list(summary) == ["caption", "chrf", "bleu_4"]
    assert summary["caption"] == pytest.approx((0.8 + 1) / 2)  # 4 of 5 words in order; all
    # see test_scores_captions.py
    assert summary["bleu_4"] == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)


def test_a_record_without_the_score_is_refused():
    with pytest.raises(DataError, match="sample 1 of split has no score 'anls'"):
        SCORES["anls"].aggregate([record("exact_match", "red", sample("red"))])


@pytest.mark.parametrize("name", sorted(NAMES - {"caption"}))
def test_a_sample_without_answers_is_refused(name):
    with pytest.raises(DataError, match="expected"):
        SCORES[name].per_sample("yes", sample(choices=("yes", "no")))


def test_an_open_question_is_no_multiple_choice():
    with pytest.raises(DataError, match="1 to 26 options"):
        SCORES["multiple_choice"].per_sample("B", sample("B"))


def test_scores_import_without_torch_and_caption_libraries():
    code = "import sys, vpt.evaluation.scores; print(sorted(sys.modules))"
    root = Path(__file__).parents[2]
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    for name in ("torch", "numpy", "rouge_score", "sacrebleu"):
        assert f"'{name}'" not in modules.stdout
