"""``vpt data``: rows for training are built from annotations, and data are checked before use."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli import data_make
from vpt.cli.model import quieten
from vpt.cli.output import check_targets, print_err, print_out, progress, write_file
from vpt.cli.parser import (
    EXIT_FAULTS,
    Command,
    CommandGroup,
    add_flag,
    add_path,
    add_value,
    comma_list,
    path_or_other,
    whole_number,
)
from vpt.data.build import KEYS, Annotation, Built, Recipe, build_rows, read_annotations
from vpt.data.checks import FINDINGS, ROW_KINDS, image_paths
from vpt.data.loading import check_loading, predict_loading
from vpt.data.referring import find_coco, read_phrases
from vpt.data.rows import (
    DATASET_INFO,
    SUFFIXES,
    Images,
    add_dataset_entry,
    dataset_entry,
    measure_images,
    read_entries,
    write_dataset_info,
    write_rows,
)
from vpt.errors import DataError, PromptError
from vpt.model.folder import check_model
from vpt.protocol.rows import split_crop_suffix
from vpt.protocol.tokens import RELEASED_GRID_SIZE
from vpt.view.wording import count_text

if TYPE_CHECKING:
    from vpt.data.check import Report
    from vpt.evaluation.doctor import CheckTarget

_NUM_LISTED = 20

# vpt data build

_ANNOTATIONS = """\
annotations are a JSON list of objects, or one object per line:
  image     path, relative to --images or absolute
  question  as a person asks it: no invitation, no <image>
  answer    as the model shall write it; a number is written as its digits
  box       optional: [x0, y0, x1, y1] of the evidence, in pixels of the image as it is
            displayed, that is after EXIF orientation, from its upper left corner.
            Fractions of 0 to 1 are refused: multiply them by the width and height. Numbers
            of 0 to 1000, as some models write them, look like pixels: scale them first
  phrase    optional: words for the box, such as "the blue tag", for a detector to find it
  kind      optional: the only kind of row to build from this annotation, whatever --kinds says
Other keys are ignored, and listed.
Or they are one JSON object in the format of COCO: of LVIS, or of RefCOCO with its expressions as
"refs" or as captions. Each phrase for one object is an annotation, and asks where it is.

kinds of rows:
  region           invited to, the model names the smallest region whose crop (one cell wider on
                   each side) covers the box, receives the crop, and answers. Needs a box
  grounding        invited to, the model calls for the phrase, receives the same crop and its box
                   in thousandths of the image, and answers. Needs a box and a phrase
  clip, dino, sam  invited to, the model has the image re-encoded by its own tower, by DINOv2
                   or by SAM, and answers
  direct           the model answers at once

