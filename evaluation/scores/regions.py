"""Whether the crops, or the depth map that the model wrote, show the evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vpt.boxes import Box, contains, coverage, iou
from vpt.errors import DataError, RegionError
from vpt.evaluation.scores.choices import extract_choice

if TYPE_CHECKING:
    from vpt.depth.maps import Floats
    from vpt.evaluation.samples import Sample
    from vpt.trace.records import Trace

ROUNDING_PX = 1.0
"""How far evidence may stick out: a crop is cut at whole pixels, annotations are not."""


def is_shown(crops: Sequence[Box], evidence: Box) -> bool:
    """Whether some crop contains the evidence, within `ROUNDING_PX` on each side.

    Raises ``RegionError`` if the evidence has no area.
    """
    box, room = _checked(evidence), ROUNDING_PX
    widened = [(x0 - room, y0 - room, x1 + room, y1 + room) for x0, y0, x1, y1 in crops]
    return any(contains(crop, box) for crop in widened)


def share_shown(crops: Sequence[Box], evidence: Box) -> float:
    """Share of the evidence's area inside the best crop, in [0, 1]; 0 without crops.

    Raises ``RegionError`` if the evidence has no area.
    """
    box = _checked(evidence)
    return max((coverage(crop, box) for crop in crops), default=0.0)


def best_iou(crops: Sequence[Box], evidence: Box) -> float:
    """Intersection over union of the best crop with the evidence, in [0, 1]; 0 without crops.

    It is low for a generous crop, even if all the evidence is shown. Raises ``RegionError`` if the
    evidence has no area.
    """
    box = _checked(evidence)
    return max((iou(crop, box) for crop in crops), default=0.0)


def _checked(evidence: Box) -> Box:
    x0, y0, x1, y1 = evidence
    if not (x0 < x1 and y0 < y1):
        raise RegionError(f"expected an evidence box XYXY with an area, got {evidence}")
    return evidence


Decode = Callable[[Sequence[int]], "Floats"]
"""Codes of a depth map -> ``[H, W]``, 0 (farthest) to 1 (nearest)."""


def map_supports_answer(trace: Trace, sample: Sample, decode: Decode | None) -> float | None:
    """1 if the nearest point on the last complete map is the answer, else 0.

    The sample's fact ``points`` is as :func:`read_points` takes it, column and row on the 336 grid
    of box tokens. ``None`` without points, map, tokenizer or a letter in the answer.
    """
    points = read_points(sample.facts.get("points"))
    if not points or trace.map_codes is None or decode is None:
        return None
    from vpt.depth.maps import answer_from_map  # imports numpy

    if (answered := extract_choice(trace.answer, len(points))) is None:
        return None
    return float(answer_from_map(decode(trace.map_codes), points).nearest == answered)


def read_points(value: object) -> dict[str, tuple[float, float]]:
    """Points of a question by letter, from a list of ``{"letter", "x", "y"}``; none for ``None``.

    Raises ``DataError`` for anything else, or if the letters are not A, B, ... in this order.
    """
    if value is None:
        return {}
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"expected 'points' to be a list, got {type(value).__name__}")
    points = dict(_read_point(one) for one in value)
    letters = [chr(ord("A") + index) for index in range(len(value))]
    if list(points) != letters:
        raise DataError(f"expected points {', '.join(letters)}, got {', '.join(points)}")
    return points


def _read_point(one: Any) -> tuple[str, tuple[float, float]]:
    try:
        if not isinstance(one, Mapping):
            raise TypeError(f"it is a {type(one).__name__}")
        return str(one["letter"]), (float(one["x"]), float(one["y"]))
    except (KeyError, TypeError, ValueError) as exc:
        raise DataError(f'expected a point as {{"letter", "x", "y"}}, got {one!r}') from exc
