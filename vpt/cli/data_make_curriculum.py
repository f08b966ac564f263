"""``vpt data make-curriculum``: a file of rows whose order anneals the atomic task away."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from vpt.cli.output import check_targets, print_err, print_out, write_file
from vpt.cli.parser import Command, number, whole_number
from vpt.errors import DataError, PromptError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--atomic",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="rows of depth maps or boxes alone",
    )
    parser.add_argument(
        "--tasks",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="rows of questions, in steps or at once",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="to write: .jsonl or .json"
    )
    parser.add_argument(
        "--epochs", type=whole_number(1), default=10, metavar="N", help="(default: 10)"
    )
    parser.add_argument(
        "--first-share",
        type=number(0, 1),
        default=1.0,
        metavar="S",
        help="of atomic rows in the first epoch (default: 1.0)",
    )
    parser.add_argument(
        "--last-share",
        type=number(0, 1),
        default=0.1,
        metavar="S",
        help="of atomic rows in the last epoch (default: 0.1)",
    )
    parser.add_argument(
        "--rows-per-epoch",
        type=whole_number(1),
        metavar="N",
        help="(default: as many as there are rows for)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="S", help="of the order (default: 0)"
    )


def _make(args: argparse.Namespace) -> None:
    """Mix, write, add the entry to dataset_info.json, show the shares."""
    from vpt.data.aurora.curriculum import Annealing, anneal, count_epochs
    from vpt.data.aurora.parts import INFO
    from vpt.data.dataset_info import read_dataset_info, with_entry, write_dataset_info
    from vpt.data.row_files import SUFFIXES, write_rows

    if args.out.suffix not in SUFFIXES:
        raise PromptError(f"--out: expected a name that ends in {' or '.join(SUFFIXES)}")
    check_targets({"--out": args.out})
    annealing = Annealing(args.epochs, args.first_share, args.last_share)
    folder = args.out.parent
    sides = [
        [row for file in files for row in read_rows(file, folder)]
        for files in (args.atomic, args.tasks)
    ]
    rows = list(anneal(sides[0], sides[1], annealing, args.rows_per_epoch, args.seed))
    info = with_entry(read_dataset_info(folder / INFO), folder / INFO, args.out.stem, args.out)
    write_file(lambda file: write_rows(rows, file), args.out)
    write_file(lambda file: write_dataset_info(info, file), folder / INFO)
    print_err(f"{len(rows):,} rows in {args.out}, named {args.out.stem!r} in {folder / INFO}")
    print_out("\n".join(epoch_lines(count_epochs(rows))))


def read_rows(file: Path, folder: Path) -> list[dict[str, Any]]:
    """Rows of a file, their relative paths made relative to another folder.

    Raises:
        DataError: if it cannot be read, or holds something else than rows.
    """
    from vpt.data.row_files import read_entries
    from vpt.protocol.rows import KINDS

    rows = []
    for position, row in enumerate(read_entries(file)):
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
            raise DataError(f"{file}: entry {position} is no row; expected an object with messages")
        moved = {
            kind.column: [_move(path, file.parent, folder) for path in row.get(kind.column) or []]
            for kind in KINDS.values()
        }
        rows.append({**row, **moved})
    return rows


def _move(path: str, old: Path, new: Path) -> str:
    from vpt.images import is_url

    if Path(path).is_absolute() or is_url(path):
        return path
    return Path(os.path.relpath((old / path).resolve(), new.resolve())).as_posix()


def epoch_lines(epochs: Any) -> list[str]:
    """A line for every epoch: rows, share of the atomic task, and the tasks.

    Args:
        epochs: from :func:`vpt.data.aurora.curriculum.count_epochs`.
    """
    from vpt.data.aurora.curriculum import atomic_share
    from vpt.data.aurora.rows import TASKS

    lines = []
    for epoch, tasks in epochs.items():
        words = ", ".join(f"{tasks[task]:,} {name}" for task, name in TASKS.items() if tasks[task])
        share = atomic_share(tasks)
        lines.append(
            f"epoch {epoch:>2}: {sum(tasks.values()):>7,} rows, {share:>4.0%} atomic: {words}"
        )
    return lines


COMMAND = Command(
    help="make a file of rows whose order anneals depth maps or boxes away",
    description=(
        "Mix rows of the atomic task (depth maps or boxes alone) with rows that use it, in\n"
        "epochs: the share of the atomic task falls by equal steps. The order of the file is the\n"
        "curriculum; train on it once (num_train_epochs: 1), in order (disable_shuffling: true).\n"
        "Prints the shares; `vpt data check` prints them again, and finds a file out of order."
    ),
    examples=(
        "example:\n"
        "  vpt data make-curriculum --atomic rows/depth_maps.jsonl \\\n"
        "    --tasks rows/depth_steps.jsonl rows/depth_direct.jsonl --out rows/curriculum.jsonl"
    ),
    add_arguments=_add_arguments,
    run=_make,
)
