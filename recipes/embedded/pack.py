"""Packs a trained model into the folder that ships with the package.

Run ``python -m recipes.embedded.pack models/embedded/3-language vpt/embedded --depth-tokenizer
data/perception/small-tokenizer``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vpt.depth.tokenizer import load_depth_tokenizer
from vpt.errors import CheckpointError
from vpt.model.modeling import load_model
from vpt.model.processing import VPTProcessor

MOST_BYTES = 12_000_000


def pack(source: Path, target: Path, depth_tokenizer: Path | None = None) -> int:
    """Save a model in half precision, with all that loading it needs.

    float16 keeps three bits more of each weight than bfloat16 in the same room.

    Args:
        source: folder of the trained model.
        target: folder to write.
        depth_tokenizer: folder of one with the same codes, in place of that of the model.

    Returns:
        Size of the folder in bytes.

    Raises:
        CheckpointError: if it cannot be loaded, a weight is too large for float16, or the folder
            is larger than :data:`MOST_BYTES`.
    """
    model = load_model(str(source), device="cpu", dtype=torch.float32)
    model.to(torch.float16)
    if bad := [n for n, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{bad[0]} does not fit float16; train with more weight decay")
    model.config.dtype = torch.float16
    generation = model.generation_config
    if isinstance(generation.eos_token_id, list):  # each stage of training adds it once more
        generation.eos_token_id = list(dict.fromkeys(generation.eos_token_id))
    model.save_pretrained(target)
    VPTProcessor.from_pretrained(str(source)).save_pretrained(target)
    if depth_tokenizer is not None:
        small = load_depth_tokenizer(depth_tokenizer)
        small.network.half()
        small.save(target / model.config.depth_tokenizer)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise CheckpointError(f"{target} takes {size:,} bytes, more than {MOST_BYTES:,}")
    return size


def main() -> None:
    """Pack what the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the trained model")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--depth-tokenizer", type=Path, help="in place of that of the model")
    args = parser.parse_args()
    try:
        size = pack(args.source, args.target, args.depth_tokenizer)
    except CheckpointError as exc:
        parser.error(str(exc))
    parser.exit(0, f"{args.target}: {size:,} bytes\n")


if __name__ == "__main__":
    main()
