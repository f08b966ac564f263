"""Keeps the encoders of a model in one file, and makes a model with such encoders.

Run ``python -m recipes.embedded.encoders models/embedded/2-perception encoders.safetensors`` to
keep them in float16, and with the two names exchanged to make the model that stage 3 starts from:
its language model has not been trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recipes.embedded.shape import fresh_model
from vpt.errors import CheckpointError
from vpt.model.modeling import load_model

_ENCODERS = ("model.visual.", "branches.", "projectors.")
_SEED = 1  # of the language model, as in stage 1


def keep(folder: Path, file: Path) -> None:
    """Write the encoders of a model, with their projectors, to a file in float16.

    Raises:
        CheckpointError: if the model cannot be loaded, or the file not be written.
    """
    state = load_model(str(folder), device="cpu", dtype=torch.float32).state_dict()
    kept = {name: state[name].half() for name in state if name.startswith(_ENCODERS)}
    try:
        save_file(kept, file)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"cannot write {file}: {exc}") from exc


def restore(file: Path, folder: Path) -> None:
    """Write a model with the encoders of a file and a fresh language model.

    Raises:
        CheckpointError: if the file does not have the encoders of the embedded model.
    """
    model, processor = fresh_model(_SEED)
    try:
        kept = load_file(file)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"cannot read {file}: {exc}") from exc
    wanted = {k: v.shape for k, v in model.state_dict().items() if k.startswith(_ENCODERS)}
    if wanted != {name: tensor.shape for name, tensor in kept.items()}:
        raise CheckpointError(f"{file} does not have the encoders of the embedded model")
    model.load_state_dict(kept, strict=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def main() -> None:
    """Keep the encoders of a folder in a file, or make a folder of such a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of a model, or file of encoders")
    parser.add_argument("target", type=Path, help="file of encoders, or folder of a model")
    args = parser.parse_args()
    try:
        (keep if args.source.is_dir() else restore)(args.source, args.target)
    except CheckpointError as exc:
        parser.error(str(exc))
    parser.exit(0, f"{args.target} is written\n")


if __name__ == "__main__":
    main()
