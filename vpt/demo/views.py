"""The pictures the demo shows of a trace: photo, results of calls, depth maps and boxes."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from vpt.boxes import Box, rescale
from vpt.errors import PromptError
from vpt.trace.records import Trace
from vpt.view.renderers import Album, draw_look, fitted, marked_photo
from vpt.view.wording import call_text, content_text

ROOM_WH = (640, 640)


@dataclass(frozen=True)
class Views:
    """The pictures of a trace, with one call or depth map chosen.

    Attributes:
        photo: the given image, with all regions and written boxes on it.
        crop: the result of the call, if there is no map of it.
        heat: photo and score map over it, or photo and depth map.
    """

    photo: Image.Image | None = None
    crop: Image.Image | None = None
    heat: tuple[Image.Image, Image.Image] | None = None


def draw_views(trace: Trace, number: int | None = None, drawn_box: Box | None = None) -> Views:
    """Draw the pictures of a trace that keeps its thumbnails; ``VPTError`` if they are damaged.

    Args:
        trace: of a run, finished or not.
        number: of the call to show, from 1, or of the depth map, from -1 down; default: the latest.
        drawn_box: XYXY in pixels of the given image, marked on the photo by a dashed frame.
    """
    album = Album(trace)
    done = [n for _, n in shown_looks(trace)]
    number = number if number in done else next(reversed(done), 0)
    if not album.given:
        return Views()
    if not number:
        return Views(marked_photo(album, 0, ROOM_WH, drawn_box))
    one = trace.calls[number - 1] if number > 0 else trace.content[-number - 1]
    photo = marked_photo(album, trace.root(one.image), ROOM_WH, drawn_box)
    look = draw_look(album, one, ROOM_WH)
    if look.kind in ("crop", "plain"):
        return Views(photo, crop=look.picture)
    return Views(photo, heat=(look.photo, look.picture))


def shown_looks(trace: Trace) -> list[tuple[str, int]]:
    """The calls that have results and the depth maps that were decoded, each with its number."""
    found = [
        (one.turn, 0, (content_text(one), -number))
        for number, one in enumerate(trace.content, 1)
        if one.picture is not None
    ]
    found += [
        (call.turn, 1, (f"{number} · {call_text(call)}", number))
        for number, call in enumerate(trace.calls, 1)
        if call.outcome == "executed" and call.grid_hw is not None
    ]
    return [look for _, _, look in sorted(found, key=lambda entry: entry[:2])]


def point_on_image(trace: Trace, point_xy: tuple[float, float]) -> tuple[float, float]:
    """Turn a point of the shown photo, in its pixels, into one of the given image."""
    if not trace.images:
        raise PromptError("there is no image to mark")
    shown_wh = fitted(Album(trace).given[0], ROOM_WH).size
    x, y, _, _ = rescale((*point_xy, *point_xy), shown_wh, trace.images[0].size_wh)
    return x, y


def box_to_edit(trace: Trace) -> Box | None:
    """The box of the first region, in pixels of the given image: where editing begins."""
    boxes = (call.box_xyxy_px for call in trace.calls if call.box_xyxy_px is not None)
    return next(boxes, None)
