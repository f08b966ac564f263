"""The figures of a sample: photos with boxes, what calls brought, what the model drew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vpt.boxes import Box, rescale, to_unit
from vpt.errors import PromptError
from vpt.evaluation.records import Record
from vpt.evaluation.report.pictures import PictureTable, Thumbnail, shown_size
from vpt.trace.records import CallRecord
from vpt.view.album import Album, base_name
from vpt.view.depth import depth_picture
from vpt.view.heat import heat_over, seen_box_px
from vpt.view.marks import boxes_on, call_colour, marks_on
from vpt.view.wording import call_words, content_words

MOST_PHOTOS = 4
MOST_LOOKS = 4
EVIDENCE_COLOUR = "#ffd400"
_BLANK_RGB = (127, 127, 127)
_LABEL_ROOM = 12.0  # percent of a figure: the height of a label where figures are small


@dataclass(frozen=True)
class Outline:
    """A box over a figure.

    Attributes:
        kind: ``"cells"`` that were named, what was ``"cut"`` out of it, a ``"box"`` that the
            model wrote, or ``"evidence"``.
        box_unit: XYXY in unit coordinates of the figure.
        colour: ``"#rrggbb"``.
    """

    kind: str
    box_unit: Box
    colour: str

    @property
    def place(self) -> tuple[float, float, float, float]:
        """Left, top, width and height in percent of the figure; the last two never negative."""
        x0, y0, x1, y1 = (round(100 * side, 2) for side in self.box_unit)
        return x0, y0, round(max(x1 - x0, 0), 2), round(max(y1 - y0, 0), 2)


@dataclass(frozen=True)
class Label:
    """Numbers of the calls that a box belongs to, or of the box itself.

    Attributes:
        words: the numbers.
        colour: of the box.
        left_top: in percent of the figure.
    """

    words: str
    colour: str
    left_top: tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """A picture with words under it.

    Attributes:
        kind: ``"photo"``, ``"crop"``, ``"heat"`` or ``"depth"``.
        thumbnail: to show.
        words: under it.
        outlines: over it.
        labels: over these.
        colour: of the call that brought it; empty for a photo.
        number: of that call, from 1; 0 for a photo.
        ends: lowest and highest score of a score map, or words for the ends of a depth map.
    """

    kind: str
    thumbnail: Thumbnail
    words: str
    outlines: tuple[Outline, ...] = ()
    labels: tuple[Label, ...] = ()
    colour: str = ""
    number: int = 0
    ends: tuple[float, float] | tuple[str, str] | None = None


def photo_figures(record: Record, album: Album, pictures: PictureTable) -> Iterator[Figure]:
    """The given images, `MOST_PHOTOS` at most, with regions and evidence outlined.

    Raises:
        RegionError: if the trace holds an impossible region.
    """
    for place, (index, photo) in enumerate(album.given.items()):
        if place == MOST_PHOTOS:
            return
        seen = album.trace.images[index]
        outlines, labels = _mark(album, index)
        if place == 0 and record.box is not None:
            box_unit = to_unit(record.box, seen.size_wh)
            outlines.append(Outline("evidence", box_unit, EVIDENCE_COLOUR))
        words = f"{base_name(seen.source)} · {seen.size_wh[0]}x{seen.size_wh[1]}"
        if boxes := [box.words for box in boxes_on(album, index)]:
            names = boxes[0] if len(boxes) == 1 else f"{boxes[0]} to {boxes[-1]}"
            words += f" · {names}: written by the model"
        thumbnail = pictures.add(photo, seen.digest)
        yield Figure("photo", thumbnail, words, tuple(outlines), tuple(labels))


def _mark(album: Album, index: int) -> tuple[list[Outline], list[Label]]:
    """What calls named on a given image and cut out of it, boxes the model wrote, and numbers."""
    calls, size_wh = album.trace.calls, album.trace.images[index].size_wh
    outlines: list[Outline] = []
    labels: list[Label] = []
    for mark in marks_on(album, index):
        outlines.append(Outline("cells", to_unit(mark.cells, size_wh), mark.colour))
        if any(calls[number - 1].outcome == "executed" for number in mark.numbers):
            outlines.append(Outline("cut", to_unit(mark.cut, size_wh), mark.colour))
        corner = _free_corner(outlines[-1].place[:2], [label.left_top for label in labels])
        labels.append(Label(mark.words, mark.colour, corner))
    for box in boxes_on(album, index):
        outlines.append(Outline("box", to_unit(box.cut, size_wh), box.colour))
        corner = _free_corner(outlines[-1].place[:2], [label.left_top for label in labels])
        labels.append(Label(box.words, box.colour, corner))
    return outlines, labels


def _free_corner(
    left_top: tuple[float, float], taken: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """A corner in percent, moved down as long as there is another label."""
    x, y = (min(side, 100 - _LABEL_ROOM) for side in left_top)
    while y < 100 - _LABEL_ROOM and any(
        abs(x - other_x) < 2 * _LABEL_ROOM and abs(y - other_y) < _LABEL_ROOM
        for other_x, other_y in taken
    ):
        y += 1
    return x, y


def look_figures(album: Album, pictures: PictureTable) -> Iterator[Figure]:
    """What each executed call brought, `MOST_LOOKS` at most.

    Raises:
        PromptError: if scores do not fit their grid, or a branch is unknown.
    """
    trace = album.trace
    replaced = trace.settings.get("replace_looks")
    executed = [(n, call) for n, call in enumerate(trace.calls, 1) if call.outcome == "executed"]
    for number, call in executed[:MOST_LOOKS]:
        box = album.frame(call.image) if call.box_xyxy_px is None else call.box_xyxy_px
        picture, words = album.cut(call.image, box), call_words(call)
        if replaced == "blank":
            picture, words = Image.new("RGB", picture.size, _BLANK_RGB), f"{words} · made blank"
        elif replaced == "random" and call.region is not None:
            words = f"{words} · cut elsewhere"
        colour, size_wh = call_colour(number), (box[2] - box[0], box[3] - box[1])
        if call.scores and call.grid_hw is not None:
            heated, low, high = _heat(album, call, picture, size_wh)
            thumbnail = pictures.add(heated)
            ends = (low, high)
            yield Figure("heat", thumbnail, words, colour=colour, number=number, ends=ends)
        else:
            words = words if call.region is not None else f"{words} · no score map"
            thumbnail = pictures.add(picture)
            yield Figure("crop", thumbnail, words, colour=colour, number=number)


def depth_figures(album: Album, pictures: PictureTable) -> Iterator[Figure]:
    """The depth maps the model wrote and that were decoded, `MOST_LOOKS` at most.

    Raises:
        ImageError: if one is damaged.
    """
    trace = album.trace
    drawn = [
        (one, picture)
        for one in trace.content
        if (picture := depth_picture(one, trace.images[one.image].size_wh)) is not None
    ]
    for one, picture in drawn[:MOST_LOOKS]:
        words = f"{content_words(one)}, written by the model"
        yield Figure("depth", pictures.add(picture), words, ends=("far", "near"))


def _heat(
    album: Album, call: CallRecord, photo: Image.Image, size_wh: tuple[int, int]
) -> tuple[Image.Image, float, float]:
    """The score map over the photo at its shown size, with its lowest and highest score."""
    assert call.scores and call.grid_hw is not None
    if len(call.scores) != call.grid_hw[0] * call.grid_hw[1]:
        raise PromptError(f"{len(call.scores)} scores for a grid of {call.grid_hw}")
    scores = np.asarray(call.scores, dtype=np.float32).reshape(call.grid_hw)
    preprocess = album.trace.model.get("preprocess", {}).get(call.branch)
    shown = photo.resize(shown_size(photo.size), Image.Resampling.BILINEAR, reducing_gap=2)
    seen = rescale(seen_box_px(call.branch, size_wh, preprocess), size_wh, shown.size)
    return heat_over(shown, scores, seen)
