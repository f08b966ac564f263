"""``vpt depth-tokenizer``: depth maps as tokens, and the network that encodes them."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.cli.model import quieten
from vpt.cli.output import (
    check_out_folder,
    check_targets,
    print_err,
    print_out,
    progress,
    write_file,
)
from vpt.cli.parser import (
    Command,
    CommandGroup,
    add_flag,
    add_path,
    add_value,
    number,
    whole_number,
)
from vpt.errors import DataError, ImageError, PromptError
from vpt.model.folder import check_depth_tokenizer, read_json

if TYPE_CHECKING:
    from vpt.depth.maps import DepthEstimator
    from vpt.depth.measures import Measured
    from vpt.depth.tokenizer import DepthTokenizer
    from vpt.depth.training import Trainer

_METRICS, _PICTURE, _ESTIMATED = "metrics.json", "reconstructions.png", "maps"
_PICTURES = (".png", ".jpg", ".jpeg")
_SAVE_EVERY = 50

# Options of several commands


def add_tokenizer_argument(parser: argparse._ActionsContainer) -> None:
    """Add the option that names the tokenizer."""
    which = "depth tokenizer: a folder that `train` wrote, or a file of released weights"
    add_path(parser, "--tokenizer", "FOLDER_OR_PTH", which, required=True)


def add_depth_model_arguments(group: argparse._ActionsContainer) -> None:
    """Add the options that :func:`load_estimator` reads, except ``--verbose``."""
    _add_distances_argument(group)
    which = "model that estimates the depth (default: Depth Anything V2 Small)"
    add_value(group, "--depth-model", "ID_OR_FOLDER", str, which)


def _add_distances_argument(group: argparse._ActionsContainer) -> None:
    distances = (
        "the maps contain distances, as depth cameras write them, or the depth model predicts "
        "them, as ZoeDepth does; they are inverted"
    )
    add_flag(group, "--distances", distances)


def load_estimator(args: argparse.Namespace) -> DepthEstimator:
    """Load the depth model that the arguments name."""
    quieten(args)
    from vpt.depth.maps import DEFAULT_MODEL, DepthEstimator

    return DepthEstimator.load(args.depth_model or DEFAULT_MODEL, gives_distances=args.distances)


def estimate_maps(photos: Path, target: Path, args: argparse.Namespace) -> list[Path]:
    """Estimate the depth of photos; maps, named after them, are kept and not made again."""
    from vpt.depth.maps import find_photos, write_map
    from vpt.images import load_image

    found = find_photos(photos)
    named = {photo: target / f"{photo.relative_to(photos)}.png" for photo in found}
    if missing := [photo for photo in found if not named[photo].exists()]:
        estimator = load_estimator(args)
        for photo in progress(missing, len(missing), "photos"):
            depth = estimator.estimate(load_image(photo).pixels)
            write_file(partial(write_map, depth), named[photo])
    return list(named.values())


def _measure(
    tokenizer: DepthTokenizer, files: list[Path], distances: bool, picture: Path | None
) -> Measured:
    """Measure a tokenizer on maps, and draw some of them."""
    from vpt.depth.maps import read_map
    from vpt.depth.measures import draw_reconstructions, measure, spread

    read = partial(read_map, distances=distances)
    measured = measure(tokenizer, progress(map(read, files), len(files), "maps"))
    if picture:
        drawn = draw_reconstructions(tokenizer, [read(file) for file in spread(files)])
        write_file(drawn.save, picture)
    return measured


# Train


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("depth maps")
    add_path(source, "--maps", "DIR", "folder of depth maps: PNG of 8 or 16 bits, .npy")
    add_path(source, "--photos", "DIR", "instead: photos, whose depth is estimated")
    add_depth_model_arguments(source)
    heldout = "maps to measure on (default: every 20th of those given, which is not trained on)"
    add_path(source, "--heldout", "DIR", heldout)
    add_path(parser, "--out", "FOLDER", "folder to write", required=True)
    how = parser.add_argument_group("training")
    add_value(how, "--steps", "N", whole_number(1), "steps of the optimiser", 3000)
    add_value(how, "--batch-size", "N", whole_number(1), "crops per step", 16)
    cells = (
        "side of the crops, in codes; the last fifth of the steps uses whole maps, 10 codes a side"
    )
    add_value(how, "--crop-cells", "N", whole_number(1), cells, 5)
    add_value(how, "--learning-rate", "R", number(1e-8, 1.0), "learning rate of Adam", 1e-3)
    add_value(how, "--seed", "S", whole_number(0), "seed of all random choices", 0)


def _train(args: argparse.Namespace) -> None:
    """Train, from the state of a stopped run if there is one; measure, draw and save."""
    if (args.maps is None) == (args.photos is None):
        raise PromptError("expected either --maps or --photos")
    if args.photos is None and args.depth_model:
        raise PromptError("--depth-model needs --photos; maps need no model")
    check_out_folder(args.out)
    files, heldout = _find(args)
    write_file(lambda folder: folder.mkdir(parents=True, exist_ok=True), args.out)
    import torch

    from vpt.depth.training import Trainer, TrainingSettings, check_same_run, run_identity

    settings = TrainingSettings(
        args.steps, args.batch_size, args.crop_cells, args.learning_rate, seed=args.seed
    )
    distances = args.distances and args.photos is None  # estimated maps are inverted already
    if (metrics := args.out / _METRICS).exists():
        from vpt.depth.tokenizer import DepthTokenizerConfig

        wanted = run_identity(files, settings, DepthTokenizerConfig(), distances)
        check_same_run(read_json(metrics).get("run", {}), wanted, args.out)
        print_err(f"{args.out} is trained already; its scores are in {metrics}")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(files, settings, device=device, distances=distances)
    if trainer.load_state(args.out):
        print_err(f"resuming after step {trainer.step} of {args.steps}")
    for step in progress(trainer.run(), args.steps - trainer.step, "steps"):
        if step % _SAVE_EVERY == 0 or step == args.steps:
            write_file(trainer.save_state, args.out)
    _finish(trainer, heldout, args.out)


def _find(args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Maps to train on, and maps to measure on."""
    from vpt.depth.maps import find_maps

    heldout = find_maps(args.heldout) if args.heldout else []
    if args.maps:
        files = find_maps(args.maps)
    else:
        files = estimate_maps(args.photos, args.out / _ESTIMATED, args)
    if heldout:
        if {file.resolve() for file in files} & {file.resolve() for file in heldout}:
            raise PromptError(f"--heldout: {args.heldout} holds maps to train on; separate them")
        return files, heldout
    if len(files) < 2:
        raise DataError(f"expected at least 2 depth maps, found {len(files)}; one is held out")
    return [file for index, file in enumerate(files) if index % 20], files[::20]


