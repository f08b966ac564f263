"""``vpt data check``: what is wrong with data, told before a run is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli.data_make_curriculum import epoch_lines
from vpt.cli.data_target import Target, find_target
from vpt.cli.model import quieten
from vpt.cli.output import print_out, progress
from vpt.cli.parser import EXIT_FAULTS, Command, whole_number, words
from vpt.data.findings import FINDINGS
from vpt.errors import DataError, PromptError
from vpt.protocol.tokens import RELEASED_GRID_SIZE
from vpt.view.wording import count_words

if TYPE_CHECKING:
    from vpt.data.check import Report, RowChecker
    from vpt.data.image_sizes import Images

NUM_SHOWN = 5


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="SPLIT-OR-FILE",
        help="rows: a JSON list, or JSON lines; or an evaluation split, by name or FORMAT:FILE",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("datasets"),
        metavar="DIR",
        help="folder of the splits' files (default: datasets)",
    )
    parser.add_argument(
        "--limit", type=whole_number(1), metavar="N", help="check the first N rows only"
    )
    _add_images_and_model(parser)
    report = parser.add_argument_group("report")
    report.add_argument(
        "--ignore",
        type=words,
        default=(),
        metavar="LIST",
        help="kinds of findings to leave out, as duplicate-row",
    )
    report.add_argument(
        "--show",
        type=whole_number(0),
        default=NUM_SHOWN,
        metavar="N",
        help=f"how many to name of each kind of finding (default: {NUM_SHOWN})",
    )
    report.add_argument("--json", action="store_true", help="print every finding, as JSON")


def _add_images_and_model(parser: argparse.ArgumentParser) -> None:
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
        help="open none: faster, but nothing is learnt of files and of what depends on sizes",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="FOLDER",
        help="the one to be trained, folder or hub id: its tokens, grid and branches are checked",
    )
    model.add_argument(
        "--cutoff-len",
        type=whole_number(1),
        metavar="N",
        help="find rows of more tokens, as with cutoff_len in a training config; needs --model",
    )
    model.add_argument(
        "--grid-size",
        type=whole_number(1),
        metavar="K",
        help=f"cells per side of the region grid (default: the model's, or {RELEASED_GRID_SIZE})",
    )


def _check(args: argparse.Namespace) -> int | None:
    """Find out what is to be checked, check it, report."""
    target = find_target(args.target, args.data, args.images)
    _check_arguments(args, target)
    report, num_images, num_left = (_check_rows if target.check is None else _check_split)(
        args, target
    )
    unchecked = _unchecked(args, num_left, is_rows=target.check is None)
    if args.json:
        print_out(json.dumps(_as_json(report, target, num_images, unchecked)))
    else:
        _show(report, target, args.show, num_images, unchecked)
    return EXIT_FAULTS if report.findings else None


def _check_split(args: argparse.Namespace, target: Target) -> tuple[Report, int, int]:
    """Check by the target's own means: a report, images opened, rows left out."""
    assert target.check is not None  # or these are rows
    report = target.check(
        limit=args.limit, open_images=args.open_images, ignored=args.ignore, watch=progress
    )
    return report, report.num_images, report.num_left


def _check_rows(args: argparse.Namespace, target: Target) -> tuple[Report, int, int]:
    """Read rows, open their images, check: a report, images opened, rows left out."""
    from vpt.data.check import check_rows
    from vpt.data.image_sizes import measure_images
    from vpt.data.loading import check_loading
    from vpt.data.row_files import read_entries
    from vpt.data.row_view import image_paths
    from vpt.protocol.rows import split_crop_suffix

    rows = read_entries(target.file)
    if not rows:
        raise DataError(f"{target.file} holds no rows")
    loading = check_loading(target.file, rows)
    num_all, rows = len(rows), rows[: args.limit]
    make_checker = _checker_of(args)
    images: Images = {}
    if args.open_images:
        named = (split_crop_suffix(path)[0] for row in rows for path in image_paths(row))
        places = {path: target.find_image(path) for path in named}
        distinct = dict.fromkeys(places.values())
        facts = dict(progress(measure_images(distinct, None), len(distinct), "images"))
        images = {path: facts[place] for path, place in places.items()}
    watched = progress(rows, len(rows), "rows")
    report = check_rows(watched, make_checker(images), args.ignore, loading)
    return report, len(images), num_all - len(rows)


def _check_arguments(args: argparse.Namespace, target: Target) -> None:
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


def _checker_of(args: argparse.Namespace) -> Callable[[Images], RowChecker]:
    """Load what the checks need to know of a model; the images can come later."""
    from vpt.data.check import RowChecker

    if not args.model:
        return partial(RowChecker, grid_size=args.grid_size or RELEASED_GRID_SIZE)
    quieten(args)
    from vpt.model.config import load_config
    from vpt.model.processing import VPTProcessor

    return partial(
        RowChecker.for_model,
        config=load_config(args.model),
        processor=VPTProcessor.from_pretrained(args.model),
        cutoff_len=args.cutoff_len,
    )


def _unchecked(args: argparse.Namespace, num_left: int, *, is_rows: bool) -> list[str]:
    """What was not looked at, and what would make it so."""
    unchecked = []
    if num_left:
        unchecked.append(f"{count_words(num_left, 'further row')} (--limit)")
    if not args.open_images:
        unchecked.append("image files and crops (--no-images)")
    if is_rows and not args.model:
        unchecked.append("the model's tokens and branches (needs --model)")
    if is_rows and not args.cutoff_len:
        unchecked.append("lengths (needs --model and --cutoff-len)")
    if args.ignore:
        unchecked.append(f"what --ignore names ({', '.join(args.ignore)})")
    return unchecked


def _as_json(
    report: Report, target: Target, num_images: int, unchecked: Sequence[str]
) -> dict[str, Any]:
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
    report: Report, target: Target, num_shown: int, num_images: int, unchecked: Sequence[str]
) -> None:
    print_out(
        f"{target.file}: {count_words(report.num_rows, 'row')}, "
        f"{count_words(num_images, 'image')} opened"
    )
    for row_kind, num_of_kind in sorted(report.row_kinds.items()):
        print_out(f"  {num_of_kind:>7,}  {row_kind}")
    for line in epoch_lines(report.epochs):
        print_out(f"  {line}")
    for kind, entries in report.findings.items():
        num_rows = len({number for number, _ in entries if number is not None})
        counted = count_words(num_rows, "row") if num_rows else "the file"
        print_out(f"\n{kind}: {counted}: {target.findings[kind]}")
        for number, detail in entries[:num_shown]:
            place = "the file" if number is None else f"row {number}"
            print_out(f"  {place}: {' '.join(detail.split())}")
        if hidden := len(entries) - min(num_shown, len(entries)):
            print_out(f"  and {hidden} more; --show {len(entries)} or --json names them")
    print_out("")
    for name in unchecked:
        print_out(f"not checked: {name}")
    if report.findings:
        print_out(
            f"{count_words(report.num_with_findings, 'row')} of {report.num_rows} with findings "
            "(the first row is number 0)"
        )
    else:
        print_out("nothing found")


COMMAND = Command(
    help="find out what is wrong with data before it is used",
    description=(
        "Find out what is wrong with data before it is used: rows for training, or an evaluation\n"
        "split. Nothing is changed. The exit code is 1 if anything is found."
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
    add_arguments=_add_arguments,
    run=_check,
)
