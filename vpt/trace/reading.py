"""Reading of a saved trace: types and bounds of all values, and references that exist.

What passes can be drawn, replayed and saved again; damaged pictures are found when they are drawn.
"""

from __future__ import annotations

import dataclasses
import reprlib
import types
from collections.abc import Hashable, Mapping
from functools import cache
from math import prod
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from vpt.boxes import GridBox, crop_box_px
from vpt.errors import PromptError, RegionError
from vpt.protocol.tokens import BRANCH_TOKENS, CONTENT_TOKENS, RELEASED_GRID_SIZE

# Larger numbers are damage, and would ask for much memory or time.
MOST_RECORDS = {"images": 1000, "calls": 1000, "content": 10_000, "malformed": 100_000}
MOST_TURNS = 10_000
MOST_GRID_SIZE = 10_000
MOST_INTEGER = 2**31
MOST_SETTING = 2**64
MOST_MS = 1e12
MOST_DEPTH = 16  # of nested settings

Record = TypeVar("Record")


def read_record(kind: type[Record], content: Any, name: str = "") -> Record:
    """Build a record from JSON values, each of the type that its field declares.

    Integers and times have bounds; scores may be infinite, as a model can compute them so.

    Args:
        kind: a dataclass; its fields may be records themselves.
        content: as JSON holds it; lists stand for tuples.
        name: of the record in messages; empty for a whole trace.

    Raises:
        PromptError: naming the first field that is missing, unknown or cannot be.
    """
    if not isinstance(content, Mapping):
        raise _cannot_be(name or "it", content)
    kinds, fields = _kinds(cast(Hashable, kind)), dataclasses.fields(cast(Any, kind))
    if unknown := [field for field in content if field not in kinds]:
        raise PromptError(f"not a trace: {name or 'it'} has an unknown field {unknown[0]!r:.80}")
    for field in fields:
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in content:
            raise PromptError(f"not a trace: {name or 'it'} has no {field.name}")
    start = f"{name}." if name else ""
    values = {key: _read(kinds[key], value, start + key) for key, value in content.items()}
    return kind(**values)


def _cannot_be(name: str, value: Any) -> PromptError:
    return PromptError(f"not a trace: {name} cannot be {reprlib.repr(value)}")


@cache
def _kinds(record: Hashable) -> dict[str, Any]:
    return get_type_hints(record)