examples:
  vpt data build notes.jsonl --images photos --out train.json
  vpt data build notes.jsonl --images photos --out train.json --kinds region,dino,direct --draw
  vpt data build lvis_v1_train.json --images coco --out phrases.json --kinds grounding --skip-bad"""


def _add_build_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "annotations", "ANNOTATIONS", "JSON or JSON lines")
    add_path(parser, "--out", "FILE", "file to write: .json or .jsonl", required=True)
    add_path(parser, "--images", "ROOT", "folder of relative paths (default: here)")
    skip = "skip annotations that cannot be used, instead of writing nothing"
    add_flag(parser, "--skip-bad", skip)
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--kinds",
        type=_kinds,
        default=("region", "direct"),
        metavar="LIST",
        help=f"of {','.join(ROW_KINDS)}; each annotation gives a row of every kind that it "
        "permits (default: region,direct)",
    )
    choice = rows.add_mutually_exclusive_group()
    draw = "choose one of the kinds at random for each annotation, instead of a row of every kind"
    add_flag(choice, "--draw", draw)
    free = (
        "for a model that chooses by itself when to look again: no invitation, and one row for "
        "each annotation, of the first of the kinds that it permits (by default region where "
        "there is a box, else direct)"
    )
    add_flag(choice, "--free-choice", free)
    add_value(rows, "--seed", "S", whole_number(0), "seed of --draw", 0)
    rows.add_argument(
        "--no-invite",
        dest="invited",
        action="store_false",
        help="omit the text that invites a call, so that the model learns to choose by itself",
    )
    grid = "cells per side of the model's region grid"
    add_value(rows, "--grid-size", "K", whole_number(1), grid, RELEASED_GRID_SIZE)
    entry = parser.add_argument_group(DATASET_INFO)
    add = f"add the entry to this {DATASET_INFO} of LLaMA-Factory, instead of printing it"
    add_path(entry, "--dataset-info", "FILE", add)
    add_value(entry, "--name", "N", str, "name of the data set (default: that of the file)")


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(comma_list(text)))
    unknown = [kind for kind in kinds if kind not in ROW_KINDS]
    if unknown or not kinds:
        problem = f"unknown kind {unknown[0]!r}" if unknown else "no kind given"
        raise argparse.ArgumentTypeError(f"{problem}; available: {', '.join(ROW_KINDS)}")
    return kinds


def _build(args: argparse.Namespace) -> int | None:
    """Read annotations, measure images, build and write rows; report what was built."""
    _check_build_arguments(args)
    name = args.name or args.out.stem
    if args.dataset_info:
        info = add_dataset_entry(args.dataset_info, name, args.out)
    else:
        info = {name: dataset_entry(args.out.name)}
    entries = _read_entries(args.annotations)
    if not entries:
        raise DataError(f"{args.annotations} holds no annotations")
    annotations = read_annotations(entries)
    paths = dict.fromkeys(a.image for a in annotations if isinstance(a, Annotation))
    images = dict(progress(measure_images(paths, args.images), len(paths), "images"))
    recipe = Recipe(
        args.kinds,
        draw=args.draw,
        first=args.free_choice,
        seed=args.seed,
        invited=args.invited and not args.free_choice,
        grid_size=args.grid_size,
    )
    built = build_rows(annotations, images, recipe)
    _report_unused(entries, built, args)
    if not built.rows or (built.bad and not args.skip_bad):
        print_err(f"nothing was written to {args.out}")
        return EXIT_FAULTS
    write_file(lambda file: write_rows(built.rows, file), args.out)
    # Each row has every column, so the loader refuses only one that stays empty for long.
    if problems := list(predict_loading(args.out.read_bytes(), built.rows)):
        args.out.unlink()
        raise DataError(f"training could not load {args.out}: {problems[0][1].detail}")
    _report_built(built, args)
    if args.dataset_info:
        write_file(lambda file: write_dataset_info(info, file), args.dataset_info)
        print_err(f"{args.dataset_info} names it {name!r}")
    else:
        print_err(f"entry for {DATASET_INFO}; file_name is relative to the folder of that file:")
        print_out(json.dumps(info, indent=2, ensure_ascii=False))
    return None


def _read_entries(file: Path) -> list[Any]:
    """Entries of a file in our own or in COCO's format."""
    content = find_coco(file)
    if content is None:
        return read_entries(file)
    entries, left_out = read_phrases(file, content)
    for reason, number in left_out.most_common():
        print_err(f"left out {count_text(number, 'phrase')}: {reason}")
    return list(entries)


def _check_build_arguments(args: argparse.Namespace) -> None:
    if args.out.suffix not in SUFFIXES:
        endings = " or ".join(SUFFIXES)
        raise PromptError(f"--out: expected a name that ends in {endings}, got {args.out}")
    targets = {"--out": args.out, "--dataset-info": args.dataset_info}
    check_targets(targets)
    for option, target in targets.items():
        if target and target.resolve() == args.annotations.resolve():
            raise PromptError(f"{option}: {target} holds the annotations and would be overwritten")
    if args.images and not args.images.is_dir():
        raise PromptError(f"--images: there is no folder {args.images}")
    if args.name is not None and (not args.name.strip() or "," in args.name):
        raise PromptError(f"--name: expected a name without commas, got {args.name!r}")


def _report_unused(entries: Sequence[Any], built: Built, args: argparse.Namespace) -> None:
    """Report the keys of annotations that are ignored, and annotations that cannot be used."""
    keys = (key for entry in entries if isinstance(entry, dict) for key in entry)
    if ignored := Counter(key for key in keys if key not in KEYS):
        named = ", ".join(f"{key} ({number})" for key, number in ignored.items())
        print_err(f"note: ignored keys, with the number of annotations that have them: {named}")
    if not built.bad:
        return
    number = count_text(len(built.bad), "annotation")
    print_err(f"{number} cannot be used (the first is number 0):")
    listed = built.bad if args.verbose else built.bad[:_NUM_LISTED]
    for index, reason in listed:
        print_err(f"  {index}: {' '.join(reason.split())}", name="")
    if hidden := len(built.bad) - len(listed):
        print_err(f"  and {hidden} more; --verbose lists all", name="")
    if not args.skip_bad:
        print_err("correct them, or skip them with --skip-bad")


def _report_built(built: Built, args: argparse.Namespace) -> None:
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(built.kinds.items()))
    skipped = f"; {count_text(len(built.bad), 'bad annotation')} skipped" if built.bad else ""
    print_err(f"wrote {count_text(len(built.rows), 'row')} to {args.out}: {kinds}{skipped}")
    if built.num_without_box:
        number = count_text(built.num_without_box, "annotation")
        print_err(f"{number} without a box, from which no region row can be built")
    print_err(f"train with media_dir: {args.images or '.'}; paths in the rows are relative to it")


