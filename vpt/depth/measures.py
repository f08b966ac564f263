"""How well a depth tokenizer keeps maps: errors, use of the codebook, order of points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vpt.depth.codebook import perplexity
from vpt.depth.maps import Floats, fit_map
from vpt.depth.tokenizer import DepthTokenizer
from vpt.errors import DataError

_NUM_PAIRS = 200  # of points per map
_LEAST_GAP = 0.05  # between the two points' values


@dataclass(frozen=True, eq=False)
class MapScore:
    """What became of one map.

    Attributes:
        codes: that it was encoded to.
        squared_error: mean over its pixels.
        absolute_error: mean over its pixels.
        flat_error: mean squared error of a map that has its mean everywhere.
        blocks_error: the same of its mean in every cell of the grid of codes: what as many
            numbers, instead of codes, could tell.
        num_ordered: of the point pairs, those that the decoded map has in the same order.
        num_pairs: pairs of random points whose values differ by at least 0.05.
    """

    codes: tuple[int, ...]
    squared_error: float
    absolute_error: float
    flat_error: float
    blocks_error: float
    num_ordered: int
    num_pairs: int


@dataclass(frozen=True)
class Measured:
    """Scores of many maps together; values of maps are 0 to 1.

    Attributes:
        num_maps: how many.
        mse: mean squared error.
        mse_spread: standard deviation of the maps' own errors.
        mae: mean absolute error.
        mse_flat: with each map's mean instead.
        mse_blocks: with the means of the cells instead, unrounded.
        pair_order: share of point pairs in the right order; ``None`` if there are no pairs.
        num_codes: of the codebook.
        codes_used: how many occurred.
        perplexity: how many equally frequent codes would be as varied.
    """

    num_maps: int
    mse: float
    mse_spread: float
    mae: float
    mse_flat: float
    mse_blocks: float
    pair_order: float | None
    num_codes: int
    codes_used: int
    perplexity: float


def score_maps(tokenizer: DepthTokenizer, maps: Iterable[Floats]) -> Iterator[MapScore]:
    """Encode and decode maps, and compare.

    Args:
        tokenizer: to measure.
        maps: ``[H, W]`` each, 0 to 1.
    """
    side, grid = tokenizer.config.size_px, tokenizer.config.grid_size
    cell = side // grid
    for number, depth in enumerate(maps):
        true = fit_map(depth, side)
        codes = tokenizer.encode(true)
        decoded = tokenizer.decode(codes)
        means = true.reshape(grid, cell, grid, cell).mean((1, 3))
        blocks = np.kron(means, np.ones((cell, cell), np.float32))
        num_ordered, num_pairs = _count_ordered(true, decoded, np.random.default_rng([5, number]))
        yield MapScore(
            codes=codes,
            squared_error=float(np.square(decoded - true).mean()),
            absolute_error=float(np.abs(decoded - true).mean()),
            flat_error=float(true.var()),
            blocks_error=float(np.square(blocks - true).mean()),
            num_ordered=num_ordered,
            num_pairs=num_pairs,
        )


def summarise(scores: Iterable[MapScore], num_codes: int) -> Measured:
    """Take scores together.

    Args:
        scores: of at least one map.
        num_codes: of the codebook.

    Raises:
        DataError: if there are none.
    """
    scores = list(scores)
    if not scores:
        raise DataError("there are no depth maps to measure on")
    errors = np.array([score.squared_error for score in scores])
    codes = np.array([score.codes for score in scores]).ravel()
    counts = np.bincount(codes, minlength=num_codes)
    num_pairs = sum(score.num_pairs for score in scores)
    num_ordered = sum(score.num_ordered for score in scores)
    return Measured(
        num_maps=len(scores),
        mse=round(float(errors.mean()), 6),
        mse_spread=round(float(errors.std()), 6),
        mae=round(float(np.mean([score.absolute_error for score in scores])), 6),
        mse_flat=round(float(np.mean([score.flat_error for score in scores])), 6),
        mse_blocks=round(float(np.mean([score.blocks_error for score in scores])), 6),
        pair_order=round(num_ordered / num_pairs, 4) if num_pairs else None,
        num_codes=num_codes,
        codes_used=int((counts > 0).sum()),
        perplexity=round(perplexity(torch.from_numpy(counts)), 2),
    )


def measured_words(measured: Measured) -> str:
    """Lines of what was measured, for a person."""
    lines = [
        f"held-out maps  {measured.num_maps}",
        f"mse            {measured.mse:.5f} (sd {measured.mse_spread:.5f} between maps)",
        f"mae            {measured.mae:.4f}",
        f"mse instead    {measured.mse_flat:.5f} with the mean of each map",
        f"               {measured.mse_blocks:.5f} with the mean of each cell, unrounded",
    ]
    if measured.pair_order is not None:
        lines.append(f"pair order     {measured.pair_order:.1%} of point pairs stay in order")
    lines.append(f"codes used     {measured.codes_used} of {measured.num_codes}")
    lines.append(f"perplexity     {measured.perplexity:.1f}")
    return "\n".join(lines)


def _count_ordered(
    true: NDArray[np.float32], decoded: NDArray[np.float32], rng: np.random.Generator
) -> tuple[int, int]:
    """Pairs in the same order, and all pairs that have an order."""
    one, other = rng.integers(true.size, size=(2, _NUM_PAIRS))
    gap = true.flat[one] - true.flat[other]
    clear = np.abs(gap) >= _LEAST_GAP
    agree = np.sign(decoded.flat[one] - decoded.flat[other]) == np.sign(gap)
    return int((agree & clear).sum()), int(clear.sum())
