"""Table cells without what pandas makes of a column with gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_EXACT = 2**53  # from here on a float no longer holds each integer


def clean_cell(value: Any) -> Any:
    """Return a value as its author wrote it.

    In a column with gaps pandas stores missing values as NaN, and integers as floats.

    Args:
        value: of a row; lists and mappings are cleaned item by item.

    Returns:
        ``None`` for NaN; an int for a float without fraction; all else as it is.
    """
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return int(value) if value.is_integer() and abs(value) < _EXACT else value
    if isinstance(value, Mapping):
        return {key: clean_cell(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean_cell(item) for item in value]
    return value
