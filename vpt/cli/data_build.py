"""``vpt data build``: rows for training, of plain annotations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli.output import check_targets, print_err, print_out, progress, write_file
from vpt.cli.parser import EXIT_FAULTS, Command, whole_number, words
from vpt.data.row_files import SUFFIXES
from vpt.data.row_kinds import ROW_KINDS
from vpt.errors import DataError, PromptError
from vpt.protocol.tokens import RELEASED_GRID_SIZE
from vpt.view.wording import count_words

if TYPE_CHECKING:
    from vpt.data.build import Built

NUM_LISTED = 20

ANNOTATIONS = """\
annotations are a JSON list of objects, or one object per line:
  image     path, relative to --images or absolute
  question  as a person asks it: no invitation, no <image>
  answer    as the model shall write it; a number is written as its digits
  box       optional: [x0, y0, x1, y1], where in the image the evidence is; in pixels of the
            image as it is seen, that is after EXIF orientation, from its upper left corner.
            Fractions of 0 to 1 are refused: multiply them by the width and height. Numbers
            of 0 to 1000, as some models write them, look like pixels: scale them first
  kind      optional: the one kind of row to build of this annotation, whatever --kinds says
What else an object has is left aside, and named.

kinds of rows:
  region           asked to, the model names the smallest region whose crop (one cell wider on
                   each side) covers the box; sees the crop; answers. Needs a box
  clip, dino, sam  asked to, the model has the image re-encoded by its own tower, by DINOv2
                   or by SAM; answers
  direct           the model answers at once

examples:
  vpt data build notes.jsonl --images photos --out train.json
  vpt data build notes.jsonl --images photos --out train.json --kinds region,dino,direct --draw"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="JSON or JSON lines")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="to write: .json or .jsonl"
    )
    parser.add_argument(
        "--images", type=Path, metavar="ROOT", help="folder of relative paths (default: here)"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave annotations out that cannot be used, instead of writing nothing",
    )
    _add_recipe(parser.add_argument_group("rows"))
    entry = parser.add_argument_group("dataset_info.json")
    entry.add_argument(
        "--dataset-info",
        type=Path,
        metavar="FILE",
        help="add the entry to this dataset_info.json of LLaMA-Factory, instead of printing it",
    )
    entry.add_argument("--name", metavar="N", help="of the data set (default: that of the file)")


def _add_recipe(rows: argparse._ArgumentGroup) -> None:
    rows.add_argument(
        "--kinds",
        type=_kinds,
        default=("region", "direct"),
        metavar="LIST",
        help=f"out of {','.join(ROW_KINDS)}; each annotation gives a row of every kind that it "
        "permits (default: region,direct)",
    )
    rows.add_argument(
        "--draw",
        action="store_true",
        help="draw one of the kinds for each annotation, instead of a row of every kind",
    )
    rows.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="S", help="of --draw (default: 0)"
    )
    rows.add_argument(
        "--no-invite",
        dest="invited",
        action="store_false",
        help="leave the words out that invite a call, so that the model learns to choose by itself",
    )
    rows.add_argument(
        "--grid-size",
        type=whole_number(1),
        default=RELEASED_GRID_SIZE,
        metavar="K",
        help=f"of the model: cells per side of its grid (default: {RELEASED_GRID_SIZE})",
    )


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(words(text)))
    if unknown := [kind for kind in kinds if kind not in ROW_KINDS]:
        raise argparse.ArgumentTypeError(
            f"unknown kind {unknown[0]!r}; available: {', '.join(ROW_KINDS)}"
        )
    if not kinds:
        raise argparse.ArgumentTypeError(f"no kind given; available: {', '.join(ROW_KINDS)}")
    return kinds