def _finish(trainer: Trainer, heldout: list[Path], folder: Path) -> None:
    """Write the tokenizer, then its scores, which mark the end."""
    from vpt.depth.measures import measured_words
    from vpt.depth.training import STATE
    from vpt.files import write_atomic

    tokenizer = trainer.tokenizer
    write_file(tokenizer.save, folder)
    measured = _measure(tokenizer, heldout, trainer.distances, folder / _PICTURE)
    content = {"run": trainer.identity, "heldout": asdict(measured), "history": trainer.history}
    write_file(partial(write_atomic, json.dumps(content, indent=1) + "\n"), folder / _METRICS)
    (folder / STATE).unlink(missing_ok=True)
    print_out(measured_words(measured))
    print_err(f"wrote the tokenizer, {_METRICS} and {_PICTURE} to {folder}")


_TRAIN = Command(
    help="train a tokenizer on depth maps",
    description=(
        "Train the VQ-VAE that encodes depth maps as 100 codes. Writes FOLDER/model.safetensors\n"
        "and config.json, metrics.json (held-out error, use of the codebook, losses), and\n"
        "reconstructions.png: true maps, decoded ones, the difference. Uses a GPU if there is\n"
        "one. The same command resumes a run that was stopped in any way, and ends on a CPU\n"
        "with the same weights."
    ),
    examples=(
        "examples:\n"
        "  vpt depth-tokenizer train --maps data/scenes/train/depth --out data/depth-tokenizer\n"
        "  vpt depth-tokenizer train --photos photos --out data/depth-tokenizer"
    ),
    add_arguments=_add_train_arguments,
    run=_train,
)


# Encode and decode


def _add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "files", "FILE", "depth maps: PNG of 8 or 16 bits, .npy", nargs="+")
    add_tokenizer_argument(parser)
    photos = parser.add_argument_group("photos")
    add_flag(photos, "--estimate", "the files are photos; estimate their depth first")
    add_depth_model_arguments(photos)
    add_flag(parser, "--json", "print codes and text as JSON, one object per file")


def _encode(args: argparse.Namespace) -> None:
    if not args.estimate and args.depth_model:
        raise PromptError("--depth-model needs --estimate; depth maps need no model")
    check_depth_tokenizer(args.tokenizer)
    if missing := [file for file in args.files if not file.is_file()]:
        kind = ImageError if args.estimate else DataError
        raise kind(f"{missing[0]} does not exist, or is a folder; expected a file")
    from vpt.depth.maps import read_map
    from vpt.depth.tokenizer import load_depth_tokenizer
    from vpt.images import load_image
    from vpt.protocol.calls import format_depth

    tokenizer = load_depth_tokenizer(args.tokenizer)
    estimator = load_estimator(args) if args.estimate else None
    for file in args.files:
        if estimator:
            depth = estimator.estimate(load_image(file).pixels)
        else:
            depth = read_map(file, distances=args.distances)
        codes = tokenizer.encode(depth)
        text = format_depth(codes, tokenizer.config.num_codes, tokenizer.config.num_cells)
        row = {"file": str(file), "codes": codes, "text": text}
        print_out(json.dumps(row, ensure_ascii=False) if args.json else text)