_BUILD = Command(
    help="build rows for training from annotations",
    description=(
        "Build rows for training from plain annotations, in the format that the training\n"
        "configs read. The dataset_info.json entry for LLaMA-Factory goes to stdout, everything\n"
        "else to stderr."
    ),
    examples=_ANNOTATIONS,
    add_arguments=_add_build_arguments,
    run=_build,
    verbose="list every bad annotation, show tracebacks",
)


# vpt data check


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    target = "rows: a JSON list, or JSON lines; or an evaluation split, by name or FORMAT:FILE"
    parser.add_argument("target", metavar="SPLIT-OR-FILE", type=path_or_other, help=target)
    data = "folder of the splits' files (default: datasets)"
    add_path(parser, "--data", "DIR", data, default=Path("datasets"))
    add_value(parser, "--limit", "N", whole_number(1), "check the first N rows only")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="ROOT",
        help="folder of relative paths (default: here; of splits: that of the file); or FROM=TO: "
        "images whose path begins with FROM are in TO, may be given several times",
    )
    images.add_argument(
        "--no-images",
        dest="open_images",
        action="store_false",
        help="open no image: faster, but files and what depends on their sizes are not checked",
    )
    model = parser.add_argument_group("model")
    which = "the one to be trained, folder or hub id: its tokens, grid and branches are checked"
    add_value(model, "--model", "FOLDER", path_or_other, which)
    cutoff = "find rows of more tokens, as with cutoff_len in a training config; needs --model"
    add_value(model, "--cutoff-len", "N", whole_number(1), cutoff)
    grid = f"cells per side of the region grid (default: the model's, or {RELEASED_GRID_SIZE})"
    add_value(model, "--grid-size", "K", whole_number(1), grid)
    report = parser.add_argument_group("report")
    ignore = "kinds of findings to leave out, such as duplicate-row"
    report.add_argument("--ignore", type=comma_list, default=(), metavar="LIST", help=ignore)
    add_value(report, "--show", "N", whole_number(0), "findings of each kind to list", 5)
    add_flag(report, "--json", "print every finding, as JSON")


def _check(args: argparse.Namespace) -> int | None:
    """Find what is to be checked, check it, report."""
    from vpt.evaluation.doctor import CheckTarget, check_target

    target = check_target(args.target, args.data, args.images)
    if target is None:  # no such file, which reading reports
        target = CheckTarget(Path(args.target), FINDINGS, str)
    _check_check_arguments(args, target)
    if target.check is None:
        report, num_images, num_left = _check_rows(args, target)
    else:
        report = target.check(
            limit=args.limit, open_images=args.open_images, ignored=args.ignore, watch=progress
        )
        num_images, num_left = report.num_images, report.num_left
    unchecked = _unchecked(args, num_left, is_rows=target.check is None)
    if args.json:
        print_out(json.dumps(_as_json(report, target, num_images, unchecked)))
    else:
        _show(report, target, args.show, num_images, unchecked)
    return EXIT_FAULTS if report.findings else None


def _check_check_arguments(args: argparse.Namespace, target: CheckTarget) -> None:
    if unknown := [kind for kind in args.ignore if kind not in target.findings]:
        raise PromptError(
            f"unknown kind of finding {unknown[0]!r}; available: {', '.join(target.findings)}"
        )
    if target.check is not None and (args.model or args.cutoff_len or args.grid_size):
        raise PromptError(
            f"--model, --cutoff-len and --grid-size are for rows; {args.target} is no file of rows"
        )
    if args.cutoff_len and not args.model:
        raise PromptError("--cutoff-len needs --model, whose tokens are counted")
    if args.cutoff_len and not args.open_images:
        raise PromptError("--cutoff-len needs the sizes of images; leave --no-images out")
    if args.grid_size and args.model:
        raise PromptError("--grid-size is the model's own; leave it out beside --model")
    if args.model:
        check_model(args.model)