def _build(args: argparse.Namespace) -> int | None:
    """Read, measure, build, write; tell what was made and what was not."""
    _check(args)
    from vpt.data.annotations import KEYS, Annotation
    from vpt.data.build import Recipe, build_rows, read_annotations
    from vpt.data.dataset_info import read_dataset_info, with_entry, write_dataset_info
    from vpt.data.image_sizes import measure_images
    from vpt.data.loading import predict_loading
    from vpt.data.row_files import read_entries, write_rows

    name = args.name or args.out.stem
    info_file = args.dataset_info or args.out.with_name("dataset_info.json")
    info = read_dataset_info(info_file) if args.dataset_info else {}
    info = with_entry(info, info_file, name, args.out)
    entries = read_entries(args.annotations)
    if not entries:
        raise DataError(f"{args.annotations} holds no annotations")
    annotations = read_annotations(entries)
    paths = dict.fromkeys(a.image for a in annotations if isinstance(a, Annotation))
    images = dict(progress(measure_images(paths, args.images), len(paths), "images"))
    recipe = Recipe(args.kinds, args.draw, args.seed, args.invited, args.grid_size)
    built = build_rows(annotations, images, recipe)
    _tell_unread(entries, KEYS)
    _tell_bad(built, args)
    if not built.rows or (built.bad and not args.skip_bad):
        print_err(f"nothing was written to {args.out}")
        return EXIT_FAULTS
    write_file(lambda file: write_rows(built.rows, file), args.out)
    # Each row has every column, so only one that stays empty for long can be refused.
    if problems := list(predict_loading(args.out.read_bytes(), built.rows)):
        args.out.unlink()
        raise DataError(f"training could not load {args.out}: {problems[0][1].detail}")
    _tell_made(built, args)
    if args.dataset_info:
        write_file(lambda file: write_dataset_info(info, file), info_file)
        print_err(f"{info_file} names it {name!r}")
    else:
        print_err("entry for dataset_info.json; file_name is relative to the folder of that:")
        print_out(json.dumps(info, indent=2, ensure_ascii=False))
    return None


def _check(args: argparse.Namespace) -> None:
    if args.out.suffix not in SUFFIXES:
        endings = " or ".join(SUFFIXES)
        raise PromptError(f"--out: expected a name that ends in {endings}, got {args.out}")
    check_targets({"--out": args.out, "--dataset-info": args.dataset_info})
    for option, target in (("--out", args.out), ("--dataset-info", args.dataset_info)):
        if target and target.resolve() == args.annotations.resolve():
            raise PromptError(f"{option}: {target} holds the annotations and would be overwritten")
    if args.images and not args.images.is_dir():
        raise PromptError(f"--images: there is no folder {args.images}")
    if args.name is not None and (not args.name.strip() or "," in args.name):
        raise PromptError(f"--name: expected a name without commas, got {args.name!r}")


def _tell_unread(entries: list[Any], keys: tuple[str, ...]) -> None:
    unread: dict[str, int] = {}
    for entry in entries:
        for key in entry if isinstance(entry, dict) else ():
            if key not in keys:
                unread[key] = unread.get(key, 0) + 1
    if unread:
        named = ", ".join(f"{key} ({number})" for key, number in unread.items())
        print_err(f"note: keys left aside, with the number of annotations that have them: {named}")


def _tell_bad(built: Built, args: argparse.Namespace) -> None:
    if not built.bad:
        return
    number = count_words(len(built.bad), "annotation")
    print_err(f"{number} cannot be used (the first is number 0):")
    listed = built.bad if args.verbose else built.bad[:NUM_LISTED]
    for index, reason in listed:
        print_err(f"  {index}: {' '.join(reason.split())}", name="")
    if hidden := len(built.bad) - len(listed):
        print_err(f"  and {hidden} more; --verbose lists all", name="")
    if not args.skip_bad:
        print_err("mend them, or leave them out with --skip-bad")


def _tell_made(built: Built, args: argparse.Namespace) -> None:
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(built.kinds.items()))
    left_out = f"; {count_words(len(built.bad), 'bad annotation')} left out" if built.bad else ""
    print_err(f"wrote {count_words(len(built.rows), 'row')} to {args.out}: {kinds}{left_out}")
    if built.num_without_box:
        number = count_words(built.num_without_box, "annotation")
        print_err(f"{number} without a box, of which no region row can be built")
    print_err(f"train with media_dir: {args.images or '.'}; paths in the rows are relative to it")


COMMAND = Command(
    help="make rows for training of annotations",
    description=(
        "Make rows for training of plain annotations, in the format that the training configs\n"
        "read. The dataset_info.json entry for LLaMA-Factory goes to stdout, all else to stderr."
    ),
    examples=ANNOTATIONS,
    add_arguments=_add_arguments,
    run=_build,
    verbose="list every bad annotation, show tracebacks",
)
