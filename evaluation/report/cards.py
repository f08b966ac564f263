"""Cards: one sample under one condition each, with figures, answer and scores."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from vpt.boxes import Box, to_unit
from vpt.errors import ImageError, VPTError
from vpt.evaluation.compare import RIGHT_SCORE
from vpt.evaluation.records import Record
from vpt.images import LoadedImage, load_image
from vpt.trace.records import CallRecord, ContentRecord, Trace
from vpt.view.renderers import (
    CHIP_HEIGHT,
    Album,
    Mark,
    base_name,
    boxes_legend,
    call_colour,
    chip_width,
    draw_look,
    marks_on,
    place_chips,
)
from vpt.view.wording import OUTCOME_TEXT, STOP_TEXT, boxes_text, call_text, content_text

ROOM_WH = (320, 260)  # in which every picture fits
MOST_PHOTOS = 4
MOST_LOOKS = 4
EVIDENCE_COLOUR = "#ffd400"
VERDICT_WORDS = {"right": "right", "wrong": "wrong", "unscored": "unscored", "error": "failed"}

_SMALL = 64  # pixels; up to this a PNG is smaller than a JPEG, and sharp
_MOST_GROWTH = 8

PhotoSource = Callable[[Record], Sequence[LoadedImage]]
"""Returns the images of a sample, in order; raises ``ImageError`` if it cannot."""


class Thumbnail(NamedTuple):
    """A picture of the page's table, in CSS pixels; a grown one is shown larger than it is."""

    key: str
    width: int
    height: int
    is_grown: bool


class PictureTable:
    """All pictures of a page as data URIs, each held once however often it is shown."""

    def __init__(self) -> None:
        self.uris: dict[str, str] = {}  # by key
        self._keys: dict[str, str] = {}  # hash of the encoded bytes -> key
        self._known: dict[str, Thumbnail] = {}

    def add(self, picture: Image.Image, digest: str = "") -> Thumbnail:
        """Shrink an RGB picture and hold it; one whose digest is known is shrunk once."""
        if digest in self._known:
            return self._known[digest]
        width, height = shown_size(picture.size)
        small = picture
        if picture.width > width:
            small = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
        kind = "png" if max(small.size) <= _SMALL else "jpeg"
        buffer = io.BytesIO()
        small.save(buffer, format=kind, quality=80, optimize=True)
        data = buffer.getvalue()
        key = self._keys.setdefault(hashlib.sha256(data).hexdigest(), f"p{len(self._keys)}")
        self.uris[key] = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
        thumbnail = Thumbnail(key, width, height, width >= 2 * small.width)
        if digest:
            self._known[digest] = thumbnail
        return thumbnail


def shown_size(size_wh: tuple[int, int]) -> tuple[int, int]:
    """``(W, H)`` at which a picture is shown: as large as `ROOM_WH` allows, no side below 1."""
    scale = min(ROOM_WH[0] / size_wh[0], ROOM_WH[1] / size_wh[1], _MOST_GROWTH)
    return max(round(size_wh[0] * scale), 1), max(round(size_wh[1] * scale), 1)


def open_by_name(record: Record) -> list[LoadedImage]:
    """Open the images of a sample by their names, which are paths for most splits."""
    return [load_image(name) for name in record.images]


class Outline(NamedTuple):
    """A box over a figure."""

    kind: str  # "cells", "cut", "box" or "evidence"
    place: tuple[float, float, float, float]  # left, top, width, height in percent of the figure
    colour: str


class Label(NamedTuple):
    """The label of a mark; its centre in percent of the figure."""

    words: str
    colour: str
    centre: tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """A picture with words under it, and marks over it."""

    kind: str  # "photo", "crop", "heat" or "depth"
    thumbnail: Thumbnail
    words: str
    outlines: tuple[Outline, ...] = ()
    labels: tuple[Label, ...] = ()
    number: int = 0  # of the call that brought it, from 1
    colour: str = ""  # of that call
    ends: tuple[str, str] | None = None  # of its colour scale


