"""Settings of our own training loops, and the course of their learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml

S = TypeVar("S")


def read_settings(kind: type[S], file: Path, overrides: Sequence[str]) -> S:
    """Read a YAML, and ``key=value`` words that go before it.

    Args:
        kind: a dataclass, whose fields are the keys.
        file: of the settings.
        overrides: values are YAML too.

    Raises:
        ValueError: for an unknown or a missing key, or a word without ``=``.
    """
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"expected key=value, got {word!r}")
        values[key] = yaml.safe_load(value)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(
            f"{file} has the unknown key {unknown[0]!r}; available: {', '.join(sorted(fields))}"
        )
    for name, field in fields.items():
        has_default = field.default is not field.default_factory  # both are MISSING without one
        if name not in values and not has_default:
            raise ValueError(f"{file} lacks the key {name!r}")
    return kind(**values)


def warm_cosine(step: int, total: int, warmup: int) -> float:
    """Factor of the learning rate: rises to 1, then falls along a cosine to 0.02."""
    rising = min(1.0, (step + 1) / max(warmup, 1))
    return rising * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0))))
