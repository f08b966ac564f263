"""A card: everything the page shows of one sample under one condition."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from vpt.errors import ImageError, VPTError
from vpt.evaluation.records import Record
from vpt.evaluation.report.figures import Figure, depth_figures, look_figures, photo_figures
from vpt.evaluation.report.photos import PhotoShelf
from vpt.evaluation.report.pictures import PictureTable
from vpt.evaluation.report.verdict import change_of, verdict_of
from vpt.trace.records import Trace
from vpt.view.album import base_name
from vpt.view.wording import OUTCOME_WORDS, STOP_WORDS, call_words, content_words


@dataclass(frozen=True)
class Card:
    """What is shown of a sample.

    Attributes:
        record: of the sample.
        score: name of the score that decides.
        verdict: ``"right"``, ``"wrong"``, ``"unscored"`` or ``"error"``.
        change: against not looking again: ``"better"``, ``"worse"``, ``"same"`` or empty.
        trace: of the run; ``None`` if there is none.
        figures: photos first, then what calls brought, then depth maps the model wrote.
        problem: why figures are missing; empty if none are.
    """

    record: Record
    score: str
    verdict: str
    change: str
    trace: Trace | None
    figures: tuple[Figure, ...]
    problem: str

    @property
    def called(self) -> str:
        """``"yes"`` or ``"no"``; empty where nothing ran."""
        if self.trace is None:
            return ""
        return "yes" if self.record.num_calls else "no"

    @property
    def scores(self) -> list[tuple[str, float]]:
        """Names and values, the one that decides first."""
        return sorted(self.record.scores.items(), key=lambda item: item[0] != self.score)

    @property
    def calls(self) -> list[str]:
        """Each call in words, and what came of it."""
        if self.trace is None:
            return []
        outcomes = [OUTCOME_WORDS.get(call.outcome, call.outcome) for call in self.trace.calls]
        return [
            call_words(call) + ("" if call.outcome == "executed" else f" ({outcome})")
            for call, outcome in zip(self.trace.calls, outcomes, strict=True)
        ]

    @property
    def drawings(self) -> list[str]:
        """Each depth map that the model wrote, in words, and how many boxes in all."""
        written = self.trace.content if self.trace else []
        words = [content_words(one) for one in written if one.kind == "depth"]
        if any(one.kind == "boxes" for one in written):
            number = sum(len(one.boxes or ()) for one in written)
            words.append("1 box" if number == 1 else f"{number} boxes")
        return words

    @property
    def stop_words(self) -> str:
        """Why the run ended."""
        reason = self.trace.stop_reason if self.trace else ""
        return STOP_WORDS.get(reason, reason)


class CardMaker:
    """Makes the cards of a page.

    Args:
        shelf: of photos.
        pictures: of the page.
    """

    def __init__(self, shelf: PhotoShelf, pictures: PictureTable) -> None:
        self.shelf = shelf
        self.pictures = pictures

    def make(self, record: Record, score: str, baseline: float | None = None) -> Card:
        """Make a card; what is wrong with a sample is said on it, never raised.

        Args:
            record: of the sample.
            score: name of the score that decides.
            baseline: the sample's score without looking again, if there is one.
        """
        trace: Trace | None = None
        figures: list[Figure] = []
        problem = ""
        try:
            if record.trace is not None:
                trace = record.read_trace()
                album = self.shelf.album(record, trace)
                figures += photo_figures(record, album, self.pictures)
                figures += look_figures(album, self.pictures)
                figures += depth_figures(album, self.pictures)
            elif record.error and record.error["kind"] == "run":
                figures += self._plain_photos(record)
        except ImageError as exc:
            problem = f"The picture cannot be shown: {exc}"
        except VPTError as exc:
            problem = f"The record cannot be drawn: {exc}"
            with suppress(ImageError):
                figures = figures or self._plain_photos(record)
        change = change_of(record.scores.get(score), baseline)
        verdict = verdict_of(record, score)
        return Card(record, score, verdict, change, trace, tuple(figures), problem)

    def _plain_photos(self, record: Record) -> list[Figure]:
        """The photos alone, of a run that failed or cannot be drawn."""
        return [
            Figure("photo", self.pictures.add(photo.pixels, photo.digest), base_name(name))
            for name, photo in zip(record.images, self.shelf.open(record), strict=False)
        ]
