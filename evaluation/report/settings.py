"""The settings in which two runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_SETTINGS = ("model", "decoding", "seed", "judge", "git_commit", "python", "libraries", "device")
_MISSING = "(not recorded)"


@dataclass(frozen=True)
class Setting:
    """A setting that is not the same in both runs.

    Attributes:
        name: such as ``"model hash"``.
        a: words for its value in the first run.
        b: words for its value in the second.
    """

    name: str
    a: str
    b: str


def differing_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Setting]:
    """Compare model, decoding, code, libraries, machine, and versions of splits.

    Args:
        a: ``results.json`` of the first run.
        b: likewise, of the second.
    """
    first, second = dict(_flat(a)), dict(_flat(b))
    settings = [
        Setting(name, first.get(name, _MISSING), second.get(name, _MISSING))
        for name in dict.fromkeys([*first, *second])
    ]
    return [setting for setting in settings if setting.a != setting.b]


def _flat(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and words of all that may change a result."""
    for name in _SETTINGS:
        if name in results:
            yield from _flat_value(name, results[name])
    for entry in results["splits"]:
        if "version" in entry:
            yield f"version of {entry['split']}", str(entry["version"])


def _flat_value(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat_value(f"{name} {key}", inner)
    else:
        yield name.replace("_", " "), str(value)
