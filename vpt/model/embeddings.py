"""Where the embedding rows of new tokens begin, before they are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vpt.errors import CheckpointError
from vpt.protocol.tokens import content_value


def draw_embeddings(
    old: Tensor, tokens: Sequence[str], seed: int, codebook: Tensor | None = None
) -> Tensor:
    """Draw rows around the mean of the old ones, as spread as these are.

    Each token is drawn by itself, but for those whose order is known: coordinates of boxes begin
    alike if they are near each other, depth codes if their vectors are. What is learned of one
    then holds for its neighbours at once (docs/decisions/008-ordered-tokens-begin-in-order.md).

    Args:
        old: ``[N, H]``, what there is.
        tokens: to draw rows for.
        seed: of what is drawn.
        codebook: ``[K, D]``, vectors of the depth codes; without it these are drawn like others.

    Returns:
        ``[len(tokens), H]`` float32.

    Raises:
        CheckpointError: if the codebook has fewer vectors than there are codes.
    """
    generator = torch.Generator().manual_seed(seed)
    width = old.shape[1]
    drawn = torch.randn(len(tokens), width, generator=generator)
    rows, pixels = _numbered(tokens, "boxes")
    if rows:
        drawn[rows] = _mix(_waves(max(pixels) + 1)[pixels], width, generator)
    rows, codes = _numbered(tokens, "depth")
    if rows and codebook is not None:
        if max(codes) >= len(codebook):
            raise CheckpointError(
                f"the codebook has {len(codebook)} vectors; there are {max(codes) + 1} codes"
            )
        drawn[rows] = _mix(codebook[codes].float().cpu(), width, generator)
    old = old.float()
    return drawn * old.std() + old.mean(0)


def _numbered(tokens: Sequence[str], kind: str) -> tuple[list[int], list[int]]:
    """Indices of the tokens of a kind of content, and what each of them names."""
    values = {row: content_value(token, kind) for row, token in enumerate(tokens)}
    named = {row: value for row, value in values.items() if value is not None}
    return [*named], [*named.values()]


def _waves(num: int) -> Tensor:
    """``[num, F]``: sines and cosines of a place, from half a wave over all down to ten places."""
    num_waves = max(1, 1 + math.floor(2 * math.log2(max(num / 5, 1))))
    frequencies = 0.5 * 2 ** (torch.arange(num_waves) / 2)
    angles = 2 * math.pi * frequencies * torch.arange(num)[:, None] / num
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _mix(vectors: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """``[N, D]`` vectors mixed at random into ``[N, width]`` of mean 0 and variance 1."""
    mixed = vectors @ torch.randn(vectors.shape[1], width, generator=generator)
    mixed = mixed - mixed.mean(0)
    return mixed / mixed.std().clamp(min=1e-6)
