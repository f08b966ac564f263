"""``vpt data make-counting-rows``: rows about boxes and numbers, of LVIS annotations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.cli.output import check_out_folder, print_err, progress, report_left_out
from vpt.cli.parser import Command, whole_number
from vpt.errors import PromptError
from vpt.view.wording import count_words

if TYPE_CHECKING:
    from vpt.data.aurora.lvis import Annotations
    from vpt.data.aurora.parts import Part


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "annotations", type=Path, metavar="ANNOTATIONS", help="JSON in the format of LVIS or COCO"
    )
    parser.add_argument(
        "--images", required=True, type=Path, metavar="DIR", help="folder of the pictures"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--categories",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="most to ask about in a picture (default: 1)",
    )
    parser.add_argument(
        "--max-boxes",
        type=whole_number(1),
        default=10,
        metavar="N",
        help="ask about no category with more in a picture (default: 10)",
    )
    parser.add_argument(
        "--min-side",
        type=whole_number(1),
        default=4,
        metavar="PX",
        help="ask about no category with smaller boxes, on the 336 grid (default: 4)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave pictures out that are missing or not of the annotated size",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="S",
        help="of the choice of categories (default: 0)",
    )


def _make(args: argparse.Namespace) -> None:
    """Read annotations, make rows, say what came of it and what was left out."""
    if not args.images.is_dir():
        raise PromptError(f"--images: there is no folder {args.images}")
    check_out_folder(args.out)
    from vpt.data.aurora.counting_files import CountingRecipe, CountingRowMaker
    from vpt.data.aurora.lvis import read_lvis

    annotations = read_lvis(args.annotations, max_boxes=args.max_boxes, min_side=args.min_side)
    recipe = CountingRecipe(args.seed, args.categories, args.skip_bad)
    maker = CountingRowMaker(annotations, args.images, recipe, args.out)
    try:
        for _ in progress(maker.make(), maker.num_pictures, "pictures"):
            pass
        made = maker.finish()
    except OSError as exc:
        raise PromptError(f"cannot write {args.out}: {exc.strerror or exc}") from exc
    _report(args.out, annotations, made)


def _report(folder: Path, annotations: Annotations, made: Part) -> None:
    files = ", ".join(f"{name}.jsonl ({len(rows):,})" for name, rows in made.lines.items())
    print_err(f"in {folder}: {files}")
    counts = sorted((int(count), number) for count, number in made.counts.items())
    print_err("counts: " + ", ".join(f"{count}: {number:,}" for count, number in counts))
    for why, number in sorted(annotations.left_out.items()):
        print_err(f"left out, categories of a picture, for {why}: {number:,}")
    if num_without := sum(not one.categories for one in annotations.pictures):
        print_err(f"{count_words(num_without, 'picture')} without anything left to ask about")
    report_left_out(made.problems, "picture")


COMMAND = Command(
    help="make rows about boxes and numbers of objects, of LVIS annotations",
    description=(
        "Make rows for a model that writes boxes (Aurora): the boxes of all objects of a\n"
        "category; their number, answered in steps with the boxes, or at once. Boxes are brought\n"
        "to the 336 grid. Categories with a crowd, an unsound box, or not annotated exhaustively\n"
        "are left out, and counted. Writes boxes.jsonl, count_steps.jsonl, count_direct.jsonl\n"
        "(rows, named in dataset_info.json), questions.jsonl and answers.jsonl (to measure a\n"
        "model with, laid out as HardBLINK's). The same command gives the same rows."
    ),
    examples=(
        "example:\n"
        "  vpt data make-counting-rows lvis_v1_train.json --images coco --out rows --skip-bad"
    ),
    add_arguments=_add_arguments,
    run=_make,
)
