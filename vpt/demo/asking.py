"""What the page asks: example questions, what a person chose, and runs that are watched."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt.boxes import check_box_px, region_to_show
from vpt.errors import PromptError
from vpt.images import load_image
from vpt.inference.request import OPTIONS, Request
from vpt.runtime import Runtime, Snapshot

MOST_CHARACTERS = 2000
MOST = {"max_calls": 8, "max_new_tokens": 2048}
"""What the page permits of options that have no such bound elsewhere."""

SETTING_ROWS = (
    ("perception",),
    ("max_calls", "max_new_tokens"),
    ("constrain",),
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
    runtime: Runtime,
    picture: str | None,
    question: str | None,
    settings: Mapping[str, Any],
    *,
    compare: bool = False,
    box: Sequence[float | None] | None = None,
) -> list[Request]:
    """Make the request of a question, and with ``compare`` one that forbids calls.

    ``picture`` is the path of an uploaded file, ``box`` XYXY in its pixels, which the first call
    then shows. All settings hold for both requests but for perception.
    """
    question = question or ""
    if len(question) > MOST_CHARACTERS:
        raise PromptError(
            f"the question has {len(question)} characters; here it can have {MOST_CHARACTERS}"
        )
    if not question.strip():
        raise PromptError("the question is empty; type one")
    images = []
    if picture is not None:
        images = [load_image(picture, limits=runtime.limits, name=Path(picture).name)]
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
        region = region_to_show(whole, size_wh, grid_size=runtime.vocabulary.grid_size)
        perception = "auto" if settings["perception"] == "auto" else "crop"
        max_calls = max(settings["max_calls"], 1)
        first |= {"region": region, "perception": perception, "max_calls": max_calls}
    requests = [runtime.request(images, question, **first)]
    if compare:
        requests.append(runtime.request(images, question, **{**settings, "perception": "none"}))
    return requests


class LiveRuns:
    """Lets several threads ask one runtime; they take turns, token by token."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        # Reentrant: collecting an abandoned run in the middle of another closes it.
        self._turn = threading.RLock()

    def watch(self, requests: Sequence[Request]) -> Generator[Snapshot]:
        """Answer requests side by side, images kept; closing the iterator ends the computation."""
        snapshots = self.runtime.watch_many(requests, batch_size=max(len(requests), 1))
        try:
            while True:
                with self._turn:
                    one = next(snapshots, None)
                if one is None:
                    return
                if one.trace and any(image.thumbnail is None for image in one.trace.images):
                    one.trace.keep_thumbnails(requests[one.index].images)
                yield one
        finally:
            with self._turn:
                snapshots.close()


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
