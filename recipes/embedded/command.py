"""``python -m recipes make-embedded``: the generated data that the embedded model is trained on."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from vpt.cli.output import check_out_folder, print_err
from vpt.cli.parser import Command, whole_number
from vpt.view.wording import count_text


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("data/embedded"), metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--fraction",
        type=_fraction,
        default=1.0,
        metavar="F",
        help="make only this share of the pictures, 0 to 1, to try things out (default: 1)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per core)",
    )


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to 1, got {text!r}")
    return value


def _make(args: argparse.Namespace) -> None:
    """Draw every part; pictures of an earlier run are kept."""
    check_out_folder(args.out)
    from tqdm import tqdm

    from recipes.embedded.handwriting import digit_pictures
    from recipes.embedded.make import PARTS, make_part, write_index

    digit_pictures("train")  # reports what is missing before the work begins
    for part in PARTS:
        part = dataclasses.replace(part, num_scenes=max(1, round(part.num_scenes * args.fraction)))
        with tqdm(
            total=part.num_scenes, desc=part.name, unit="picture", disable=not sys.stderr.isatty()
        ) as bar:
            for done in make_part(part, args.out, args.workers):
                bar.update(done)
        files = ", ".join(f"{name}.jsonl" for name in part.files)
        drawn = count_text(part.num_scenes, "picture")
        print_err(f"{drawn} in {args.out / part.name}, asked about in {files}")
    write_index(args.out)


COMMAND = Command(
    help="make the data of the embedded model",
    description=(
        "Draw the pictures on which the embedded model is trained and measured, and write the\n"
        "questions about them. The same command gives the same data; it resumes a stopped run.\n"
        "All of it takes 2 GB and about 8 minutes of one core."
    ),
    examples=(
        "example:\n"
        "  python -m recipes make-embedded --out data/embedded\n"
        "  python -m recipes make-embedded --out data/few --fraction 0.001"
    ),
    add_arguments=_add_arguments,
    run=_make,
)