def _read(kind: Any, value: Any, name: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # always "or None"
        return None if value is None else _read(inner[0], value, name)
    if origin is list and isinstance(value, list | tuple):
        if inner[0] is float:
            return [_score(one, name) for one in value]
        return [_read(inner[0], one, f"{name}[{index}]") for index, one in enumerate(value)]
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(inner):
        return tuple(_read(one, part, name) for one, part in zip(inner, value, strict=True))
    if origin is dict and isinstance(value, dict):
        _check_setting(value, name)
        return value
    if dataclasses.is_dataclass(kind):
        return read_record(cast(Any, kind), value, name)
    if (
        (kind is int and type(value) is int and 0 <= value < MOST_INTEGER)
        or (kind is float and type(value) in (int, float) and abs(value) < MOST_MS)
        or (kind in (bool, str) and isinstance(value, kind))
    ):
        return value
    raise _cannot_be(name, value)


def _score(value: Any, name: str) -> float:
    if type(value) is float or (type(value) is int and abs(value) < MOST_SETTING):
        return cast(float, value)
    raise _cannot_be(name, value)


def _check_setting(value: Any, name: str, depth: int = 0) -> None:
    """Settings and descriptions are free, but not endless."""
    if depth > MOST_DEPTH or (isinstance(value, int) and abs(value) >= MOST_SETTING):
        raise _cannot_be(name, value)
    inner = value.values() if isinstance(value, dict) else value
    for one in inner if isinstance(value, dict | list | tuple) else ():
        _check_setting(one, name, depth + 1)


def check_trace(trace: Any) -> None:
    """Check that the parts of a trace fit each other.

    Raises:
        PromptError: naming the first that does not.
    """
    for name, most in MOST_RECORDS.items():
        if (number := len(getattr(trace, name))) > most:
            raise PromptError(f"not a trace: it has {number} {name}; expected {most} at most")
    grid_size = trace.settings.get("grid_size", RELEASED_GRID_SIZE)
    if type(grid_size) is not int or not 1 <= grid_size <= MOST_GRID_SIZE:
        raise _cannot_be("settings.grid_size", grid_size)
    _check_preprocess(trace.model.get("preprocess", {}))
    for index in range(len(trace.images)):
        _check_image(trace, index)
    for index, call in enumerate(trace.calls):
        _check_call(call, trace, f"calls[{index}]", grid_size)
    for index, content in enumerate(trace.content):
        _check_content(content, trace, f"content[{index}]")
    records: list[Any] = [*trace.tokens, *trace.malformed, *trace.content, *trace.calls]
    last = max((record.turn for record in records), default=0)
    if last >= MOST_TURNS:
        raise PromptError(f"not a trace: it has a turn {last}; expected less than {MOST_TURNS}")


def _check_preprocess(preprocess: Any) -> None:
    """Sizes of a branch have the sides that a score map is placed by."""
    name = "model.preprocess"
    branches = preprocess.items() if isinstance(preprocess, dict) else ()
    if not isinstance(preprocess, dict) or not all(isinstance(one, dict) for _, one in branches):
        raise _cannot_be(name, preprocess)
    for branch, settings in branches:
        for key, switch in (("size", ""), ("crop_size", "do_center_crop"), ("pad_size", "do_pad")):
            size = settings.get(key)
            if size is None and not (switch and key in settings and settings.get(switch)):
                continue
            sides = size if isinstance(size, dict) else {"width": size, "height": size}
            edges = {"shortest_edge", "longest_edge"} if key == "size" else set()
            is_whole = sides.keys() >= {"width", "height"} or sides.keys() & edges
            is_size = all(type(side) is int and 0 < side < MOST_INTEGER for side in sides.values())
            if not is_whole or not is_size or (key == "size" and sides is not size):
                raise _cannot_be(f"{name}.{branch}.{key}", size)


def _check_image(trace: Any, index: int) -> None:
    """A crop stems from an image before it, and lies in the given one."""
    image, name = trace.images[index], f"images[{index}]"
    if min(image.size_wh) < 1:
        raise PromptError(f"not a trace: {name}.size_wh is {image.size_wh}")
    if image.parent is not None and (image.parent >= index or image.box_xyxy_px is None):
        raise PromptError(f"not a trace: {name} is cut from image {image.parent}, without a place")
    if image.box_xyxy_px is not None:
        _check_box(image.box_xyxy_px, trace.images[trace.root(index)].size_wh, name)


def _check_call(call: Any, trace: Any, name: str, grid_size: int) -> None:
    """A call looks at an image that is there, at a possible place, with a score per token."""
    num_images = len(trace.images)
    for index in (call.image, call.result_image):
        if index is not None and index >= num_images:
            raise PromptError(f"not a trace: {name} names image {index} of {num_images}")
    image = trace.images[call.image]
    if call.box_xyxy_px is not None:
        _check_box(call.box_xyxy_px, trace.images[trace.root(call.image)].size_wh, name)
    if call.region is not None:
        try:
            crop_box_px(GridBox(*call.region), image.size_wh, grid_size=grid_size)
        except RegionError as exc:
            raise PromptError(f"not a trace: {name}.region: {exc}") from exc
    if call.scores and prod(call.grid_hw or (0,)) != len(call.scores):
        raise PromptError(
            f"not a trace: {name} has {len(call.scores)} scores for a grid of {call.grid_hw}"
        )
    if call.scores and call.branch not in BRANCH_TOKENS:
        raise PromptError(f"not a trace: {name} has scores of the unknown branch {call.branch!r}")


def _check_content(one: Any, trace: Any, name: str) -> None:
    """Content is of an image that is there, at a possible place in the stream and on the image."""
    num_images = len(trace.images)
    if one.image >= num_images:
        raise PromptError(f"not a trace: {name} names image {one.image} of {num_images}")
    if not one.start < one.end <= len(trace.tokens):
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
