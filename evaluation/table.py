"""Plain-text tables of results and splits, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt.evaluation.splits import SPLITS, is_present


def results_table(results: Mapping[str, Any]) -> str:
    """A line per split and condition."""
    head = ("split", "perception", "n", "failed", "score", "", "95% interval", "called", "tokens")
    lines = [list(head)]
    for entry in results["splits"]:
        score = entry["scores"].get(entry["score"])
        num_failed = sum(entry["failures"].values())
        answered = entry["n"] - num_failed
        lines.append(
            [
                *(entry["split"], entry["condition"], str(entry["n"]), str(num_failed)),
                entry["score"],
                f"{score['mean']:.3f}" if score else "-",
                f"{score['low']:.3f} to {score['high']:.3f}" if score else "-",
                "-" if entry["called"] is None else f"{entry['called']:.2f}",
                f"{entry['tokens']['llm'] / answered:.0f}" if answered else "-",
            ]
        )
    return "\n".join(aligned(lines))


def shortfalls(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Lines about samples without a score: how many, why, and where each is named."""
    lines = []
    for entry in results["splits"]:
        if num_failed := sum(entry["failures"].values()):
            lines.append(
                f"{num_failed} of {entry['n']} samples of {entry['split']} under "
                f"{entry['condition']} failed, the first {entry['first_failure']}"
            )
    if lines:
        lines.append(
            f'"error" in {folder / "records"} says why each failed; delete its line to have the '
            "sample asked again"
        )
    if unscored := results.get("unscored"):
        reasons = results["judge"]["reasons"].items()
        words = "; ".join(f"{num} x {reason}" for reason, num in reasons)
        lines.append(
            f"{len(unscored)} of {len(unscored) + results['judge']['n']} answers have no score of "
            f'the judge ({words}); "unscored" in {folder / "results.json"} names them'
        )
    return lines


def splits_table(data: Path) -> str:
    """A line per registered split: whether its file is present, and what it asks."""
    lines = [["split", "here", "score", "format", "about"]]
    for split in SPLITS.values():
        here = "yes" if is_present(split, data) else "no"
        lines.append([split.name, here, split.score, split.format, split.about])
    return "\n".join(aligned(lines))


def aligned(rows: Sequence[Sequence[str]], num_left: int | None = None) -> list[str]:
    """Lines of a table, the first ``num_left`` columns (default: all) flush left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [num_left is None or place < num_left for place in range(len(widths))]
    return [
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, sides, strict=True)
        ).rstrip()
        for row in rows
    ]
