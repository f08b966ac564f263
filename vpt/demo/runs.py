"""The demo without its widgets: requests, runs that are watched, pictures of a trace."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vpt.boxes import Box, check_box_px, region_to_show, rescale
from vpt.chat import Chat
from vpt.errors import PromptError
from vpt.images import load_image
from vpt.inference.request import OPTIONS, Request
from vpt.runtime import Snapshot
from vpt.trace.records import CallRecord, ContentRecord, Trace
from vpt.view.renderers import (
    Album,
    DrawnLook,
    boxes_legend,
    draw_look,
    fitted,
    marked_photo,
    marks_on,
)
from vpt.view.wording import call_text, call_title, content_text, seen_text

if TYPE_CHECKING:  # it needs httpx, which comes with gradio
    from vpt.demo.remote import Model, RemoteChat

MOST_CHARACTERS = 2000
ROOM_WH = (640, 640)  # of a picture
MOST = {"max_calls": 8, "max_new_tokens": 2048}
"""Bounds of options that have none elsewhere."""

SETTING_ROWS = (
    ("perception",),
    ("max_calls", "max_new_tokens"),
    ("constrain", "mask"),
    ("max_boxes",),
    ("temperature", "top_p"),
    ("top_k", "seed"),
)
"""Options that the page offers, as its widgets are laid out."""

SETTINGS = tuple(name for row in SETTING_ROWS for name in row)


def read_settings(values: Sequence[Any]) -> dict[str, Any]:
    """Name the values of the widgets; refuse one that is missing or not permitted here."""
    settings = dict(zip(SETTINGS, values, strict=True))
    for name, value in settings.items():
        if value is None or value == "":
            raise PromptError(f"{name.replace('_', ' ')} is empty; fill it in")
        if name in MOST and OPTIONS[name].check(name, value) > MOST[name]:
            raise PromptError(f"{name} can be {MOST[name]} at most here, not {value}")
    return settings


def make_requests(
    model: Model,
    picture: str | None,
    question: str | None,
    settings: Mapping[str, Any],
    *,
    compare: bool = False,
    look_for: str | None = None,
    box: Sequence[float | None] | None = None,
) -> list[Request]:
    """Make the request of a question, and with ``compare`` one that forbids calls.

    ``picture`` is the path of an uploaded file. The first call shows ``box``, XYXY in its pixels,
    or else where a detector finds the phrase ``look_for``, if it is not empty. All settings hold
    for both requests but for perception.
    """
    question = _checked(question)
    images = []
    if picture is not None:
        images = [load_image(picture, limits=model.limits, name=Path(picture).name)]
    first = dict(settings)
    if box is not None:
        if not images:
            raise PromptError("there is no image to look at; choose one")
        sides = [side for side in box if side is not None]
        if len(sides) != 4:
            raise PromptError(
                "the box needs four numbers: mark two corners on the photo, or type them"
            )
        size_wh, whole = images[0].size_wh, (sides[0], sides[1], sides[2], sides[3])
        check_box_px(whole, size_wh)
        region = region_to_show(whole, size_wh, grid_size=model.vocabulary.grid_size)
        perception = "auto" if settings["perception"] == "auto" else "crop"
        max_calls = max(settings["max_calls"], 1)
        first |= {"region": region, "perception": perception, "max_calls": max_calls}
    elif look_for and look_for.strip():
        first["look_for"] = look_for
    requests = [model.request(images, question, **first)]
    if compare:
        requests.append(model.request(images, question, **{**settings, "perception": "none"}))
    return requests


def make_follow_up(
    chat: Chat | RemoteChat | None, question: str | None, settings: Mapping[str, Any]
) -> Request:
    """Make the request of a question that continues a chat."""
    if chat is None or not chat.messages:
        raise PromptError("there is no answer to follow up here; ask a question first")
    return chat.request(_checked(question), **settings)


def _checked(question: str | None) -> str:
    question = question or ""
    if len(question) > MOST_CHARACTERS:
        raise PromptError(
            f"the question has {len(question)} characters; here it can have {MOST_CHARACTERS}"
        )
    if not question.strip():
        raise PromptError("the question is empty; type one")
    return question


def watch_live(snapshots: Generator[Snapshot]) -> Generator[Snapshot]:
    """Pass snapshots on, images kept; closing the iterator ends the computation."""
    with closing(snapshots):
        for one in snapshots:
            if one.trace and any(image.thumbnail is None for image in one.trace.images):
                one.trace.keep_thumbnails(one.images)
            yield one


@dataclass(frozen=True)
class Example:
    """A question about a file of the folder, its answer, and the calls it takes, in words."""

    picture: str
    question: str
    answer: str
    takes: str


def read_examples(folder: Path) -> list[Example]:
    """The questions of ``questions.json`` in a folder; none where there is no such file."""
    file = folder / "questions.json"
    if not file.is_file():
        return []
    return [Example(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class Caption:
    """Text under a picture; with ``ends``, those of its colour scale."""

    title: str
    text: str
    ends: tuple[str, str] | None = None


@dataclass(frozen=True)
class Views:
    """The pictures of a trace, with one call or depth map chosen.

    Attributes:
        photo: the given image, with all regions and written boxes on it.
        first: the given image as the model first saw it.
        crop: the result of the call, if there is no map of it.
        heat: photo and score map over it, or photo and depth map.
        captions: by the names of the pictures that there are.
        is_score_map: whether the map is of scores.
    """

    photo: Image.Image | None = None
    first: Image.Image | None = None
    crop: Image.Image | None = None
    heat: tuple[Image.Image, Image.Image] | None = None
    captions: Mapping[str, Caption] = field(default_factory=dict)
    is_score_map: bool = False


def draw_views(trace: Trace, number: int | None = None, drawn_box: Box | None = None) -> Views:
    """Draw the pictures of a trace that keeps its thumbnails; ``VPTError`` if they are damaged.

    Args:
        trace: of a run, finished or not.
        number: of the call to show, from 1, or of the depth map, from -1 down; default: the latest.
        drawn_box: XYXY in pixels of the given image, marked on the photo by a dashed frame.
    """
    album = Album(trace)
    done = [n for _, n in shown_results(trace)]
    number = number if number in done else next(reversed(done), 0)
    if not album.given:
        return Views()
    one = None
    if number:
        one = trace.calls[number - 1] if number > 0 else trace.content[-number - 1]
    index = trace.root(one.image) if one else 0
    photo = marked_photo(album, index, ROOM_WH, drawn_box)
    captions = {"photo": _photo_caption(album, index)}
    record, first = trace.images[index], None
    if record.seen_wh is not None:
        first = album.as_seen(index, ROOM_WH)
        captions["first"] = Caption("First look", f"all that the model saw: {seen_text(record)}")
    if one is None:
        return Views(photo, first, captions=captions)
    shown = draw_look(album, one, ROOM_WH)
    name = "crop" if shown.kind in ("crop", "plain") else "heat"
    captions[name] = _result_caption(trace, one, shown)
    if name == "crop":
        return Views(photo, first, crop=shown.picture, captions=captions)
    heat = shown.photo, shown.picture
    return Views(photo, first, None, heat, captions, shown.kind == "heat")


def _photo_caption(album: Album, index: int) -> Caption:
    (width, height), marks = album.trace.images[index].size_wh, marks_on(album, index)
    facts = [f"{width}x{height} px"]
    if any(mark.kind == "region" for mark in marks):
        facts.append("tinted: the cells named; outlined: the crop")
    return Caption("Photo", "; ".join(filter(None, [*facts, boxes_legend(marks)])))


def _result_caption(trace: Trace, one: CallRecord | ContentRecord, shown: DrawnLook) -> Caption:
    if isinstance(one, ContentRecord):
        return Caption("Depth map", "written by the model", shown.ends)
    if one.box_xyxy_px is not None and one.result_image is not None:
        x0, y0, x1, y1 = one.box_xyxy_px
        seen = seen_text(trace.images[one.result_image])
        facts = [f"{x1 - x0}x{y1 - y0} px of the photo, seen as {seen}", shown.note]
        return Caption("Crop", "; ".join(filter(None, facts)))
    size = f"{one.grid_hw[1]}x{one.grid_hw[0]} places" if one.grid_hw else ""
    name = f"Score map of {call_title(one)}" if shown.kind == "heat" else call_title(one)
    return Caption(name, "; ".join(filter(None, [size, shown.note])), shown.ends)


def shown_results(trace: Trace) -> list[tuple[str, int]]:
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
    return [one for _, _, one in sorted(found, key=lambda entry: entry[:2])]


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
