"""What a person chose on the page, as requests to the runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vpt.boxes import Box, check_box_px
from vpt.data.regions import region_to_show
from vpt.errors import PromptError
from vpt.images import load_image
from vpt.inference.conversation import Request
from vpt.inference.options import whole_number
from vpt.runtime import Runtime

MOST_CHARACTERS = 2000
MOST_CALLS = 8
MOST_NEW_TOKENS = 2048


@dataclass(frozen=True)
class Settings:
    """How a question is answered; fields as of ``Request`` and ``Sampling``.

    Raises:
        PromptError: if one is missing, or beyond what the page permits.
    """

    perception: str
    max_calls: int
    max_new_tokens: int
    constrain: bool
    temperature: float
    top_p: float
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is None or value == "":
                raise PromptError(f"{name.replace('_', ' ')} is empty; fill it in")
        for name, most in (("max_calls", MOST_CALLS), ("max_new_tokens", MOST_NEW_TOKENS)):
            if (value := whole_number(name, getattr(self, name), 0)) > most:
                raise PromptError(f"{name} can be {most} at most here, not {value}")


def make_requests(
    runtime: Runtime,
    picture: str | None,
    question: str | None,
    settings: Settings,
    *,
    compare: bool = False,
    box: Sequence[float | None] | None = None,
) -> list[Request]:
    """Make the request of a question, and with ``compare`` one that forbids looking again.

    Args:
        runtime: that is to be asked.
        picture: path of an uploaded file; ``None`` for a question about nothing.
        question: as typed.
        settings: of the first request; how tokens are chosen holds for both.
        compare: whether the second is made.
        box: XYXY in pixels of the picture; the first call is made to show it.

    Raises:
        ImageError: if the picture cannot be used.
        PromptError: if the question is empty or too long, or something else cannot be asked.
        RegionError: if the box is not on the picture.
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
    chosen = dataclasses.asdict(settings)
    first = dict(chosen)
    if box is not None:
        if not images:
            raise PromptError("there is no picture to look at; choose one")
        size_wh, whole = images[0].size_wh, _whole(box)
        check_box_px(whole, size_wh)
        region = region_to_show(whole, size_wh, grid_size=runtime.vocabulary.grid_size)
        perception = chosen["perception"] if chosen["perception"] == "auto" else "region"
        first |= {"region": region, "perception": perception}
        first["max_calls"] = max(settings.max_calls, 1)
    requests = [runtime.request(images, question, **first)]
    if compare:
        requests.append(runtime.request(images, question, **{**chosen, "perception": "none"}))
    return requests


def _whole(box: Sequence[float | None]) -> Box:
    sides = [side for side in box if side is not None]
    if len(sides) != 4:
        raise PromptError("the box needs four numbers: mark two corners on the photo, or type them")
    return sides[0], sides[1], sides[2], sides[3]
