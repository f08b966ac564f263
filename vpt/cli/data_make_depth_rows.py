"""``vpt data make-depth-rows``: rows about depth, of photos and their depth maps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.cli.depth_tokenizer_encode import add_tokenizer_argument
from vpt.cli.depth_tokenizer_maps import add_depth_model_arguments, estimate_maps, find_photos
from vpt.cli.output import check_out_folder, print_err, progress, report_left_out
from vpt.cli.parser import Command, number, whole_number
from vpt.errors import PromptError

if TYPE_CHECKING:
    from vpt.data.aurora.depth_sources import DepthSource
    from vpt.data.aurora.parts import Part

NUM_POINTS = (2, 5)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    add_tokenizer_argument(parser)
    photos = parser.add_argument_group("photos and depth maps")
    photos.add_argument(
        "--scenes",
        type=Path,
        metavar="DIR",
        help="as `python -m recipes make-scenes` wrote: DIR/train",
    )
    photos.add_argument("--photos", type=Path, metavar="DIR", help="photos, in folders of folders")
    photos.add_argument(
        "--maps",
        type=Path,
        metavar="DIR",
        help="maps of --photos: of a/b.jpg it is a/b.jpg.png, a/b.png or a/b.npy; without it "
        "they are estimated, and kept in OUT/maps",
    )
    add_depth_model_arguments(photos)
    photos.add_argument(
        "--limit", type=whole_number(1), metavar="N", help="use the first N photos only"
    )
    photos.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave photos out that cannot be used, instead of stopping at the first",
    )
    _add_points(parser.add_argument_group("points"))
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="S", help="of all chance (default: 0)"
    )


def _add_points(points: argparse._ArgumentGroup) -> None:
    points.add_argument(
        "--points",
        type=_num_points,
        default=NUM_POINTS,
        metavar="N[-M]",
        help="how many; of a range as many as the photo permits (default: 2-5)",
    )
    points.add_argument(
        "--layout",
        choices=("spread", "centre"),
        default="spread",
        help="anywhere, or as in HardBLINK at similar heights around the middle (default: spread)",
    )
    points.add_argument(
        "--min-distance",
        type=number(0.01, 0.9),
        default=0.12,
        metavar="D",
        help="between two points, as a share of the side (default: 0.12)",
    )
    points.add_argument(
        "--min-difference",
        type=number(0.01, 0.9),
        default=0.06,
        metavar="D",
        help="between the depths of two points, 0 to 1 (default: 0.06)",
    )
    points.add_argument(
        "--scale",
        type=number(0.5, 4),
        default=1.0,
        metavar="X",
        help="size of circles and letters, 1 as in HardBLINK (default: 1)",
    )


def _num_points(text: str) -> tuple[int, int]:
    """``"3"`` or ``"2-5"``."""
    least, _, most = text.partition("-")
    try:
        span = int(least), int(most or least)
    except ValueError:
        span = (0, 0)
    if not NUM_POINTS[0] <= span[0] <= span[1] <= NUM_POINTS[1]:
        raise argparse.ArgumentTypeError(f"expected 2 to 5, or a range as 2-5, got {text!r}")
    return span


def _make(args: argparse.Namespace) -> None:
    """Find photos and maps, make pictures and rows, say what came of it."""
    _check_arguments(args)
    from vpt.data.aurora.depth_files import MARKED, DepthRecipe, DepthRowMaker
    from vpt.data.aurora.points import PointRule
    from vpt.depth.tokenizer import load_depth_tokenizer

    tokenizer = load_depth_tokenizer(args.tokenizer)
    sources = _find_sources(args)[: args.limit]
    rule = PointRule(args.layout, args.min_distance, args.min_difference)
    recipe = DepthRecipe(args.seed, args.points, rule, args.scale, args.skip_bad)
    maker = DepthRowMaker(tokenizer, recipe, args.out)
    try:
        for _ in progress(maker.make(sources), len(sources), "photos"):
            pass
        made = maker.finish(len(sources))
    except OSError as exc:
        raise PromptError(f"cannot write {args.out}: {exc.strerror or exc}") from exc
    _report(args.out / MARKED, made)


def _check_arguments(args: argparse.Namespace) -> None:
    if (args.scenes is None) == (args.photos is None):
        raise PromptError("expected either --scenes or --photos")
    if args.maps is not None and args.photos is None:
        raise PromptError("--maps belongs to --photos; scenes bring theirs")
    if args.depth_model and (args.photos is None or args.maps is not None):
        raise PromptError("--depth-model is for --photos without --maps")
    if args.distances and args.photos is None:
        raise PromptError("--distances is for --photos; scenes have maps of their own")
    check_out_folder(args.out)


def _find_sources(args: argparse.Namespace) -> list[DepthSource]:
    from vpt.data.aurora.depth_sources import photo_sources, scene_sources

    if args.scenes is not None:
        return scene_sources(args.scenes)
    photos = find_photos(args.photos)
    if args.maps is None:
        maps = args.out / "maps"
        estimate_maps(args.photos, maps, args)  # inverted there, where the model gives distances
        return photo_sources(photos, args.photos, maps)
    return photo_sources(photos, args.photos, args.maps, args.distances)


def _report(marked: Path, made: Part) -> None:
    num_rows = {name: len(rows) for name, rows in made.lines.items()}
    files = ", ".join(f"{name}.jsonl ({number:,})" for name, number in num_rows.items())
    print_err(f"pictures in {marked}, rows in {files}")
    points = {key: made.counts[key] for key in sorted(made.counts) if key.endswith("points")}
    letters = {key: made.counts[key] for key in sorted(made.counts) if key.startswith("answer")}
    print_err(", ".join(f"{key}: {count:,}" for key, count in {**points, **letters}.items()))
    total = sum(points.values())
    guess = sum(count / int(key.split()[0]) for key, count in points.items()) / total
    lowest = made.counts["lowest is nearest"] / total
    print_err(
        f"the lowest point is the nearest in {lowest:.0%} of the questions; a guess is {guess:.0%}"
    )
    report_left_out(made.problems, "photo")


COMMAND = Command(
    help="make rows about depth, of photos and depth maps",
    description=(
        "Make rows for a model that writes depth maps (Aurora): the depth map of a photo; which\n"
        "of 2 to 5 marked points is nearest, answered in steps with the depth map, or at once.\n"
        "Writes DIR/marked/*.jpg, depth_maps.jsonl, depth_steps.jsonl, depth_direct.jsonl (rows,\n"
        "named in dataset_info.json), questions.jsonl and answers.jsonl (to measure a model with,\n"
        "laid out as HardBLINK's).\n"
        "The same command gives the same data; it goes on where it was stopped."
    ),
    examples=(
        "examples:\n"
        "  vpt data make-depth-rows --scenes data/scenes/train --tokenizer data/depth --out rows\n"
        "  vpt data make-depth-rows --scenes data/scenes/heldout --tokenizer data/depth \\\n"
        "    --out hard-5 --points 5 --layout centre --skip-bad\n"
        "  vpt data make-depth-rows --photos photos --maps maps --tokenizer data/depth --out rows"
    ),
    add_arguments=_add_arguments,
    run=_make,
)
