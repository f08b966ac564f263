"""Teaches a small network the codes of a depth tokenizer, so that it fits into the package.

Run ``python -m recipes.embedded.shrink data/depth-tokenizer data/small-tokenizer --maps MAPS
--heldout MAPS``. A code keeps its number and its meaning: models need no further training.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from vpt.cli.output import print_out
from vpt.cli.parser import whole_number
from vpt.depth.maps import find_maps, fit_map, read_map
from vpt.depth.tokenizer import DepthTokenizer, load_depth_tokenizer
from vpt.errors import VPTError

_DECODED = 30.0  # weight of the squared error of decoded maps


def shrink(
    teacher: DepthTokenizer,
    files: Sequence[Path],
    *,
    hidden_dim: int,
    steps: int,
    batch_size: int = 8,
    seed: int = 0,
) -> DepthTokenizer:
    """Train a smaller tokenizer with the codebook of another.

    Its encoder learns the teacher's vectors, its decoder the maps behind the teacher's codes.

    Args:
        teacher: whose codes are kept.
        files: depth maps.
        hidden_dim: of the network, which the teacher has more of.
        steps: of AdamW.
        batch_size: maps per step.
        seed: of weights and choices.
    """
    config = dataclasses.replace(teacher.config, hidden_dim=hidden_dim)
    student = config.build(seed)
    student.codebook.load_state_dict(teacher.network.codebook.state_dict())
    scale = teacher.network.codebook.vectors.std()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    rng = np.random.default_rng(seed)
    bar = tqdm(range(steps), mininterval=10)
    for step in bar:
        chosen = rng.choice(len(files), batch_size)
        maps = _read(teacher, [files[index] for index in chosen])
        maps = maps.flip(-1) if rng.random() < 0.5 else maps
        with torch.inference_mode():
            codes = teacher.network.encode(maps).clone()
        vectors = student.codebook.lookup(codes).permute(0, 3, 1, 2)
        encoded = F.mse_loss(student.encoder(maps) / scale, vectors / scale)
        decoded = F.mse_loss(student.decoder(vectors), maps)
        optimizer.zero_grad()
        (encoded + _DECODED * decoded).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(codes=f"{encoded.item():.3f}", decoded=f"{decoded.item():.5f}")
    return DepthTokenizer(student, config)


@torch.inference_mode()
def compare(teacher: DepthTokenizer, student: DepthTokenizer, files: Sequence[Path]) -> str:
    """Share of equal codes, and squared errors of the maps decoded from the teacher's codes."""
    same, errors = [], []
    for file in files:
        maps = _read(teacher, [file])
        codes = teacher.network.encode(maps)
        same.append((student.network.encode(maps) == codes).float().mean())
        errors.append([F.mse_loss(one.network.decode(codes), maps) for one in (student, teacher)])
    mean = torch.tensor(errors).mean(0).tolist()
    return (
        f"{len(files)} maps: {torch.stack(same).mean():.3f} of the codes are equal; squared error "
        f"{mean[0]:.5f}, of the teacher {mean[1]:.5f}"
    )


def _read(tokenizer: DepthTokenizer, files: Sequence[Path]) -> Tensor:
    maps = [fit_map(read_map(file), tokenizer.config.size_px) for file in files]
    return torch.from_numpy(np.stack(maps))[:, None]


def main() -> None:
    """Shrink the tokenizer that the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the tokenizer")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--maps", type=Path, required=True, help="folder of depth maps")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of others, to compare")
    parser.add_argument("--hidden-dim", type=whole_number(1), default=8)
    parser.add_argument("--steps", type=whole_number(1), default=1500)
    args = parser.parse_args()
    try:
        teacher, files, heldout = (
            load_depth_tokenizer(args.source),
            find_maps(args.maps),
            find_maps(args.heldout),
        )
    except VPTError as exc:
        parser.error(str(exc))
    student = shrink(teacher, files, hidden_dim=args.hidden_dim, steps=args.steps)
    student.save(args.target)
    print_out(f"{args.target}: {compare(teacher, student, heldout)}")


if __name__ == "__main__":
    main()
