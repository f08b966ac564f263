"""``vpt depth-tokenizer train``: a tokenizer of one's own depth maps."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.cli.depth_tokenizer_maps import add_depth_model_arguments, check_source, estimate_maps
from vpt.cli.output import check_out_folder, print_err, print_out, progress, write_file
from vpt.cli.parser import Command, number, whole_number
from vpt.errors import DataError, PromptError

if TYPE_CHECKING:
    from vpt.depth.training import Trainer

METRICS, PICTURE, ESTIMATED = "metrics.json", "reconstructions.png", "maps"

_SAVE_EVERY = 50


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("depth maps")
    source.add_argument(
        "--maps", type=Path, metavar="DIR", help="folder of them: PNG of 8 or 16 bits, .npy"
    )
    source.add_argument(
        "--photos", type=Path, metavar="DIR", help="instead: photos, whose depth is estimated"
    )
    add_depth_model_arguments(source)
    source.add_argument(
        "--heldout",
        type=Path,
        metavar="DIR",
        help="maps to measure on (default: every 20th of those given, which are then left out)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="to write")
    how = parser.add_argument_group("training")
    how.add_argument(
        "--steps", type=whole_number(1), default=3000, metavar="N", help="(default: 3000)"
    )
    how.add_argument(
        "--batch-size", type=whole_number(1), default=16, metavar="N", help="crops (default: 16)"
    )
    how.add_argument(
        "--crop-cells",
        type=whole_number(1),
        default=5,
        metavar="N",
        help="side of the crops, in codes; the last fifth of the steps sees whole maps, 10 codes "
        "a side (default: 5)",
    )
    how.add_argument(
        "--learning-rate", type=number(1e-8, 1.0), default=1e-3, metavar="R", help="(default: 1e-3)"
    )
    how.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="S", help="of all that is drawn"
    )


def _train(args: argparse.Namespace) -> None:
    """Train from where an earlier run was stopped; measure, draw and save."""
    check_source(args)
    check_out_folder(args.out)
    write_file(lambda folder: folder.mkdir(parents=True, exist_ok=True), args.out)
    import torch

    from vpt.depth.training import Trainer, TrainingSettings, check_same_run, run_identity

    settings = TrainingSettings(
        steps=args.steps,
        batch_size=args.batch_size,
        crop_cells=args.crop_cells,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    files, heldout = _find(args)
    distances = args.distances and args.photos is None  # maps of photos are estimated, and inverted
    if (metrics := args.out / METRICS).exists():
        from vpt.depth.tokenizer import DepthTokenizerConfig
        from vpt.model.hub import read_json

        wanted = run_identity(files, settings, DepthTokenizerConfig(), distances)
        check_same_run(read_json(metrics).get("run", {}), wanted, args.out)
        print_err(f"{args.out} is trained already; {metrics} tells how well")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(files, settings, device=device, distances=distances)
    if trainer.load_state(args.out):
        print_err(f"going on behind step {trainer.step} of {args.steps}")
    for step in progress(trainer.run(), args.steps - trainer.step, "steps"):
        if step % _SAVE_EVERY == 0 or step == args.steps:
            write_file(trainer.save_state, args.out)
    _finish(trainer, heldout, args.out)


def _find(args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Maps to train on, and maps to measure on."""
    from vpt.depth.maps import find_maps

    if args.maps:
        files = find_maps(args.maps)
    else:
        files = estimate_maps(args.photos, args.out / ESTIMATED, args)
    if args.heldout:
        heldout = find_maps(args.heldout)
        if {file.resolve() for file in files} & {file.resolve() for file in heldout}:
            raise PromptError(f"--heldout: {args.heldout} holds maps to train on; keep them apart")
        return files, heldout
    if len(files) < 2:
        raise DataError(f"expected at least 2 depth maps, found {len(files)}; one is held out")
    heldout = files[::20]
    return [file for index, file in enumerate(files) if index % 20], heldout


def _finish(trainer: Trainer, heldout: list[Path], folder: Path) -> None:
    """Write the tokenizer, then what it is worth; the numbers come last and mark the end."""
    from vpt.depth.maps import read_map
    from vpt.depth.measures import measured_words, score_maps, summarise
    from vpt.depth.reconstructions import draw_reconstructions, spread
    from vpt.depth.training import STATE
    from vpt.files import write_whole

    tokenizer = trainer.tokenizer
    write_file(tokenizer.save, folder)
    read = partial(read_map, distances=trainer.distances)
    maps = progress(map(read, heldout), len(heldout), "held-out maps")
    measured = summarise(score_maps(tokenizer, maps), tokenizer.config.num_codes)
    picture = draw_reconstructions(tokenizer, [read(file) for file in spread(heldout)])
    write_file(picture.save, folder / PICTURE)
    content: dict[str, Any] = {
        "run": trainer.identity,
        "heldout": asdict(measured),
        "history": trainer.history,
    }
    text = json.dumps(content, indent=1) + "\n"
    write_file(lambda file: write_whole(text, file), folder / METRICS)
    (folder / STATE).unlink(missing_ok=True)
    print_out(measured_words(measured))
    print_err(f"wrote the tokenizer, {METRICS} and {PICTURE} to {folder}")


COMMAND = Command(
    help="train a tokenizer on depth maps",
    description=(
        "Train the VQ-VAE that turns depth maps into 100 codes. Writes FOLDER/model.safetensors\n"
        "and config.json, metrics.json (held-out error, use of the codebook, losses), and\n"
        "reconstructions.png: true maps, decoded ones, the difference. Uses a GPU if there is\n"
        "one. A run that was stopped, in whatever way, goes on with the same command, and on a\n"
        "CPU ends with the same weights."
    ),
    examples=(
        "examples:\n"
        "  vpt depth-tokenizer train --maps data/scenes/train/depth --out data/depth-tokenizer\n"
        "  vpt depth-tokenizer train --photos photos --out data/depth-tokenizer"
    ),
    add_arguments=_add_arguments,
    run=_train,
)
