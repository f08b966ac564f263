"""A copy of the shipped model whose choice of mode is damaged, for policy training to repair.

Run ``python -m recipes.embedded.damage models/embedded/damaged``. The tokens that begin a call get
embeddings that are mostly their mean, and shorter: the model confuses them, and rarely calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import vpt

SHARE = 0.9  # of the mean
SCALE = 0.5  # of the length


def damage(target: Path, share: float = SHARE, scale: float = SCALE) -> None:
    """Write the damaged copy.

    Args:
        target: folder to write.
        share: of the mean; 1 makes all openers equal.
        scale: of the openers' length; ``share`` 0 and ``scale`` 1 change nothing.
    """
    runtime = vpt.load(dtype="float32")
    vocabulary = runtime.vocabulary
    openers = [vocabulary.opener(branch) for branch in vocabulary.branches]
    with torch.no_grad():
        table = runtime.model.get_input_embeddings().weight
        rows = table[openers]
        table[openers] = scale * ((1 - share) * rows + share * rows.mean(0))
    runtime.save_pretrained(target)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments of the command line, and write the copy."""
    parser = argparse.ArgumentParser(prog="python -m recipes.embedded.damage", description=__doc__)
    parser.add_argument("target", type=Path, help="folder to write")
    damage(parser.parse_args(argv).target)


if __name__ == "__main__":
    main()
