"""One file of rows for a stage with tasks of very different lengths.

Run ``python -m recipes.embedded.mixture data/embedded/instructions.jsonl=0.3
data/drawing/depth_steps.jsonl=0.7 --steps 1000 --batch-size 24 --out data/mixture``. Every batch
has rows of one file and of similar length, so little is padding, and a task whose answer is one
token counts as much as one with a hundred. The batches are shuffled; training must not be. With
``--first 300`` as many batches of the first file alone come before the others: what it teaches is
learned sooner without them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vpt.cli.parser import number, whole_number
from vpt.data.curriculum import read_rows
from vpt.data.rows import DATASET_INFO, Row, dataset_entry, write_dataset_info, write_rows
from vpt.errors import VPTError

_SORTED = 8  # batches' worth of rows that are sorted by length together


def batches_of(
    rows: Sequence[Row], batch_size: int, rng: np.random.Generator
) -> Iterator[list[Row]]:
    """Batches without end of rows of similar length; all rows occur about equally often."""
    waiting: list[int] = []
    while True:
        while len(waiting) < _SORTED * batch_size:
            waiting += rng.permutation(len(rows)).tolist()
        taken = sorted(waiting[: _SORTED * batch_size], key=lambda index: _length(rows[index]))
        waiting = waiting[_SORTED * batch_size :]
        for place in rng.permutation(_SORTED):
            chosen = taken[place * batch_size : (place + 1) * batch_size]
            yield [rows[index] for index in chosen]


def mix(
    parts: Sequence[tuple[Sequence[Row], float]],
    steps: int,
    batch_size: int,
    seed: int,
    num_first: int = 0,
) -> Iterator[list[Row]]:
    """The batches of a training.

    Args:
        parts: rows, and their share of the batches.
        steps: number of batches.
        batch_size: rows of a batch.
        seed: of the order.
        num_first: batches of the first part before the others begin.
    """
    rng = np.random.default_rng(seed)
    sources = [batches_of(rows, batch_size, rng) for rows, _ in parts]
    shares = np.array([share for _, share in parts])
    for step, part in enumerate(rng.choice(len(parts), steps, p=shares / shares.sum())):
        yield next(sources[0 if step < num_first else part])


def _length(row: Row) -> int:
    """A measure of the tokens of a row: words, marks and control tokens of its turns."""
    images = sum(len(value) for key, value in row.items() if key.endswith("images"))
    text = "".join(message["content"] for message in row["messages"])
    return text.count(" ") + text.count("<") + 100 * images


def _part(text: str) -> tuple[Path, float]:
    file, _, share = text.rpartition("=")
    if not file:
        raise argparse.ArgumentTypeError(f"expected FILE=SHARE, got {text!r}")
    return Path(file), number(0)(share)


def main() -> None:
    """Write the rows, and the index by which training configs name them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", type=_part, nargs="+", metavar="FILE=SHARE")
    parser.add_argument("--steps", type=whole_number(1), required=True)
    parser.add_argument("--first", type=whole_number(0), default=0, metavar="N")
    parser.add_argument("--batch-size", type=whole_number(1), default=24)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if missing := [file for file, _ in args.parts if not file.is_file()]:
        parser.error(f"there is no {missing[0]}")
    try:
        parts = [(read_rows(file, args.out), share) for file, share in args.parts]
    except VPTError as exc:
        parser.error(str(exc))
    args.out.mkdir(parents=True, exist_ok=True)
    batches = tqdm(mix(parts, args.steps, args.batch_size, args.seed, args.first), total=args.steps)
    entry = dataset_entry("mixture.jsonl")
    rows = (
        {column: row[column] for column in entry["columns"]} for batch in batches for row in batch
    )
    write_rows(rows, args.out / "mixture.jsonl")
    write_dataset_info({"mixture": entry}, args.out / DATASET_INFO)


if __name__ == "__main__":
    main()
