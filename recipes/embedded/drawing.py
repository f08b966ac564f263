"""Rows in which the embedded model draws: it looks again by its own tower, then writes and answers.

Run ``python -m recipes.embedded.drawing --rows data/drawing/depth-train data/drawing/count-train
--out data/drawing/train`` on folders that ``vpt data make-depth-rows`` and ``make-counting-rows``
wrote. The first look has 16 tokens, too few to draw from; the second has one per depth code.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from vpt.data.content_rows import ASK_COUNT_STEPS, ASK_POINT_STEPS
from vpt.data.curriculum import read_rows
from vpt.data.rows import Row, dataset_entry, write_dataset_info
from vpt.files import write_atomic
from vpt.protocol.tokens import BRANCH_TOKENS, TOWER

FILES = ("depth_maps", "depth_steps", "depth_direct", "boxes", "count_steps", "count_direct")
"""Files of rows that ``vpt data`` writes, and of the same names here."""

_INVITED = 0.5  # share of the questions that ask for the steps


def looking_row(row: Row, *, invited: bool = True) -> Row:
    """The row with a call of the own tower before its answer.

    Args:
        row: one turn with one picture.
        invited: whether the question may go on to ask for the steps.
    """
    asked, answered = (message["content"] for message in row["messages"])
    if not invited:
        for words in (ASK_POINT_STEPS, ASK_COUNT_STEPS):
            asked = asked.removesuffix(words).rstrip()
    tower = BRANCH_TOKENS[TOWER]
    turns = [("user", asked), ("assistant", tower.call)]
    turns += [("user", tower.placeholder), ("assistant", answered)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return {**row, "messages": messages, tower.column: list(row["images"])}


def write_rows(file: Path, out: Path, seed: int) -> None:
    """Write a file of rows, with a call each, to another folder."""
    rng = np.random.default_rng(seed)
    rows = (looking_row(row, invited=rng.random() < _INVITED) for row in read_rows(file, out))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic("".join(lines), out / file.name)


def main() -> None:
    """Write the files, and the index by which training configs name them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="folders of rows")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = [
        file
        for folder in args.rows
        for name in FILES
        if (file := folder / f"{name}.jsonl").is_file()
    ]
    if not files:
        parser.error(f"--rows: no rows in {args.rows[0]}; make them with vpt data")
    args.out.mkdir(parents=True, exist_ok=True)
    for file in files:
        write_rows(file, args.out, args.seed)
    info = {file.stem: dataset_entry(file.name) for file in files}
    write_dataset_info(info, args.out / "dataset_info.json")


if __name__ == "__main__":
    main()
