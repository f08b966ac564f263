"""The scores that a split can name, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vpt.errors import DataError
from vpt.evaluation.scores.choices import (
    contains_answer,
    extract_choice,
    extract_yes_no,
    multiple_choice,
    pope,
    true_answer,
)
from vpt.evaluation.scores.numbers import count_accuracy, extract_count, relaxed_accuracy
from vpt.evaluation.scores.texts import anls, chrf, corpus_bleu, exact_match, rouge_l, vqa_accuracy

if TYPE_CHECKING:
    from vpt.evaluation.records import Record
    from vpt.evaluation.samples import Sample

PerSample = Callable[[str, "Sample"], Mapping[str, float]]
Aggregate = Callable[[Sequence["Record"]], Mapping[str, float]]


@dataclass(frozen=True)
class Score:
    """How predictions of a split are scored; of several values the main one, ``name``, is first.

    Attributes:
        per_sample: (prediction, sample) -> values, "unparsed" is 1 if the answer could not be
            read. Raises `DataError` for a sample that the score cannot be used on.
        aggregate: records of one split and condition -> values. Records with an error are skipped;
            empty if none is left.
        chance: sample -> expected score of a random guess, ``None`` where that is undefined.
    """

    name: str
    about: str
    per_sample: PerSample
    aggregate: Aggregate
    chance: Callable[[Sample], float | None] = lambda sample: None


def _by_answers(name: str, about: str, score: Callable[[str, Sequence[str]], float]) -> Score:
    return Score(
        name, about, lambda said, sample: {name: score(said, sample.answers)}, _means(name)
    )


def _means(*names: str) -> Aggregate:
    def aggregate(records: Sequence[Record]) -> Mapping[str, float]:
        columns = {name: _column(records, name) for name in names}
        return {name: sum(values) / len(values) for name, values in columns.items() if values}

    return aggregate


def _column(records: Sequence[Record], name: str) -> list[float]:
    values = []
    for record in records:
        if record.error is None:
            if name not in record.scores:
                raise DataError(
                    f"sample {record.id} of {record.split} has no score {name!r}, only "
                    f"{sorted(record.scores)}; score it again"
                )
            values.append(record.scores[name])
    return values


def _chance_of_choice(sample: Sample) -> float | None:
    return len(set(sample.answers)) / len(sample.choices) if sample.choices else None


def _count(prediction: str, sample: Sample) -> Mapping[str, float]:
    return {
        "count_accuracy": count_accuracy(prediction, sample.answers),
        "unparsed": float(extract_count(prediction) is None),
    }


def _choice(prediction: str, sample: Sample) -> Mapping[str, float]:
    return {
        "multiple_choice": multiple_choice(prediction, sample.choices, sample.answers),
        "unparsed": float(extract_choice(prediction, sample.choices) is None),
    }


def _yes_no(prediction: str, sample: Sample) -> Mapping[str, float]:
    said, truth = extract_yes_no(prediction), true_answer(sample.answers)
    return {
        "yes_no": float(said == truth),
        "said_yes": float(said == "yes"),
        "is_yes": float(truth == "yes"),
        "unparsed": float(said is None),
    }


def _yes_no_summary(records: Sequence[Record]) -> Mapping[str, float]:
    said_yes, is_yes, unparsed = (_column(records, n) for n in ("said_yes", "is_yes", "unparsed"))
    said = ["yes" if value else "no" for value in said_yes]
    readable = [None if bad else word for word, bad in zip(said, unparsed, strict=True)]
    summary = pope(readable, ["yes" if value else "no" for value in is_yes])
    return {"yes_no" if name == "accuracy" else name: value for name, value in summary.items()}


def _caption(prediction: str, sample: Sample) -> Mapping[str, float]:
    return {
        "caption": rouge_l(prediction, sample.answers),
        "chrf": chrf(prediction, sample.answers),
    }


def _caption_summary(records: Sequence[Record]) -> Mapping[str, float]:
    scored = [record for record in records if record.error is None]
    if not scored:
        return {}
    bleu = corpus_bleu([r.prediction for r in scored], [r.answers for r in scored])
    return {**_means("caption", "chrf")(scored), "bleu_4": bleu}


_TABLE = (
    _by_answers("anls", "spelling close to a reference (ANLS)", anls),
    Score("caption", "ROUGE-L, chrF; BLEU-4 over all", _caption, _caption_summary),
    _by_answers("contains", "the answer contains a reference", contains_answer),
    Score("count_accuracy", "the right number", _count, _means("count_accuracy", "unparsed")),
    _by_answers("exact_match", "the answer equals a reference", exact_match),
    Score(
        "multiple_choice",
        "the right option",
        _choice,
        _means("multiple_choice", "unparsed"),
        _chance_of_choice,
    ),
    _by_answers("relaxed_accuracy", "numbers within 5 %, text exact", relaxed_accuracy),
    _by_answers("vqa_accuracy", "agreement with annotators (VQA)", vqa_accuracy),
    Score("yes_no", "yes or no, with POPE's measures", _yes_no, _yes_no_summary, lambda _: 0.5),
)
SCORES: Mapping[str, Score] = {score.name: score for score in _TABLE}
