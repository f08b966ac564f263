"""The pictures the demo shows of a trace: photo, what a call brought, what the model wrote."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

from vpt.boxes import Box, rescale
from vpt.errors import PromptError
from vpt.trace.records import CallRecord, ContentRecord, Trace
from vpt.view.album import Album, fitted
from vpt.view.depth import depth_picture
from vpt.view.heat import heat_over, score_map, seen_of_call
from vpt.view.lettering import INK, PAPER
from vpt.view.marks import boxes_on, draw_marks, marks_on
from vpt.view.wording import call_words, content_words

ROOM_WH = (640, 640)


@dataclass(frozen=True)
class Views:
    """The pictures of a trace, with one call or depth map chosen.

    Attributes:
        photo: the given image that the call looks at, with all regions and written boxes on it;
            ``None`` without images.
        number: of the chosen call, from 1; of a depth map, from -1 downwards; 0 for none.
        crop: what it brought, if that is a picture.
        heat: photo and score map over it, if it has scores; photo and depth map.
        ends: lowest and highest score.
    """

    photo: Image.Image | None = None
    number: int = 0
    crop: Image.Image | None = None
    heat: tuple[Image.Image, Image.Image] | None = None
    ends: tuple[float, float] | None = None


def draw_views(trace: Trace, number: int | None = None, drawn_box: Box | None = None) -> Views:
    """Draw the pictures of a trace that keeps its thumbnails.

    Args:
        trace: of a run, finished or not.
        number: the call or depth map to show, as in :class:`Views`; by default the latest.
        drawn_box: XYXY in pixels of the given image, marked on the photo by a dashed frame.

    Raises:
        VPTError: if it holds no pictures, or damaged ones.
    """
    album = Album(trace, None)
    done = [n for _, n in shown_looks(trace)]
    number = number if number in done else next(reversed(done), 0)
    if not album.given:
        return Views()
    if number < 0:
        return _mapped(album, number, trace.content[-number - 1], drawn_box)
    call = trace.calls[number - 1] if number else None
    root = 0 if call is None else album.root(call.image)
    photo = _photo(album, root, drawn_box)
    if call is None:
        return Views(photo)
    if call.box_xyxy_px is not None:
        return Views(photo, number, crop=fitted(album.brought(call), ROOM_WH))
    return _heated(album, call, Views(photo, number))


def shown_looks(trace: Trace) -> list[tuple[str, int]]:
    """What calls brought something and what depth maps were decoded, each with its number."""
    found = [
        (one.turn, 0, (content_words(one), -number))
        for number, one in enumerate(trace.content, 1)
        if one.picture is not None
    ]
    for number, call in enumerate(trace.calls, 1):
        if _is_done(call):
            found.append((call.turn, 1, (f"{number} · {call_words(call)}", number)))
    return [look for _, _, look in sorted(found, key=lambda entry: entry[:2])]


def point_on_image(trace: Trace, point_xy: tuple[float, float]) -> tuple[float, float]:
    """Turn a point of the shown photo, in its pixels, into one of the given image.

    Raises:
        PromptError: if the trace has no image.
    """
    if not trace.images:
        raise PromptError("there is no picture to mark")
    album = Album(trace, None)
    shown_wh = fitted(album.given[0], ROOM_WH).size
    x, y, _, _ = rescale((*point_xy, *point_xy), shown_wh, trace.images[0].size_wh)
    return x, y


def box_to_edit(trace: Trace) -> Box | None:
    """The box of the first region, in pixels of the given image: where editing begins."""
    boxes = (call.box_xyxy_px for call in trace.calls if call.box_xyxy_px is not None)
    return next(boxes, None)


def _is_done(call: CallRecord) -> bool:
    return call.outcome == "executed" and call.grid_hw is not None


def _mapped(album: Album, number: int, one: ContentRecord, drawn_box: Box | None) -> Views:
    """The picture that a depth map is of, and the map."""
    photo = _photo(album, album.root(one.image), drawn_box)
    picture = fitted(album.cut(one.image, album.frame(one.image)), ROOM_WH)
    drawn = depth_picture(one, picture.size)
    assert drawn is not None  # only those are shown
    return Views(photo, number, heat=(picture, drawn.resize(picture.size)))


def _photo(album: Album, index: int, drawn_box: Box | None) -> Image.Image:
    """A given image with its regions, and the boxes that the model wrote on it."""
    size_wh = album.trace.images[index].size_wh
    photo = fitted(album.given[index], ROOM_WH).copy()
    marks = [*marks_on(album, index), *boxes_on(album, index)]
    draw_marks(photo, marks, size_wh, (0, 0, *photo.size))
    if drawn_box is not None:
        _dash(photo, rescale(drawn_box, size_wh, photo.size))
    return photo


def _dash(photo: Image.Image, box: Box, length: int = 9) -> None:
    """A dashed frame that is seen on any ground."""
    pen, (x0, y0, x1, y1) = ImageDraw.Draw(photo), map(round, box)
    x1, y1 = max(x1 - 1, x0), max(y1 - 1, y0)
    pen.rectangle((x0, y0, x1, y1), outline=PAPER, width=3)
    for x in range(x0, x1, 2 * length):
        for y in (y0, max(y1 - 2, y0)):
            pen.rectangle((x, y, min(x + length, x1), y + 2), fill=INK)
    for y in range(y0, y1, 2 * length):
        for x in (x0, max(x1 - 2, x0)):
            pen.rectangle((x, y, x + 2, min(y + length, y1)), fill=INK)


def _heated(album: Album, call: CallRecord, views: Views) -> Views:
    """The picture that a branch looked at, and its scores over it."""
    picture = fitted(album.cut(call.image, album.frame(call.image)), ROOM_WH)
    scores = score_map(call)
    if scores is None:
        return Views(views.photo, views.number, crop=picture)
    size_wh = album.trace.images[call.image].size_wh
    seen = rescale(seen_of_call(album.trace, call), size_wh, picture.size)
    heated, low, high = heat_over(picture, scores, seen)
    return Views(views.photo, views.number, heat=(picture, heated), ends=(low, high))
