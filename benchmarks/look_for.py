"""Measure the embedded model on its held-out questions when a detector finds what they are about.

Run ``python -m recipes make-detector --out models/detector``, then ``python benchmarks/look_for.py
--detector models/detector --data data/embedded``. Intervals are 95 % ones of Wilson.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from embedded_model import GRID_SIZE, ask_all, cell_of, elsewhere, is_hit, is_right

import vpt
from vpt.evaluation.intervals import wilson_interval
from vpt.runtime import Answer

CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    "own calls": {},
    "calls forbidden": {"perception": "none"},
    "region that the detector finds": {"look_for": lambda entry: entry["look_for"]},
    "true region": {"region": cell_of},
    "wrong region": {"region": lambda entry: elsewhere(cell_of(entry))},
}


def share(values: Sequence[bool]) -> str:
    """A share with its interval and count."""
    if not values:
        return "-"
    found = wilson_interval(sum(values), len(values))
    return f"{found.mean:.3f} [{found.low:.2f}, {found.high:.2f}] ({len(values)})"


def measure(args: argparse.Namespace) -> None:
    """Ask the questions that need a region under each condition, and print a table."""
    lines = (args.data / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [one for one in map(json.loads, lines) if one["mode"] == "region"][: args.limit]
    runtime = vpt.load(args.model, device=args.device, detector=args.detector)
    answers: dict[str, list[Answer]] = {
        name: ask_all(runtime, entries, args.data, args.batch_size, name, **options)
        for name, options in CONDITIONS.items()
    }

    def of(name: str) -> list[bool]:
        return [is_right(*one) for one in zip(entries, answers[name], strict=True)]

    own = of("own calls")
    groups = {"all": [True] * len(entries), "own calls wrong": [not one for one in own]}
    families = sorted({entry["family"] for entry in entries})
    groups |= {family: [e["family"] == family for e in entries] for family in families}
    print("| condition | " + " | ".join(groups) + " | crop shows the evidence |")
    print("|---" * (len(groups) + 2) + "|")
    for name in CONDITIONS:
        right = of(name)
        cells = [
            share([one for one, is_in in zip(right, chosen, strict=True) if is_in])
            for chosen in groups.values()
        ]
        hits = [is_hit(*one) for one in zip(entries, answers[name], strict=True)]
        print(f"| {name} | " + " | ".join(cells) + f" | {share(hits)} |")
    found = answers["region that the detector finds"]
    print(f"nothing found: {share([not one.trace.proposals for one in found])}")
    by_size = defaultdict(list)
    for answer, right in zip(found, of("region that the detector finds"), strict=True):
        if answer.looks and (box := answer.looks[0].box_xyxy_px):
            cell_px = answer.trace.images[0].size_wh[0] / GRID_SIZE
            wide, high = (round((box[at + 2] - box[at]) / cell_px) for at in (0, 1))
            by_size[f"{wide} x {high}"].append(right)
    for size, values in sorted(by_size.items(), key=lambda item: -len(item[1])):
        print(f"crop of {size} cells (wide x high): {share(values)}")


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--detector", required=True, help="folder")
    parser.add_argument("--model", help="folder; the embedded model if missing")
    parser.add_argument("--data", type=Path, default=Path("data/embedded"))
    parser.add_argument("--limit", type=int, help="only so many questions")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    with torch.inference_mode():
        measure(parser.parse_args())


if __name__ == "__main__":
    main()
