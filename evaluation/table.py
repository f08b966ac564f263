"""Results and splits as plain tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt.evaluation.splits import SPLITS, is_present


def results_table(results: Mapping[str, Any]) -> str:
    """A line per split and condition; then what looking again brought, where it was measured."""
    lines = [
        ["split", "perception", "n", "failed", "score", "", "95% interval", "called", "tokens"]
    ]
    for entry in results["splits"]:
        score = entry["scores"].get(entry["score"])
        called = entry["called"]
        answered = entry["n"] - sum(entry["failures"].values())
        lines.append(
            [
                entry["split"],
                entry["condition"],
                str(entry["n"]),
                str(sum(entry["failures"].values())),
                entry["score"],
                f"{score['mean']:.3f}" if score else "-",
                f"{score['low']:.3f} to {score['high']:.3f}" if score else "-",
                "-" if called is None else f"{called:.2f}",
                f"{entry['tokens']['llm'] / answered:.0f}" if answered else "-",
            ]
        )
    return aligned(lines)


def shortfalls(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Lines about samples without a score: how many, why, and where each is named.

    Args:
        results: as in ``results.json``.
        folder: of the run.
    """
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
    """A line per registered split: whether it is there, and what it is."""
    lines = [["split", "here", "score", "format", "about"]]
    for split in SPLITS.values():
        here = "yes" if is_present(split, data) else "no"
        lines.append([split.name, here, split.score, split.format, split.about])
    return aligned(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows with their columns under each other; the last column is not padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
