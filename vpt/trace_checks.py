"""Whether what was read from a file can be a trace: kinds of values, and indices that exist."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Hashable
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, Union, cast, get_args, get_origin, get_type_hints

from vpt.errors import PromptError
from vpt.tokens import CONTENT_TOKENS

if TYPE_CHECKING:
    from vpt.trace import CallRecord, ContentRecord, Trace

MOST_TURNS = 10_000  # a larger number is damage, and would ask for much memory


def check_trace(trace: Trace) -> None:
    """Look through a whole trace.

    Raises:
        PromptError: naming the first thing that cannot be.
    """
    _check_kinds(trace, "trace")
    for index in range(len(trace.images)):
        _check_image(trace, index)
    for index, call in enumerate(trace.calls):
        _check_call(call, trace, f"calls[{index}]")
    for index, one in enumerate(trace.content):
        _check_content(one, trace, f"content[{index}]")
    records: list[Any] = [*trace.tokens, *trace.malformed, *trace.content, *trace.calls]
    turns = [record.turn for record in records]
    if turns and not 0 <= min(turns) <= max(turns) < MOST_TURNS:
        raise PromptError(f"not a trace: turns from {min(turns)} to {max(turns)}")
    grid_size = trace.settings.get("grid_size", 1)
    if not isinstance(grid_size, int) or grid_size < 1:
        raise PromptError(f"not a trace: settings.grid_size is {grid_size!r}")


def _check_image(trace: Trace, index: int) -> None:
    """A crop stems from an image before it, and lies in the given one."""
    image, name = trace.images[index], f"images[{index}]"
    if min(image.size_wh) < 1:
        raise PromptError(f"not a trace: {name}.size_wh is {image.size_wh}")
    if image.parent is None:
        return
    if not 0 <= image.parent < index or image.box_xyxy_px is None:
        raise PromptError(f"not a trace: {name} is cut from image {image.parent}, without a place")
    _check_box(image.box_xyxy_px, trace.images[trace.root(index)].size_wh, name)


def _check_call(call: CallRecord, trace: Trace, name: str) -> None:
    """A call looks at an image that is there, at a possible place, with a score per token."""
    num_images = len(trace.images)
    for index in (call.image, call.result_image):
        if index is not None and not 0 <= index < num_images:
            raise PromptError(f"not a trace: {name} names image {index} of {num_images}")
    if call.box_xyxy_px is not None:
        _check_box(call.box_xyxy_px, trace.images[trace.root(call.image)].size_wh, name)
    if call.scores and prod(call.grid_hw or (0,)) != len(call.scores):
        raise PromptError(
            f"not a trace: {name} has {len(call.scores)} scores for a grid of {call.grid_hw}"
        )


def _check_content(one: ContentRecord, trace: Trace, name: str) -> None:
    """Content is of an image that is there, at a possible place in the stream and on the image."""
    num_images = len(trace.images)
    if not 0 <= one.image < num_images:
        raise PromptError(f"not a trace: {name} names image {one.image} of {num_images}")
    if not 0 <= one.start < one.end <= len(trace.tokens):
        raise PromptError(
            f"not a trace: {name} spans tokens {one.start} to {one.end} of {len(trace.tokens)}"
        )
    if one.kind not in CONTENT_TOKENS or (one.codes is None) == (one.kind == "depth"):
        raise PromptError(f"not a trace: {name} is of kind {one.kind!r}, without what that holds")
    on_grid, on_image = one.boxes or [], one.boxes_xyxy_px or []
    if len(on_grid) != len(on_image):
        raise PromptError(f"not a trace: {name} has {len(on_grid)} boxes at {len(on_image)} places")
    for box in on_image:
        _check_box(box, trace.images[trace.root(one.image)].size_wh, name)


def _check_box(box: tuple[int, ...], size_wh: tuple[int, int], name: str) -> None:
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= size_wh[0] and 0 <= y0 < y1 <= size_wh[1]):
        raise PromptError(f"not a trace: box {box} of {name} is not in an image of {size_wh}")


def _check_kinds(record: Any, name: str) -> None:
    """Every field is of the type that its record declares."""
    for field, kind in _kinds(cast(Hashable, type(record))).items():
        value = getattr(record, field)
        if not _is_a(value, kind):
            raise PromptError(f"not a trace: {name}.{field} cannot be {str(value)[:80]!r}")
        for index, entry in enumerate(value if isinstance(value, list) else ()):
            if dataclasses.is_dataclass(entry):
                _check_kinds(entry, f"{field}[{index}]")
        if dataclasses.is_dataclass(value):
            _check_kinds(value, field)


@cache
def _kinds(record: Hashable) -> dict[str, Any]:
    return get_type_hints(record)


def _is_a(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is_a(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_is_a(one, inner[0]) for one in value)
    if origin is tuple:
        return (
            isinstance(value, tuple) and len(value) == len(inner) and all(map(_is_a, value, inner))
        )
    if origin is dict:
        return isinstance(value, dict)
    if kind is float:  # scores may be infinite: what the model computed is told as it is
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
