"""A bar that shows how far a long command is, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """Hand items through and show how many have passed, on stderr if that is a terminal.

    Args:
        items: of a long list.
        total: how many there are.
        what: they are, as ``"images"``.
    """
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(
        items, total=total, desc=what, leave=False, disable=not sys.stderr.isatty()
    )
    return bar
