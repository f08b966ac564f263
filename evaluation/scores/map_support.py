"""Whether the depth map that a model wrote says what the model answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vpt.depth.maps import Floats
from vpt.depth.reading import answer_from_map
from vpt.errors import DataError
from vpt.evaluation.samples import Sample
from vpt.evaluation.scores.choices import extract_choice
from vpt.trace.records import Trace

Decode = Callable[[Sequence[int]], Floats]
"""Codes of a depth map -> ``[H, W]``, 0 (farthest) to 1 (nearest)."""


def map_supports_answer(trace: Trace, sample: Sample, decode: Decode | None) -> float | None:
    """1 if the point that is nearest on the last whole map is the answer, else 0.

    Args:
        trace: of the run.
        sample: with the ``points`` of its question among its facts, a list of
            ``{"letter", "x", "y"}``, column and row on the 336 grid of box tokens.
        decode: of the model's depth tokenizer.

    Returns:
        ``None`` where nothing can be said: no points, no map, nothing to decode it with, or no
        letter in the answer.

    Raises:
        DataError: if the points make no sense.
    """
    points = read_points(sample.facts.get("points"))
    if not points or trace.map_codes is None or decode is None:
        return None
    answered = extract_choice(trace.answer, len(points))
    if answered is None:
        return None
    return float(answer_from_map(decode(trace.map_codes), points).nearest == answered)


def read_points(value: object) -> dict[str, tuple[float, float]]:
    """Points of a question, by letter; none if there are none.

    Args:
        value: a list of ``{"letter", "x", "y"}``, further keys aside.

    Raises:
        DataError: if it is something else, or the letters are not A, B, ... in this order.
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
