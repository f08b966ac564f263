"""``vpt data make-...``: rows with depth maps and boxes (Aurora), and the curriculum of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.cli.depth_tokenizer import add_depth_model_arguments, add_tokenizer_argument, estimate_maps
from vpt.cli.output import (
    check_out_folder,
    check_targets,
    print_err,
    print_out,
    progress,
    report_left_out,
    write_file,
)
from vpt.cli.parser import Command, add_flag, add_path, add_value, number, whole_number
from vpt.data.rows import DATASET_INFO, SUFFIXES, add_dataset_entry, write_dataset_info, write_rows
from vpt.errors import PromptError
from vpt.model.folder import check_depth_tokenizer
from vpt.view.wording import count_text

if TYPE_CHECKING:
    from vpt.data.depth_rows import DepthSource
    from vpt.data.making import RowMaking, RowsMade

_NUM_POINTS = (2, 5)


def _make_rows(making: RowMaking, out: Path) -> RowsMade:
    """Make rows from all sources, and write the files."""
    try:
        for _ in progress(making.run(), len(making.sources), f"{making.noun}s"):
            pass
        made = making.finish()
    except OSError as exc:
        raise PromptError(f"cannot write {out}: {exc.strerror or exc}") from exc
    files = ", ".join(f"{name}.jsonl ({len(rows):,})" for name, rows in made.lines.items())
    print_err(f"in {out}: {files}")
    return made


# Rows about depth


def _add_depth_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "--out", "DIR", "folder to write", required=True)
    add_tokenizer_argument(parser)
    photos = parser.add_argument_group("photos and depth maps")
    add_path(
        photos, "--scenes", "DIR", "folder that `python -m recipes make-scenes` wrote: DIR/train"
    )
    add_path(photos, "--photos", "DIR", "folder of photos; its subfolders are included")
    maps = (
        "maps of --photos: for a/b.jpg a/b.jpg.png, a/b.png or a/b.npy; without this option they "
        "are estimated, and kept in OUT/maps"
    )
    add_path(photos, "--maps", "DIR", maps)
    add_depth_model_arguments(photos)
    add_value(photos, "--limit", "N", whole_number(1), "use the first N photos only")
    skip = "skip photos that cannot be used, instead of stopping at the first"
    add_flag(photos, "--skip-bad", skip)
    points = parser.add_argument_group("points")
    points.add_argument(
        "--points",
        type=_num_points,
        default=_NUM_POINTS,
        metavar="N[-M]",
        help="number of points; of a range as many as the photo permits (default: 2-5)",
    )
    points.add_argument(
        "--layout",
        choices=("spread", "centre"),
        default="spread",
        help="anywhere, or as in HardBLINK at similar heights around the middle (default: spread)",
    )
    share = number(0.01, 0.9)
    distance = "least distance between two points, as a share of the side"
    add_value(points, "--min-distance", "D", share, distance, 0.12)
    add_value(
        points,
        "--min-difference",
        "D",
        share,
        "least difference between the depths of two points",
        0.06,
    )
    scale = "size of circles and letters, relative to HardBLINK's"
    add_value(points, "--scale", "X", number(0.5, 4), scale, 1.0)
    add_value(parser, "--seed", "S", whole_number(0), "seed of all random choices", 0)


def _num_points(text: str) -> tuple[int, int]:
    """``"3"`` or ``"2-5"``."""
    least, _, most = text.partition("-")
    try:
        span = int(least), int(most or least)
    except ValueError:
        span = (0, 0)
    if not _NUM_POINTS[0] <= span[0] <= span[1] <= _NUM_POINTS[1]:
        raise argparse.ArgumentTypeError(f"expected 2 to 5, or a range as 2-5, got {text!r}")
    return span


def _make_depth_rows(args: argparse.Namespace) -> None:
    """Find photos and maps, make pictures and rows, report."""
    _check_depth_arguments(args)
    from vpt.data.depth_rows import DepthRecipe, make_depth_rows
    from vpt.data.points import PointRule

    sources = _find_sources(args)[: args.limit]
    from vpt.depth.tokenizer import load_depth_tokenizer

    tokenizer = load_depth_tokenizer(args.tokenizer)
    rule = PointRule(args.layout, args.min_distance, args.min_difference)
    recipe = DepthRecipe(args.seed, args.points, rule, args.scale, args.skip_bad)
    made = _make_rows(make_depth_rows(sources, tokenizer, recipe, args.out), args.out)
    points = {key: made.counts[key] for key in sorted(made.counts) if key.endswith("points")}
    letters = {key: made.counts[key] for key in sorted(made.counts) if key.startswith("answer")}
    print_err(", ".join(f"{key}: {count:,}" for key, count in {**points, **letters}.items()))
    total = sum(points.values())
    chance = sum(count / int(key.split()[0]) for key, count in points.items()) / total
    lowest = made.counts["lowest is nearest"] / total
    print_err(f"the lowest point is the nearest in {lowest:.0%} of the questions")
    print_err(f"the accuracy of random answers is {chance:.0%}")
    report_left_out(made.problems, "photo")


def _check_depth_arguments(args: argparse.Namespace) -> None:
    if (args.scenes is None) == (args.photos is None):
        raise PromptError("expected either --scenes or --photos")
    if args.maps is not None and args.photos is None:
        raise PromptError("--maps belongs to --photos; scenes have maps of their own")
    if args.depth_model and (args.photos is None or args.maps is not None):
        raise PromptError("--depth-model is for --photos without --maps")
    if args.distances and args.photos is None:
        raise PromptError("--distances is for --photos; scenes have maps of their own")
    check_out_folder(args.out)
    check_depth_tokenizer(args.tokenizer)


def _find_sources(args: argparse.Namespace) -> list[DepthSource]:
    from vpt.data.depth_rows import photo_sources, scene_sources
    from vpt.depth.maps import find_photos

    if args.scenes is not None:
        return scene_sources(args.scenes)
    photos = find_photos(args.photos)
    if args.maps is not None:
        return photo_sources(photos, args.photos, args.maps, args.distances)
    maps = args.out / "maps"
    estimate_maps(args.photos, maps, args)  # inverts the output of a model of distances
    return photo_sources(photos, args.photos, maps)


_DEPTH_ROWS = Command(
    help="make rows about depth from photos and depth maps",
    description=(
        "Make rows for a model that writes depth maps (Aurora): the depth map of a photo; which\n"
        "of 2 to 5 marked points is nearest, answered in steps with the depth map, or at once.\n"
        "Writes DIR/marked/*.jpg, depth_maps.jsonl, depth_steps.jsonl, depth_direct.jsonl (rows,\n"
        "named in dataset_info.json), questions.jsonl and answers.jsonl (to measure a model with,\n"
        "in HardBLINK's layout).\n"
        "The same command gives the same data; it resumes a stopped run."
    ),
    examples=(
        "examples:\n"
        "  vpt data make-depth-rows --scenes data/scenes/train --tokenizer data/depth --out rows\n"
        "  vpt data make-depth-rows --scenes data/scenes/heldout --tokenizer data/depth \\\n"
        "    --out hard-5 --points 5 --layout centre --skip-bad\n"
        "  vpt data make-depth-rows --photos photos --maps maps --tokenizer data/depth --out rows"
    ),
    add_arguments=_add_depth_arguments,
    run=_make_depth_rows,
)


# Rows about boxes and numbers


def _add_counting_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "annotations", "ANNOTATIONS", "JSON in the format of LVIS or COCO")
    add_path(parser, "--images", "DIR", "folder of the pictures", required=True)
    add_path(parser, "--out", "DIR", "folder to write", required=True)
    at_least_1 = whole_number(1)
    add_value(
        parser, "--categories", "N", at_least_1, "maximum number of categories per picture", 1
    )
    most = "leave out categories with more boxes in a picture"
    add_value(parser, "--max-boxes", "N", at_least_1, most, 10)
    least = "leave out categories with smaller boxes, on the 336 grid"
    add_value(parser, "--min-side", "PX", at_least_1, least, 4)
    add_flag(parser, "--skip-bad", "skip pictures that are missing or not of the annotated size")
    add_value(parser, "--seed", "S", whole_number(0), "seed of the choice of categories", 0)


def _make_counting_rows(args: argparse.Namespace) -> None:
    """Read annotations, make rows, report what was made and what was left out."""
    if not args.images.is_dir():
        raise PromptError(f"--images: there is no folder {args.images}")
    check_out_folder(args.out)
    from vpt.data.counting import CountingRecipe, make_counting_rows, read_lvis

    annotations = read_lvis(args.annotations, max_boxes=args.max_boxes, min_side=args.min_side)
    recipe = CountingRecipe(args.seed, args.categories, args.skip_bad)
    made = _make_rows(make_counting_rows(annotations, args.images, recipe, args.out), args.out)
    counts = sorted((int(count), times) for count, times in made.counts.items())
    print_err("counts: " + ", ".join(f"{count}: {times:,}" for count, times in counts))
    for why, times in sorted(annotations.left_out.items()):
        print_err(f"left out, categories of a picture, for {why}: {times:,}")
    if num_without := sum(not one.categories for one in annotations.pictures):
        print_err(f"{count_text(num_without, 'picture')} with nothing left to ask about")
    report_left_out(made.problems, "picture")


_COUNTING_ROWS = Command(
    help="make rows about boxes and numbers of objects from LVIS annotations",
    description=(
        "Make rows for a model that writes boxes (Aurora): the boxes of all objects of a\n"
        "category; their number, answered in steps with the boxes, or at once. Boxes are\n"
        "converted to the 336 grid. Categories with a crowd, an unsound box, or annotations that\n"
        "are not exhaustive are left out, and counted. Writes boxes.jsonl, count_steps.jsonl,\n"
        "count_direct.jsonl (rows, named in dataset_info.json), questions.jsonl and\n"
        "answers.jsonl (to measure a model with, in HardBLINK's layout). The same command gives\n"
        "the same rows."
    ),
    examples=(
        "example:\n"
        "  vpt data make-counting-rows lvis_v1_train.json --images coco --out rows --skip-bad"
    ),
    add_arguments=_add_counting_arguments,
    run=_make_counting_rows,
)


# The curriculum


def _add_curriculum_arguments(parser: argparse.ArgumentParser) -> None:
    several = {"required": True, "nargs": "+"}
    add_path(parser, "--atomic", "FILE", "rows of depth maps or boxes alone", **several)
    add_path(parser, "--tasks", "FILE", "rows of questions, in steps or at once", **several)
    add_path(parser, "--out", "FILE", "file to write: .jsonl or .json", required=True)
    add_value(parser, "--epochs", "N", whole_number(1), "parts of the file", 10)
    share = number(0, 1)
    add_value(parser, "--first-share", "S", share, "share of atomic rows in the first epoch", 1.0)
    add_value(parser, "--last-share", "S", share, "share of atomic rows in the last epoch", 0.1)
    per_epoch = "rows per epoch (default: as many as there are rows for)"
    add_value(parser, "--rows-per-epoch", "N", whole_number(1), per_epoch)
    add_value(parser, "--seed", "S", whole_number(0), "seed of the order", 0)


def _make_curriculum(args: argparse.Namespace) -> None:
    """Mix rows, write them, add the entry to dataset_info.json, show the shares."""
    from vpt.data.curriculum import Annealing, anneal, count_epochs, epoch_lines, read_rows

    if args.out.suffix not in SUFFIXES:
        raise PromptError(f"--out: expected a name that ends in {' or '.join(SUFFIXES)}")
    check_targets({"--out": args.out})
    annealing = Annealing(args.epochs, args.first_share, args.last_share)
    folder, name = args.out.parent, args.out.stem
    atomic, tasks = (
        [row for file in files for row in read_rows(file, folder)]
        for files in (args.atomic, args.tasks)
    )
    rows = list(anneal(atomic, tasks, annealing, args.rows_per_epoch, args.seed))
    info_file = folder / DATASET_INFO
    info = add_dataset_entry(info_file, name, args.out)
    write_file(lambda file: write_rows(rows, file), args.out)
    write_file(lambda file: write_dataset_info(info, file), info_file)
    print_err(f"{len(rows):,} rows in {args.out}, named {name!r} in {info_file}")
    print_out("\n".join(epoch_lines(count_epochs(rows))))


_CURRICULUM = Command(
    help="make a file of rows with a decreasing share of depth maps or boxes alone",
    description=(
        "Mix rows of the atomic task (depth maps or boxes alone) with rows that use it, in\n"
        "epochs: the share of the atomic task decreases by equal steps. The order of the file is\n"
        "the curriculum; train on it once (num_train_epochs: 1), in order (disable_shuffling:\n"
        "true). Prints the shares; `vpt data check` prints them again, and finds a file out of\n"
        "order."
    ),
    examples=(
        "example:\n"
        "  vpt data make-curriculum --atomic rows/depth_maps.jsonl \\\n"
        "    --tasks rows/depth_steps.jsonl rows/depth_direct.jsonl --out rows/curriculum.jsonl"
    ),
    add_arguments=_add_curriculum_arguments,
    run=_make_curriculum,
)

COMMANDS = {
    "make-depth-rows": _DEPTH_ROWS,
    "make-counting-rows": _COUNTING_ROWS,
    "make-curriculum": _CURRICULUM,
}