_ENCODE = Command(
    help="encode depth maps, or the depth of photos, as tokens",
    description=(
        "Encode depth maps, or the depth that a model estimates of photos, as tokens: a line\n"
        "<DEPTH_START><DEPTH_12>...<DEPTH_END> on stdout for each file. Maps of any shape are\n"
        "stretched to a square; near is bright, except with --distances."
    ),
    examples=(
        "examples:\n"
        "  vpt depth-tokenizer encode map.png --tokenizer data/depth-tokenizer\n"
        "  vpt depth-tokenizer encode photo.jpg --estimate --tokenizer vae-final.pt --json"
    ),
    add_arguments=_add_encode_arguments,
    run=_encode,
)


def _add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    text = "<DEPTH_START>...<DEPTH_END>, or - to read it from stdin"
    parser.add_argument("text", metavar="TEXT", help=text)
    add_tokenizer_argument(parser)
    add_path(parser, "--out", "FILE", "file to write: .png of 16 bits", required=True)


def _decode(args: argparse.Namespace) -> None:
    if args.out.suffix.lower() != ".png":
        raise PromptError(f"--out: expected a name that ends in .png, got {args.out}")
    check_targets({"--out": args.out})
    check_depth_tokenizer(args.tokenizer)
    from vpt.depth.maps import write_map
    from vpt.depth.tokenizer import load_depth_tokenizer

    text = sys.stdin.read() if args.text == "-" else args.text
    tokenizer = load_depth_tokenizer(args.tokenizer)
    write_file(partial(write_map, tokenizer.from_text(text)), args.out)
    print_err(f"wrote {args.out}, {tokenizer.config.size_px} pixels a side; near is bright")


_DECODE = Command(
    help="decode tokens to a depth map",
    description="Decode the tokens of a depth map, as a model writes them, to a picture of it.",
    examples=(
        "example:\n"
        "  vpt depth-tokenizer encode map.png --tokenizer data/depth-tokenizer |\n"
        "    vpt depth-tokenizer decode - --tokenizer data/depth-tokenizer --out back.png"
    ),
    add_arguments=_add_decode_arguments,
    run=_decode,
)


# Report


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    maps = "depth maps that the tokenizer was not trained on"
    add_path(parser, "--maps", "DIR", maps, required=True)
    add_tokenizer_argument(parser)
    _add_distances_argument(parser)
    add_path(parser, "--picture", "FILE", "draw some maps, true and decoded: .png or .jpg")
    add_flag(parser, "--json", "print the scores as one JSON object")


def _report(args: argparse.Namespace) -> None:
    if args.picture and args.picture.suffix.lower() not in _PICTURES:
        endings = ", ".join(_PICTURES)
        raise PromptError(f"--picture: expected a name that ends in {endings}, got {args.picture}")
    check_targets({"--picture": args.picture})
    check_depth_tokenizer(args.tokenizer)
    from vpt.depth.maps import find_maps

    maps = find_maps(args.maps)
    from vpt.depth.measures import measured_words
    from vpt.depth.tokenizer import load_depth_tokenizer

    tokenizer = load_depth_tokenizer(args.tokenizer)
    measured = _measure(tokenizer, maps, args.distances, args.picture)
    print_out(json.dumps(asdict(measured)) if args.json else measured_words(measured))
    if args.picture:
        print_err(f"wrote {args.picture}")


_REPORT = Command(
    help="measure a tokenizer on depth maps",
    description=(
        "Encode and decode depth maps, and report the error, the number of codes in use, and the\n"
        "share of pairs of points that keep their order."
    ),
    examples=(
        "example:\n"
        "  vpt depth-tokenizer report --maps data/scenes/heldout/depth \\\n"
        "    --tokenizer data/depth-tokenizer --picture look.png"
    ),
    add_arguments=_add_report_arguments,
    run=_report,
)

COMMANDS = CommandGroup(
    help="encode depth maps as tokens and decode them",
    description=(
        "Encode depth maps as the tokens in which a model writes them (Aurora, arXiv 2412.03548),\n"
        "and decode them; train the tokenizer for that, and measure it."
    ),
    commands={"train": _TRAIN, "encode": _ENCODE, "decode": _DECODE, "report": _REPORT},
)
