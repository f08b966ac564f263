"""What sequence packing could save: padding in batches of rows, and passes of the language model.

    python benchmarks/padding.py data/embedded/instructions.jsonl --images data/embedded

Rows are counted, nothing is trained. Packing would remove the padding; a packed row has the calls
of all its rows, each of which takes a pass through the layers of its own (docs/decisions/018).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from vpt.data.check import ModelLimits
from vpt.data.checks import RowView, image_paths, view_row
from vpt.data.rows import measure_images, read_entries
from vpt.loading import EMBEDDED_MODEL
from vpt.model.config import load_config
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import split_crop_suffix
from vpt.protocol.tokens import BRANCH_TOKENS

_MEGABATCH = 50  # batches that transformers' group_by_length sorts together


def measure(rows: Sequence[object], images: Path, model: Path) -> tuple[list[int], list[int]]:
    """Tokens of each row, and re-encoding calls, each of which takes a pass of its own."""
    config, processor = load_config(model), VPTProcessor.from_pretrained(model)
    paths = dict.fromkeys(split_crop_suffix(path)[0] for row in rows for path in image_paths(row))
    facts = dict(measure_images(paths, images))
    limits = ModelLimits(config, processor)
    lengths, calls = [], []
    for row in rows:
        view = view_row(row, config.grid_size)
        if not isinstance(view, RowView) or (length := limits.num_tokens(view, facts)) is None:
            raise SystemExit("a row cannot be read; see `vpt data check`")
        lengths.append(length)
        called = [call.branch for turn in view.turns for call in turn.calls]
        calls.append(sum(branch in BRANCH_TOKENS for branch in called))
    return lengths, calls


def batches(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut an order into whole batches."""
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


def padding(lengths: Sequence[int], order: Sequence[int], size: int) -> float:
    """Share of padding in all tokens."""
    every = [[lengths[index] for index in batch] for batch in batches(order, size)]
    return 1 - sum(map(sum, every)) / sum(max(one) * len(one) for one in every)


def grouped(lengths: Sequence[int], order: Sequence[int], size: int) -> list[int]:
    """The order sorted by length within megabatches, as ``group_by_length: true`` does."""
    step = size * _MEGABATCH
    parts = [order[start : start + step] for start in range(0, len(order), step)]
    return [i for part in parts for i in sorted(part, key=lambda index: -lengths[index])]


def main(argv: Sequence[str] | None = None) -> None:
    """Print padding and passes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--images", type=Path, default=Path())
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL)
    parser.add_argument("--limit", type=int, default=4000, help="rows, drawn at random")
    args = parser.parse_args(argv)
    rows = read_entries(args.rows)
    order = np.random.default_rng(0).permutation(len(rows))[: args.limit].tolist()
    lengths, calls = measure([rows[index] for index in order], args.images, args.model)
    order = list(range(len(lengths)))
    print(f"{len(order)} rows, {fmean(lengths):.0f} tokens each ({min(lengths)} to {max(lengths)})")
    for size in (4, 8, 16):
        plain, sorted_ = padding(lengths, order, size), grouped(lengths, order, size)
        by_length = padding(lengths, sorted_, size)
        now = fmean(1 + max(calls[i] for i in batch) for batch in batches(order, size))
        packed = fmean(1 + sum(calls[i] for i in batch) for batch in batches(order, size))
        print(
            f"batches of {size}: padding {plain:.3f}, grouped by length {by_length:.3f}; "
            f"passes {now:.2f}, packed into one row {packed:.2f}"
        )


if __name__ == "__main__":
    main()
