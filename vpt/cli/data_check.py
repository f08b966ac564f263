"""``vpt data check``: what is wrong with data, told before a run is started."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli.model import quieten
from vpt.cli.parser import EXIT_FAULTS, Command, whole_number
from vpt.cli.progress import with_bar
from vpt.cli.terminal import put
from vpt.data.findings import FINDINGS
from vpt.errors import DataError, PromptError
from vpt.tokens import RELEASED_GRID_SIZE
from vpt.wording import count_words

if TYPE_CHECKING:
    from vpt.data.check import Report, RowChecker
    from vpt.data.image_sizes import Images

NUM_SHOWN = 5


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="rows: a JSON list, or JSON lines")
    parser.add_argument(
        "--limit", type=whole_number(1), metavar="N", help="check the first N rows only"
    )
    _add_images_and_model(parser)
    report = parser.add_argument_group("report")
    report.add_argument(
        "--ignore",
        type=_findings,
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
    report.add_argument(
        "--verbose", action="store_true", help="show library messages and tracebacks"
    )


def _add_images_and_model(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("images")
    images.add_argument(
        "--images", type=Path, metavar="ROOT", help="folder of relative paths (default: here)"
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


def _findings(text: str) -> tuple[str, ...]:
    kinds = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [kind for kind in kinds if kind not in FINDINGS]:
        raise argparse.ArgumentTypeError(
            f"unknown kind of finding {unknown[0]!r}; available: {', '.join(FINDINGS)}"
        )
    return kinds


def _check(args: argparse.Namespace) -> int | None:
    """Read the rows, open their images, check, report."""
    _check_arguments(args)
    from vpt.data.check import check_rows
    from vpt.data.image_sizes import measure_images
    from vpt.data.row_files import read_entries
    from vpt.data.row_view import image_paths
    from vpt.rows import split_crop_suffix

    rows = read_entries(args.file)
    if not rows:
        raise DataError(f"{args.file} holds no rows")
    num_all, rows = len(rows), rows[: args.limit]
    make_checker = _checker_of(args)
    images: Images = {}
    if args.open_images:
        named = (split_crop_suffix(path)[0] for row in rows for path in image_paths(row))
        paths = dict.fromkeys(named)
        images = dict(with_bar(measure_images(paths, args.images), len(paths), "images"))
    report = check_rows(with_bar(rows, len(rows), "rows"), make_checker(images), args.ignore)
    unchecked = _unchecked(args, num_all - len(rows))
    if args.json:
        put(json.dumps(_as_json(report, args.file, len(images), unchecked)))
    else:
        _show(report, args, len(images), unchecked)
    return EXIT_FAULTS if report.findings else None


def _check_arguments(args: argparse.Namespace) -> None:
    if args.cutoff_len and not args.model:
        raise PromptError("--cutoff-len needs --model, whose tokens are counted")
    if args.cutoff_len and not args.open_images:
        raise PromptError("--cutoff-len needs the sizes of images; leave --no-images out")
    if args.grid_size and args.model:
        raise PromptError("--grid-size is the model's own; leave it out beside --model")
    if args.images and not args.images.is_dir():
        raise PromptError(f"--images: there is no folder {args.images}")


def _checker_of(args: argparse.Namespace) -> Callable[[Images], RowChecker]:
    """Load what the checks need to know of a model; the images can come later."""
    from vpt.data.check import RowChecker

    if not args.model:
        return partial(RowChecker, grid_size=args.grid_size or RELEASED_GRID_SIZE)
    quieten(args)
    from vpt.config import load_config
    from vpt.processing import VPTProcessor

    return partial(
        RowChecker.for_model,
        config=load_config(args.model),
        processor=VPTProcessor.from_pretrained(args.model),
        cutoff_len=args.cutoff_len,
    )


def _unchecked(args: argparse.Namespace, num_left: int) -> list[str]:
    """What was not looked at, and what would make it so."""
    unchecked = []
    if num_left:
        unchecked.append(f"{count_words(num_left, 'further row')} (--limit)")
    if not args.open_images:
        unchecked.append("image files and crops (--no-images)")
    if not args.model:
        unchecked.append("the model's tokens and branches (needs --model)")
    if not args.cutoff_len:
        unchecked.append("lengths (needs --model and --cutoff-len)")
    if args.ignore:
        unchecked.append(f"what --ignore names ({', '.join(args.ignore)})")
    return unchecked


def _as_json(
    report: Report, file: Path, num_images: int, unchecked: Sequence[str]
) -> dict[str, Any]:
    return {
        "file": str(file),
        "num_rows": report.num_rows,
        "num_rows_with_findings": report.num_with_findings,
        "num_images_opened": num_images,
        "row_kinds": dict(report.row_kinds),
        "findings": {
            kind: {
                "meaning": FINDINGS[kind],
                "rows": [{"row": number, "detail": detail} for number, detail in entries],
            }
            for kind, entries in report.findings.items()
        },
        "unchecked": list(unchecked),
    }


def _show(
    report: Report, args: argparse.Namespace, num_images: int, unchecked: Sequence[str]
) -> None:
    put(
        f"{args.file}: {count_words(report.num_rows, 'row')}, "
        f"{count_words(num_images, 'image')} opened"
    )
    for row_kind, number in sorted(report.row_kinds.items()):
        put(f"  {number:>7,}  {row_kind}")
    for kind, entries in report.findings.items():
        num_rows = len({number for number, _ in entries})
        put(f"\n{kind}: {count_words(num_rows, 'row')}: {FINDINGS[kind]}")
        for number, detail in entries[: args.show]:
            put(f"  row {number}: {' '.join(detail.split())}")
        if hidden := len(entries) - min(args.show, len(entries)):
            put(f"  and {hidden} more; --show {len(entries)} or --json names them")
    put("")
    for name in unchecked:
        put(f"not checked: {name}")
    if report.findings:
        put(
            f"{count_words(report.num_with_findings, 'row')} of {report.num_rows} with findings "
            "(the first row is number 0)"
        )
    else:
        put("nothing found")


COMMAND = Command(
    help="find out what is wrong with data before it is used",
    description=(
        "Find out what is wrong with data before it is used: rows for training, or an evaluation\n"
        "split. Nothing is changed. The exit code is 1 if anything is found."
    ),
    examples=(
        "kinds of findings:\n"
        + "\n".join(f"  {kind:<19} {meaning}" for kind, meaning in FINDINGS.items())
        + "\n\nexamples:\n"
        "  vpt data check train.json --images photos\n"
        "  vpt data check train.json --images photos --model ./my-model --cutoff-len 2048"
    ),
    add_arguments=_add_arguments,
    run=_check,
)