def _outlines(marks: Sequence[Mark], size_wh: tuple[int, int]) -> Iterator[Outline]:
    for mark in marks:
        if mark.kind == "region":
            yield Outline("cells", _percent(mark.cells, size_wh), mark.colour)
        if mark.outline is not None:
            kind = "cut" if mark.kind == "region" else mark.kind
            yield Outline(kind, _percent(mark.outline, size_wh), mark.colour)


def _percent(box: Box, size_wh: tuple[int, int]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (_share(side, 1) for side in to_unit(box, size_wh))
    return x0, y0, round(max(x1 - x0, 0), 2), round(max(y1 - y0, 0), 2)


def _labels(marks: Sequence[Mark], size_wh: tuple[int, int], shown: Thumbnail) -> Iterator[Label]:
    width, height = shown.width // 2 + 1, shown.height // 2 + 1  # as small as figures get
    for mark, (left, top) in zip(marks, place_chips(marks, size_wh, (width, height)), strict=False):
        x, y = left + chip_width(mark.label) / 2, top + CHIP_HEIGHT / 2
        yield Label(mark.label, mark.colour, (_share(x, width), _share(y, height)))


def _share(value: float, whole: float) -> float:
    return round(100 * value / whole, 2)


@dataclass(frozen=True)
class Card:
    """The content of a card."""

    record: Record
    score: str  # name of the score that decides
    verdict: str  # see verdict_of
    change: str  # see change_of
    trace: Trace | None
    figures: tuple[Figure, ...]  # photos, then what calls brought, then depth maps it wrote
    problem: str  # why figures are missing

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
        words = []
        for call in self.trace.calls if self.trace else []:
            outcome = OUTCOME_TEXT.get(call.outcome, call.outcome)
            words.append(call_text(call) + (f" ({outcome})" if outcome != "executed" else ""))
        return words

    @property
    def drawings(self) -> list[str]:
        """Each depth map that the model wrote, in words, and how many boxes in all."""
        written = self.trace.content if self.trace else []
        words = [content_text(one) for one in written if one.kind == "depth"]
        if boxes := [len(one.boxes or ()) for one in written if one.kind == "boxes"]:
            words.append(boxes_text(sum(boxes)))
        return words

    @property
    def stop_words(self) -> str:
        """Why the run ended."""
        reason = self.trace.stop_reason if self.trace else ""
        return STOP_TEXT.get(reason, reason)


def verdict_of(record: Record, score: str) -> str:
    """``"right"``, ``"wrong"``, ``"unscored"`` or ``"error"``, by the score that decides."""
    if record.error is not None:
        return "error"
    value = record.scores.get(score)
    if value is None:
        return "unscored"
    return "right" if value >= RIGHT_SCORE else "wrong"


def change_of(value: float | None, baseline: float | None) -> str:
    """``"better"``, ``"worse"`` or ``"same"``; empty where one of the two scores is missing."""
    if value is None or baseline is None:
        return ""
    if value == baseline:
        return "same"
    return "better" if value > baseline else "worse"


class CardMaker:
    """Makes the cards of a page; the photos of the last sample are kept at hand."""

    def __init__(self, source: PhotoSource, pictures: PictureTable) -> None:
        self.source = source
        self.pictures = pictures
        self._last: tuple[str, str] | None = None
        self._photos: Sequence[LoadedImage] = ()

    def make(self, record: Record, score: str, baseline: float | None = None) -> Card:
        """Make a card; problems of a sample are written on it, never raised.

        ``score`` names the score that decides; ``baseline`` is its value without looking again.
        """
        trace, problem = None, ""
        figures: list[Figure] = []
        try:
            if record.trace is not None:
                trace = record.read_trace()
                for figure in self._figures(record, self._album(record, trace)):
                    figures.append(figure)  # those before an error stay
            elif record.error and record.error["kind"] == "run":
                figures += self._plain_photos(record)
        except ImageError as exc:
            problem = f"The picture cannot be shown: {exc}"
        except VPTError as exc:
            problem = f"The record cannot be drawn: {exc}"
            with suppress(ImageError):
                figures = figures or self._plain_photos(record)
        verdict, change = verdict_of(record, score), change_of(record.scores.get(score), baseline)
        return Card(record, score, verdict, change, trace, tuple(figures), problem)

    def photos(self, record: Record) -> Sequence[LoadedImage]:
        """Open the photos of a sample; raises ``ImageError`` if one cannot be opened."""
        if self._last != (record.split, record.id):
            self._photos = self.source(record)
            self._last = (record.split, record.id)
        return self._photos

    def _album(self, record: Record, trace: Trace) -> Album:
        """The images of a run: thumbnails where the trace holds them, else the photos."""
        given = [image for image in trace.images if image.parent is None]
        if given and all(image.thumbnail for image in given):
            return Album(trace)
        photos = self.photos(record)
        for seen, photo in zip(given, photos, strict=False):
            if seen.digest != photo.digest:
                raise ImageError(f"{base_name(seen.source)} is not the picture the model saw")
        return Album(trace, [photo.pixels for photo in photos])

    def _plain_photos(self, record: Record) -> list[Figure]:
        """The photos alone, of a run that failed or cannot be drawn."""
        return [
            Figure("photo", self.pictures.add(photo.pixels, photo.digest), base_name(name))
            for name, photo in zip(record.images, self.photos(record), strict=False)
        ]

    def _figures(self, record: Record, album: Album) -> Iterator[Figure]:
        for index in list(album.given)[:MOST_PHOTOS]:
            yield self._photo(record, album, index)
        calls = enumerate(album.trace.calls, 1)
        executed = [(number, call) for number, call in calls if call.outcome == "executed"]
        for number, call in executed[:MOST_LOOKS]:
            yield self._look(album, call, call_text(call), number)
        drawn = [one for one in album.trace.content if one.picture is not None]
        for one in drawn[:MOST_LOOKS]:
            yield self._look(album, one, f"{content_text(one)}, written by the model")

    def _photo(self, record: Record, album: Album, index: int) -> Figure:
        """A given image with its marks; on the first, where the evidence is."""
        seen, marks = album.trace.images[index], marks_on(album, index)
        words = f"{base_name(seen.source)} · {seen.size_wh[0]}x{seen.size_wh[1]}"
        if boxes := boxes_legend(marks):
            words += f" · {boxes}"
        thumbnail = self.pictures.add(album.given[index], seen.digest)
        labels = tuple(_labels(marks, seen.size_wh, thumbnail))
        outlines = [*_outlines(marks, seen.size_wh)]
        if index == 0 and record.box is not None:
            place = _percent(record.box, seen.size_wh)
            outlines.append(Outline("evidence", place, EVIDENCE_COLOUR))
        return Figure("photo", thumbnail, words, tuple(outlines), labels)

    def _look(
        self, album: Album, one: CallRecord | ContentRecord, words: str, number: int = 0
    ) -> Figure:
        """What a call brought, or a depth map."""
        crop = one.box_xyxy_px if isinstance(one, CallRecord) else None
        x0, y0, x1, y1 = crop or album.frame(one.image)
        size_wh = x1 - x0, y1 - y0
        room_wh = shown_size(size_wh)
        if crop is not None:  # the browser enlarges it
            room_wh = min(room_wh[0], size_wh[0]), min(room_wh[1], size_wh[1])
        look = draw_look(album, one, room_wh)
        return Figure(
            "crop" if look.kind == "plain" else look.kind,
            self.pictures.add(look.picture),
            f"{words} · {look.note}" if look.note else words,
            number=number,
            colour=call_colour(number) if number else "",
            ends=look.ends,
        )
