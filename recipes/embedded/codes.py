"""Merges depth codes that look alike, so that a small model can tell them apart.

Run ``python -m recipes.embedded.codes data/depth-tokenizer data/few-codes --keep 24``. The format
stays: 128 codes, of which some are not used any more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from vpt.cli.parser import whole_number
from vpt.depth.tokenizer import load_depth_tokenizer
from vpt.errors import VPTError


def merge_codes(vectors: Tensor, sizes: Tensor, num_kept: int) -> Tensor:
    """Merge the pair of codes that costs least, until few are left (Ward's method).

    Args:
        vectors: ``[K, D]`` of the codebook.
        sizes: ``[K]``, how often each is used.
        num_kept: different vectors that remain.

    Returns:
        ``[K, D]``: for each code the mean of its group. Encoders take the first of equal codes.
    """
    means, weights = vectors.double(), sizes.double() + 1e-6
    group = torch.arange(len(vectors))  # of each code
    alive = torch.ones(len(vectors), dtype=torch.bool)
    for _ in range(len(vectors) - num_kept):
        cost = torch.cdist(means, means).square()
        cost *= weights[:, None] * weights / (weights[:, None] + weights)
        cost[~alive] = cost[:, ~alive] = torch.inf
        cost.fill_diagonal_(torch.inf)
        one, other = divmod(int(cost.argmin()), len(means))
        both = weights[one] + weights[other]
        means[one] = (weights[one] * means[one] + weights[other] * means[other]) / both
        weights[one], alive[other] = both, False
        group[group == other] = one
    return means[group].to(vectors)


def main() -> None:
    """Merge the codes of the tokenizer that the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the trained tokenizer")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--keep", type=whole_number(2), default=24, help="codes (default: 24)")
    args = parser.parse_args()
    try:
        tokenizer = load_depth_tokenizer(args.source)
    except VPTError as exc:
        parser.error(str(exc))
    book = tokenizer.network.codebook
    if args.keep > book.num_codes:
        parser.error(f"--keep: {args.source} has {book.num_codes} codes, fewer than {args.keep}")
    sizes = book.state_dict()["_ema_cluster_size"]
    book.vectors.copy_(merge_codes(book.vectors, sizes, args.keep))
    tokenizer.save(args.target)
    parser.exit(0, f"{args.target}: {args.keep} of {book.num_codes} codes differ\n")


if __name__ == "__main__":
    main()
