"""Checks of the type and range of options; each names the option, what it expects and what came."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Sequence

import numpy as np

from vpt.errors import PromptError


def whole_number(name: str, value: object, least: int, below: int | None = None) -> int:
    """Check a whole number; numpy's are accepted, ``bool`` is not.

    Args:
        name: of the option.
        value: given for it.
        least: smallest value permitted.
        below: the first value that is too large; ``None`` for no such limit.

    Raises:
        PromptError: if it is another type, or out of bounds.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (below is not None and value >= below):  # type: ignore[operator]
        bound = "" if below is None else f" and below {below}"
        raise _refusal(name, f"a whole number of at least {least}{bound}", value)
    return int(value)  # type: ignore[call-overload]


def real_number(
    name: str, value: object, least: float, most: float = math.inf, *, above: bool = False
) -> float:
    """Check a finite number; numpy's are accepted, ``bool`` is not.

    Args:
        name: of the option.
        value: given for it.
        least: smallest value permitted.
        most: largest value permitted.
        above: whether ``least`` itself is too small.

    Raises:
        PromptError: if it is another type, not finite, or out of bounds.
    """
    try:
        is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        number = float(value) if is_real else math.nan  # type: ignore[arg-type]
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not (math.isfinite(number) and least <= number <= most) or (above and number == least):
        bound = f"above {least:g}" if above else f"of at least {least:g}"
        limit = f" and at most {most:g}" if math.isfinite(most) else ""
        raise _refusal(name, f"a finite number {bound}{limit}", value)
    return number


def flag(name: str, value: object) -> bool:
    """Check a ``bool``.

    Raises:
        PromptError: if it is another type.
    """
    if not isinstance(value, bool | np.bool_):
        raise _refusal(name, "True or False", value)
    return bool(value)


def one_of(name: str, value: object, choices: Sequence[str]) -> str:
    """Check a choice.

    Raises:
        PromptError: if it is none of ``choices``.
    """
    if not isinstance(value, str) or value not in choices:
        raise _refusal(name, f"one of {', '.join(map(repr, choices))}", value)
    return value


def text(name: str, value: object) -> str:
    """Check a text.

    Raises:
        PromptError: if it is another type.
    """
    if not isinstance(value, str):
        raise _refusal(name, "text (str)", value)
    return value


def _refusal(name: str, expected: str, value: object) -> PromptError:
    try:
        shown = reprlib.repr(value)
    except ValueError:  # an integer with too many digits to write
        shown = "a very large number"
    return PromptError(f"{name} must be {expected}, not {shown}")
