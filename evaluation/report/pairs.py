"""The page of a comparison: its numbers, and both answers to what was fixed or broken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vpt.evaluation.compare import ChangedSample, Comparison
from vpt.evaluation.report.axis import axis_around_zero
from vpt.evaluation.report.cards import Card, CardMaker
from vpt.evaluation.report.choice import EvenChoice
from vpt.evaluation.report.gallery import make_gallery
from vpt.evaluation.report.page import render_page, save_page
from vpt.evaluation.report.photos import PhotoShelf, PhotoSource, open_by_name
from vpt.evaluation.report.pictures import PictureTable
from vpt.evaluation.report.verdict import VERDICT_WORDS

_LABELS = {"split": "Split", "condition": "Condition", "fate": "Fate", "group": "Group"}


@dataclass(frozen=True)
class _CardPair:
    """The two cards of a sample."""

    fate: str
    a: Card
    b: Card


def write_comparison(
    comparison: Comparison,
    path: Path,
    max_samples: int = 400,
    *,
    open_photos: PhotoSource = open_by_name,
) -> Path:
    """Write a comparison as one HTML file.

    Args:
        comparison: of two runs.
        path: of the file; its folder exists.
        max_samples: in the gallery of fixed and broken ones, spread evenly.
        open_photos: gives the images of a sample, where its names are no paths.

    Returns:
        ``path``.

    Raises:
        DataError: if it cannot be written.
    """
    page = comparison_page(
        comparison, comparison.changed, max_samples=max_samples, open_photos=open_photos
    )
    return save_page(page, path)


def comparison_page(
    comparison: Comparison,
    changed: Iterable[ChangedSample],
    *,
    max_samples: int,
    open_photos: PhotoSource,
) -> str:
    """Make the page.

    Args:
        comparison: of two runs.
        changed: samples, of which ``max_samples`` are shown.
        max_samples: spread evenly over splits, conditions, and fixed or broken.
        open_photos: gives the images of a sample.
    """
    choice: EvenChoice[ChangedSample] = EvenChoice(max_samples)
    for sample in changed:
        group = (sample.a.split, sample.a.condition, sample.fate)
        choice.offer(group, f"{sample.a.split} {sample.a.id}", sample)
    pictures = PictureTable()
    maker = CardMaker(PhotoShelf(open_photos), pictures)
    pairs = (
        _CardPair(s.fate, maker.make(s.a, s.score), maker.make(s.b, s.score))
        for s in sorted(choice.chosen(), key=lambda s: (s.a.split, s.a.id))
    )
    differences = [row.difference for row in comparison.splits]
    return render_page(
        "compare.html",
        pictures,
        comparison=comparison,
        axis=axis_around_zero(end for d in differences for end in (d.low, d.high)),
        gallery=make_gallery(pairs, _facts, _LABELS, {}, choice.num_offered),
        verdict_words=VERDICT_WORDS,
    )


def _facts(pair: _CardPair) -> dict[str, str]:
    record = pair.a.record
    return {
        "split": record.split,
        "condition": record.condition,
        "fate": pair.fate,
        "group": record.group,
    }
