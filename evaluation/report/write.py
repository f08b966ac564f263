"""Writes the report of a run: numbers, charts and a gallery of samples, in one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vpt.evaluation.records import Record
from vpt.evaluation.report.cards import Card, CardMaker
from vpt.evaluation.report.choice import EvenChoice
from vpt.evaluation.report.gallery import Gallery, make_gallery
from vpt.evaluation.report.overview import overview_of
from vpt.evaluation.report.page import render_page, save_page
from vpt.evaluation.report.photos import PhotoShelf, PhotoSource, open_by_name
from vpt.evaluation.report.pictures import PictureTable
from vpt.evaluation.report.verdict import VERDICT_WORDS, verdict_of
from vpt.evaluation.results import BASELINE

REPORT_NAME = "report.html"
_LABELS = {
    "split": "Split",
    "condition": "Condition",
    "verdict": "Answer",
    "called": "Looked again",
    "change": "Against none",
    "group": "Group",
}
_WORDS = {
    "verdict": VERDICT_WORDS,
    "called": {"yes": "called", "no": "did not call"},
    "change": {"better": "became better", "worse": "became worse", "same": "same score"},
}


def write_report(
    results: Mapping[str, Any],
    records: Iterable[Record],
    folder: Path,
    max_samples: int = 400,
    *,
    open_photos: PhotoSource = open_by_name,
) -> Path:
    """Write ``report.html``.

    Args:
        results: as in ``results.json``.
        records: of the run, gone through once; no more than ``2 * max_samples`` are held.
        folder: that exists.
        max_samples: in the gallery, spread evenly over splits, conditions and right or wrong.
        open_photos: gives the images of a sample, where its names are no paths.

    Returns:
        Path of the report.

    Raises:
        DataError: if it cannot be written.
    """
    pictures = PictureTable()
    scores = {entry["split"]: entry["score"] for entry in results["splits"]}
    maker = CardMaker(PhotoShelf(open_photos), pictures)
    gallery = _gallery(records, scores, maker, max_samples)
    page = render_page(
        "report.html",
        pictures,
        results=results,
        overview=overview_of(results),
        gallery=gallery,
        verdict_words=VERDICT_WORDS,
    )
    return save_page(page, folder / REPORT_NAME)


def _gallery(
    records: Iterable[Record], scores: Mapping[str, str], maker: CardMaker, most: int
) -> Gallery[Card]:
    choice: EvenChoice[Record] = EvenChoice(most)
    baselines: dict[tuple[str, str], float] = {}
    for record in records:
        score = scores.get(record.split, "")
        if record.condition == BASELINE and score in record.scores:
            baselines[record.split, record.id] = record.scores[score]
        group = (record.split, record.condition, verdict_of(record, score))
        choice.offer(group, f"{record.split} {record.id}", record)
    chosen = sorted(choice.chosen(), key=lambda record: (record.split, record.id))
    cards = (
        maker.make(
            record,
            scores.get(record.split, ""),
            None if record.condition == BASELINE else baselines.get((record.split, record.id)),
        )
        for record in chosen
    )
    return make_gallery(cards, _facts, _LABELS, _WORDS, choice.num_offered)


def _facts(card: Card) -> dict[str, str]:
    return {
        "split": card.record.split,
        "condition": card.record.condition,
        "verdict": card.verdict,
        "called": card.called,
        "change": card.change,
        "group": card.record.group,
    }
