"""What benchmarks say of themselves, printed first and saved with the numbers."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import vpt


def announce(args: argparse.Namespace) -> dict[str, Any]:
    """Print versions and settings; returns both, for :func:`save`.

    Args:
        args: of the command line: every setting, a ``device`` and the ``json`` to write.
    """
    versions = {
        "vpt": vpt.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    if args.device != "cpu":
        settings["device_name"] = torch.cuda.get_device_name(args.device)
    print(", ".join(f"{k} {v}" for k, v in versions.items()))
    print(", ".join(f"{k} {v}" for k, v in settings.items()), end="\n\n")
    return {"versions": versions, "settings": settings}


def take_turns(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """Run all contestants in turn, so that a busy machine disturbs them alike."""
    results: dict[str, list[Any]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            results[name].append(contestant())
    return results


def save(report: Mapping[str, Any], path: Path | None) -> None:
    """Write everything that was measured, if a file was named."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
