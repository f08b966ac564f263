"""Plain-text tables of results and splits, for the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt.evaluation.splits import SPLITS, is_present
from vpt.view.wording import count_text


def results_table(results: Mapping[str, Any]) -> str:
    """A line per split and condition; ``n`` counts scored samples, failures are separate.

    Tokens are those that the LLM read, per sample and per solved sample.
    """
    rows = [["split", "perception", "score", "n", "failed", "mean", "95 % interval"]]
    rows[0] += ["chance", "called", "tokens", "per solved"]
    for entry in results["splits"]:
        score, chance, called = (
            entry["scores"].get(entry["score"]),
            entry["chance"],
            entry["called"],
        )
        num_failed = sum(entry["failures"].values())
        answered = entry["n"] - num_failed
        rows.append(
            [
                *(entry["split"], entry["condition"], entry["score"]),
                *(str(score["n"] if score else 0), str(num_failed)),
                f"{score['mean']:.3f}" if score else "-",
                f"{score['low']:.3f} to {score['high']:.3f}" if score else "-",
                "-" if chance is None else f"{chance:.3f}",
                "-" if called is None else f"{called:.2f}",
                f"{entry['tokens']['llm'] / answered:.0f}" if answered else "-",
                f"{solved['tokens']:.0f}" if (solved := entry.get("per_solved")) else "-",
            ]
        )
    return "\n".join(aligned(rows, num_left=3))


def shortfalls(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Lines about samples without a score: their number, the reason, and where to find them."""
    conditions: dict[str, list[str]] = {}  # of each problem
    for entry in results["splits"]:
        if num_failed := sum(entry["failures"].values()):
            words = (
                f"{num_failed} of {count_text(entry['n'], 'sample')} failed; "
                f"first: sample {entry['first_failure']}"
            )
        elif not entry["n"] and entry["not_asked"]:
            words = "no sample has what this condition needs: a box, a phrase or content"
        else:
            continue
        conditions.setdefault(f"{entry['split']} (%s): {words}", []).append(entry["condition"])
    lines = [words.replace("%s", ", ".join(of), 1) for words, of in conditions.items()]
    if any(sum(entry["failures"].values()) for entry in results["splits"]):
        lines.append(
            f'"error" in {folder / "records"} has the reason of each failure; to ask a sample '
            "again, delete its line and repeat the command"
        )
    if unscored := results.get("unscored"):
        reasons = results["judge"]["reasons"].items()
        words = "; ".join(f"{num} x {reason}" for reason, num in reasons)
        lines.append(
            f"{len(unscored)} of {len(unscored) + results['judge']['n']} answers have no judge "
            f'score ({words}); see "unscored" in {folder / "results.json"}'
        )
    return lines


def splits_table(data: Path) -> str:
    """A line per registered split: whether its file is present, and its subject."""
    lines = [["split", "present", "score", "format", "about"]]
    for split in SPLITS.values():
        here = "yes" if is_present(split, data) else "no"
        lines.append([split.name, here, split.score, split.format, split.about])
    return "\n".join(aligned(lines))


def aligned(rows: Sequence[Sequence[str]], num_left: int | None = None) -> list[str]:
    """Lines of a table, the first ``num_left`` columns (default: all) flush left, others right."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        line = ""
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            room = " " * (width - _width(cell))
            line += cell + room if num_left is None or place < num_left else room + cell
            line += "  "
        lines.append(line.rstrip())
    return lines


def _width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    shown = [c for c in text if not unicodedata.combining(c)]
    return len(shown) + sum(unicodedata.east_asian_width(c) in "WF" for c in shown)