def _check_rows(args: argparse.Namespace, target: CheckTarget) -> tuple[Report, int, int]:
    """Read rows, open their images, check: the report, images opened, rows left out."""
    from vpt.data.check import ModelLimits, RowChecker, check_rows

    rows = read_entries(target.file)
    if not rows:
        raise DataError(f"{target.file} holds no rows")
    loading = check_loading(target.file, rows)
    num_all, rows = len(rows), rows[: args.limit]
    model = None
    if args.model:
        quieten(args)
        from vpt.model.config import load_config
        from vpt.model.processing import VPTProcessor

        config, processor = load_config(args.model), VPTProcessor.from_pretrained(args.model)
        model = ModelLimits(config, processor, args.cutoff_len)
    images: Images = {}
    if args.open_images:
        named = (split_crop_suffix(path)[0] for row in rows for path in image_paths(row))
        files = {path: target.find_image(path) for path in named}
        distinct = dict.fromkeys(files.values())
        facts = dict(progress(measure_images(distinct), len(distinct), "images"))
        images = {path: facts[file] for path, file in files.items()}
    watched = progress(rows, len(rows), "rows")
    grid_size = args.grid_size or RELEASED_GRID_SIZE
    checker = RowChecker(images, grid_size=grid_size, model=model)
    report = check_rows(watched, checker, args.ignore, loading)
    return report, len(images), num_all - len(rows)


def _unchecked(args: argparse.Namespace, num_left: int, *, is_rows: bool) -> list[str]:
    """What was not checked, and the options that change it."""
    reasons = [
        (num_left, f"{count_text(num_left, 'further row')} (--limit)"),
        (not args.open_images, "image files and crops (--no-images)"),
        (is_rows and not args.model, "the model's tokens and branches (needs --model)"),
        (is_rows and not args.cutoff_len, "lengths (needs --model and --cutoff-len)"),
        (args.ignore, f"what --ignore names ({', '.join(args.ignore)})"),
    ]
    return [text for applies, text in reasons if applies]


def _as_json(
    report: Report, target: CheckTarget, num_images: int, unchecked: Sequence[str]
) -> Mapping[str, Any]:
    return {
        "file": str(target.file),
        "num_rows": report.num_rows,
        "num_rows_with_findings": report.num_with_findings,
        "num_images_opened": num_images,
        "row_kinds": dict(report.row_kinds),
        "epochs": {epoch: dict(tasks) for epoch, tasks in report.epochs.items()},
        "findings": {
            kind: {
                "meaning": target.findings[kind],
                "rows": [{"row": number, "detail": detail} for number, detail in entries],
            }
            for kind, entries in report.findings.items()
        },
        "unchecked": list(unchecked),
    }


def _show(
    report: Report, target: CheckTarget, num_shown: int, num_images: int, unchecked: Sequence[str]
) -> None:
    from vpt.data.curriculum import epoch_lines

    num_rows = count_text(report.num_rows, "row")
    print_out(f"{target.file}: {num_rows}, {count_text(num_images, 'image')} opened")
    for row_kind, num_of_kind in sorted(report.row_kinds.items()):
        print_out(f"  {num_of_kind:>7,}  {row_kind}")
    for line in epoch_lines(report.epochs):
        print_out(f"  {line}")
    for kind, entries in report.findings.items():
        num_found = len({number for number, _ in entries if number is not None})
        counted = count_text(num_found, "row") if num_found else "the file"
        print_out(f"\n{kind}: {counted}: {target.findings[kind]}")
        for number, detail in entries[:num_shown]:
            place = "the file" if number is None else f"row {number}"
            print_out(f"  {place}: {' '.join(detail.split())}")
        if hidden := len(entries) - min(num_shown, len(entries)):
            print_out(f"  and {hidden} more; --show {len(entries)} or --json lists them")
    print_out("")
    for name in unchecked:
        print_out(f"not checked: {name}")
    if report.findings:
        found = count_text(report.num_with_findings, "row")
        print_out(f"{found} of {report.num_rows} with findings (the first row is number 0)")
    else:
        print_out("nothing found")


_CHECK = Command(
    help="find faults of data before it is used",
    description=(
        "Find faults of data before it is used: rows for training, or an evaluation split.\n"
        "Nothing is changed. The exit code is 1 if anything is found."
    ),
    examples=(
        "kinds of findings in rows:\n"
        + "\n".join(f"  {kind:<19} {meaning}" for kind, meaning in FINDINGS.items())
        + "\n\nexamples:\n"
        "  vpt data check train.json --images photos\n"
        "  vpt data check train.json --images photos --model ./my-model --cutoff-len 2048\n"
        "  vpt data check DocVQA --data ~/vpt-data --images /mnt/datasets=photos\n"
        "  vpt data check plain:my-questions.jsonl"
    ),
    add_arguments=_add_check_arguments,
    run=_check,
)

COMMANDS = CommandGroup(
    help="build and check training data",
    description=(
        "Build data for training, and find faults of data before it is used.\n\n"
        "For models that write depth maps and boxes (Aurora): make-depth-rows and\n"
        "make-counting-rows, and make-curriculum, which mixes their rows. Generated pictures are\n"
        "made in a checkout: python -m recipes --help."
    ),
    commands={"build": _BUILD, "check": _CHECK, **data_make.COMMANDS},
)
