"""Reading of a saved trace: types and bounds of all values, and references that exist.

A trace that passes can be drawn, replayed and saved again; damaged images are found when drawn.
"""

from __future__ import annotations

import reprlib
from collections.abc import Hashable
from functools import cache
from math import prod
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from vpt.boxes import GridBox, crop_box_px
from vpt.errors import PromptError, RegionError
from vpt.protocol.tokens import BRANCH_TOKENS, CONTENT_TOKENS, RELEASED_GRID_SIZE

MOST_GRID_SIZE = 10_000
MOST_INTEGER = 2**31
MOST_SETTING = 2**64
MOST_DEPTH = 16  # of nested settings

R = TypeVar("R")


def read_record(kind: type[R], content: Any) -> R:
    """Build a dataclass, of records too, from JSON values of the types that its fields declare.

    Raises:
        PromptError: naming the first field that is missing, unknown or of a wrong type.
    """
    try:
        record: R = _adapter(cast(Hashable, kind)).validate_python(content)
    except ValidationError as exc:
        raise _error_of(exc.errors(include_url=False)[0]) from exc
    return record


def record_schema(kind: Any) -> dict[str, Any]:
    """The JSON schema of a record."""
    schema = _adapter(kind).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _error_of(error: Any) -> PromptError:
    """An error that names the field, and what came and was expected."""
    *parents, last = error["loc"] or ("",)
    parent, got = _path(parents), error["input"]
    if error["type"] == "unexpected_keyword_argument":
        return PromptError(f"not a trace: {parent or 'it'} has an unknown field {last!r:.80}")
    if error["type"] == "missing" and isinstance(last, str):
        return PromptError(f"not a trace: {parent or 'it'} has no {last}")
    if error["type"] == "too_long" and isinstance(got, list) and not parents:
        most = error["ctx"]["max_length"]
        return PromptError(f"not a trace: it has {len(got)} {last}; expected {most} at most")
    if error["type"] == "missing":  # of a tuple
        return _cannot_be(parent, got, "some values are missing")
    got = error.get("ctx", {}).get("value", got)  # of a setting, however deep
    return _cannot_be(_path(error["loc"]), got, error["msg"])


def _path(steps: Any) -> str:
    """``("images", 0, "box")`` as ``"images[0].box"``."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step:.80}" for step in steps)
    return path.removeprefix(".")


def _cannot_be(name: str, value: Any, expected: str = "") -> PromptError:
    reason = f": {expected[0].lower()}{expected[1:]}" if expected else ""
    return PromptError(f"not a trace: {name or 'it'} cannot be {reprlib.repr(value)}{reason}")


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Check free settings.

    Raises:
        PydanticCustomError: if they are nested too deeply, or contain a vast number.
    """
    _check_setting(settings)
    return settings


def _check_setting(value: Any, depth: int = 0) -> None:
    if depth > MOST_DEPTH or (isinstance(value, int) and abs(value) >= MOST_SETTING):
        expected = f"Expected numbers below 2**64, in {MOST_DEPTH} levels at most"
        raise PydanticCustomError("setting", expected, {"value": value})
    inner = value.values() if isinstance(value, dict) else value
    for one in inner if isinstance(value, dict | list | tuple) else ():
        _check_setting(one, depth + 1)


def check_trace(trace: Any) -> None:
    """Check that the parts of a trace fit each other.

    Raises:
        PromptError: naming the first that does not.
    """
    grid_size = trace.settings.get("grid_size", RELEASED_GRID_SIZE)
    if type(grid_size) is not int or not 1 <= grid_size <= MOST_GRID_SIZE:
        raise _cannot_be("settings.grid_size", grid_size)
    _check_preprocess(trace.model.get("preprocess", {}))
    for index in range(len(trace.images)):
        _check_image(trace, index)
    for index, proposal in enumerate(trace.proposals):
        _check_proposal(proposal, trace, f"proposals[{index}]")
    for index, call in enumerate(trace.calls):
        _check_call(call, trace, f"calls[{index}]", grid_size)
    for index, content in enumerate(trace.content):
        _check_content(content, trace, f"content[{index}]")


def _check_preprocess(preprocess: Any) -> None:
    """Sizes of a branch have the sides by which a score map is placed."""
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
    """A crop is cut from an image before it, and lies in the given one."""
    image, name = trace.images[index], f"images[{index}]"
    if min(image.size_wh) < 1:
        raise PromptError(f"not a trace: {name}.size_wh is {image.size_wh}")
    if image.seen_wh is not None and min(image.seen_wh) < 1:
        raise PromptError(f"not a trace: {name}.seen_wh is {image.seen_wh}")
    if image.parent is not None and (image.parent >= index or image.box_xyxy_px is None):
        raise PromptError(f"not a trace: {name} is cut from image {image.parent}, without a place")
    if image.box_xyxy_px is not None:
        _check_box(image.box_xyxy_px, trace.images[trace.root(index)].size_wh, name)


def _check_index(index: int, trace: Any, name: str) -> None:
    """An image that is named exists."""
    if index >= (num_images := len(trace.images)):
        raise PromptError(f"not a trace: {name} names image {index} of {num_images}")


def _check_proposal(proposal: Any, trace: Any, name: str) -> None:
    """A proposal has an existing image, and a box within it."""
    _check_index(proposal.image, trace, name)
    _check_box(proposal.box_xyxy_px, trace.images[proposal.image].size_wh, name)


def _check_call(call: Any, trace: Any, name: str, grid_size: int) -> None:
    """A call has an existing image, a box within it, and a score per token."""
    _check_index(call.image, trace, name)
    if call.result_image is not None:
        _check_index(call.result_image, trace, name)
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
    """Content has an existing image, a span of the stream, and boxes within the image."""
    _check_index(one.image, trace, name)
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
