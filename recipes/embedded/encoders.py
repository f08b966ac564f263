"""Makes the model that stage 3 starts from, with the encoders of a trained model.

Run ``python -m recipes.embedded.encoders vpt/embedded models/embedded/2-perception``:
the language model of the second folder has not been trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from recipes.embedded.shape import fresh_model
from vpt.errors import CheckpointError
from vpt.model.modeling import load_model

_ENCODERS = ("model.visual.", "branches.", "projectors.")
_SEED = 1  # of the language model, as in stage 1


def take_encoders(source: Path, target: Path) -> None:
    """Write a model with the encoders and projectors of another, and a fresh language model.

    Args:
        source: folder of a trained model.
        target: folder to write.

    Raises:
        CheckpointError: if it cannot be loaded, or has other encoders than the embedded model.
    """
    trained = load_model(str(source), device="cpu", dtype=torch.float32).state_dict()
    taken = {name: value for name, value in trained.items() if name.startswith(_ENCODERS)}
    model, processor = fresh_model(_SEED)
    wanted = {k: v.shape for k, v in model.state_dict().items() if k.startswith(_ENCODERS)}
    if wanted != {name: value.shape for name, value in taken.items()}:
        raise CheckpointError(f"{source} does not have the encoders of the embedded model")
    model.load_state_dict(taken, strict=False)
    model.save_pretrained(target)
    processor.save_pretrained(target)


def main() -> None:
    """Take the encoders of a folder into another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of a trained model")
    parser.add_argument("target", type=Path, help="folder to write")
    args = parser.parse_args()
    try:
        take_encoders(args.source, args.target)
    except CheckpointError as exc:
        parser.error(str(exc))
    parser.exit(0, f"{args.target} is written\n")


if __name__ == "__main__":
    main()
