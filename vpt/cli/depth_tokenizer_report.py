"""``vpt depth-tokenizer report``: what a tokenizer keeps of a folder of depth maps."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

from vpt.cli.depth_tokenizer_encode import add_tokenizer_argument
from vpt.cli.depth_tokenizer_maps import add_distances_argument
from vpt.cli.output import check_targets, print_err, print_out, progress, write_file
from vpt.cli.parser import Command
from vpt.errors import PromptError

_PICTURES = (".png", ".jpg", ".jpeg")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--maps", required=True, type=Path, metavar="DIR", help="depth maps it was not trained on"
    )
    add_tokenizer_argument(parser)
    add_distances_argument(parser)
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw some maps, true and decoded: .png or .jpg",
    )
    parser.add_argument("--json", action="store_true", help="numbers as one JSON object")


def _report(args: argparse.Namespace) -> None:
    """Measure, tell, draw."""
    if args.picture and args.picture.suffix.lower() not in _PICTURES:
        endings = ", ".join(_PICTURES)
        raise PromptError(f"--picture: expected a name that ends in {endings}, got {args.picture}")
    check_targets({"--picture": args.picture})
    from vpt.depth.maps import find_maps, read_map
    from vpt.depth.measures import measured_words, score_maps, summarise
    from vpt.depth.reconstructions import draw_reconstructions, spread
    from vpt.depth.tokenizer import load_depth_tokenizer

    tokenizer = load_depth_tokenizer(args.tokenizer)
    files = find_maps(args.maps)
    read = partial(read_map, distances=args.distances)
    maps = progress(map(read, files), len(files), "maps")
    measured = summarise(score_maps(tokenizer, maps), tokenizer.config.num_codes)
    print_out(json.dumps(asdict(measured)) if args.json else measured_words(measured))
    if args.picture:
        picture = draw_reconstructions(tokenizer, [read(file) for file in spread(files)])
        write_file(picture.save, args.picture)
        print_err(f"wrote {args.picture}")


COMMAND = Command(
    help="measure what a tokenizer keeps of depth maps",
    description=(
        "Encode and decode depth maps, and tell the error, how many codes are in use, and how\n"
        "many pairs of points keep their order."
    ),
    examples=(
        "example:\n"
        "  vpt depth-tokenizer report --maps data/scenes/heldout/depth \\\n"
        "    --tokenizer data/depth-tokenizer --picture look.png"
    ),
    add_arguments=_add_arguments,
    run=_report,
)
