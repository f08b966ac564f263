"""Quality of a depth tokenizer: errors, use of the codebook, order of points, and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from vpt.depth.maps import Floats, fit_map
from vpt.depth.tokenizer import DepthTokenizer
from vpt.depth.vqvae import perplexity
from vpt.errors import DataError
from vpt.view.lettering import INK, PAPER, latin_font

_NUM_PAIRS = 200  # of points per map
_LEAST_GAP = 0.05  # between the two points' values

_ROWS = ("true", "decoded", "difference")
_NUM_DRAWN = 8
_LABEL_PX = 76
_GAP_PX = 4
_MOST_DIFFERENCE = 0.5  # and beyond, is drawn in the darkest red or blue


@dataclass(frozen=True, eq=False)
class MapScore:
    """Scores of one map.

    Attributes:
        codes: of the map.
        squared_error: mean over its pixels.
        absolute_error: mean over its pixels.
        flat_error: baseline: mean squared error of its mean.
        blocks_error: baseline: the same with the mean of each cell of the grid of codes.
        num_ordered: pairs that have the same order on the decoded map.
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
    """Scores of many maps; values of maps are 0 to 1.

    Attributes:
        num_maps: number of maps.
        mse: mean squared error.
        mse_spread: standard deviation of the errors of the maps.
        mae: mean absolute error.
        mse_flat: baseline: mean squared error of the mean of each map.
        mse_blocks: baseline: the same with the mean of each cell, unrounded.
        pair_order: share of point pairs in the right order; ``None`` if there are no pairs.
        num_codes: of the codebook.
        codes_used: codes that occur.
        perplexity: of their frequencies.
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
    """Encode and decode maps ``[H, W]`` of 0 to 1, and compare."""
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
    """Average scores.

    Raises:
        DataError: if there are none.
    """
    scores = list(scores)
    if not scores:
        raise DataError("there are no depth maps to measure on")

    def mean(name: str) -> float:
        return round(float(np.mean([getattr(score, name) for score in scores])), 6)

    codes = np.array([score.codes for score in scores]).ravel()
    counts = np.bincount(codes, minlength=num_codes)
    num_pairs = sum(score.num_pairs for score in scores)
    num_ordered = sum(score.num_ordered for score in scores)
    return Measured(
        num_maps=len(scores),
        mse=mean("squared_error"),
        mse_spread=round(float(np.std([score.squared_error for score in scores])), 6),
        mae=mean("absolute_error"),
        mse_flat=mean("flat_error"),
        mse_blocks=mean("blocks_error"),
        pair_order=round(num_ordered / num_pairs, 4) if num_pairs else None,
        num_codes=num_codes,
        codes_used=int((counts > 0).sum()),
        perplexity=round(perplexity(torch.from_numpy(counts)), 2),
    )


def measured_words(measured: Measured) -> str:
    """The scores as lines of text."""
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


def _count_ordered(true: Floats, decoded: Floats, rng: np.random.Generator) -> tuple[int, int]:
    """Pairs in the same order, and all pairs that have an order."""
    one, other = rng.integers(true.size, size=(2, _NUM_PAIRS))
    gap = true.flat[one] - true.flat[other]
    clear = np.abs(gap) >= _LEAST_GAP
    agree = np.sign(decoded.flat[one] - decoded.flat[other]) == np.sign(gap)
    return int((agree & clear).sum()), int(clear.sum())


# Picture


def draw_reconstructions(
    tokenizer: DepthTokenizer, maps: Sequence[Floats], side_px: int = 160
) -> Image.Image:
    """Draw maps ``[H, W]`` of 0 to 1, one per column, above their decoded ones; near is bright.

    Differences are red where the decoded map is too near, blue where it is too far.

    Args:
        tokenizer: to show.
        maps: to encode and decode.
        side_px: of each map in the picture.

    Returns:
        An RGB picture.

    Raises:
        DataError: if there are no maps.
    """
    if not maps:
        raise DataError("there are no depth maps to draw")
    step = side_px + _GAP_PX
    picture = Image.new("RGB", (_LABEL_PX + len(maps) * step, len(_ROWS) * step), PAPER)
    pen = ImageDraw.Draw(picture)
    for row, name in enumerate(_ROWS):
        pen.text((4, row * step + side_px // 2), name, INK, latin_font(13), anchor="lm")
    for column, depth in enumerate(maps):
        true = fit_map(depth, tokenizer.config.size_px)
        decoded = tokenizer.decode(tokenizer.encode(true))
        for row, drawn in enumerate((_grey(true), _grey(decoded), _signed(decoded - true))):
            small = drawn.resize((side_px, side_px), Image.Resampling.BOX)
            picture.paste(small, (_LABEL_PX + column * step, row * step))
    return picture


def spread(files: Sequence[Path]) -> list[Path]:
    """A few files, evenly spaced in the list."""
    return list(files[:: max(1, len(files) // _NUM_DRAWN)][:_NUM_DRAWN])


def _grey(depth: Floats) -> Image.Image:
    return Image.fromarray(np.rint(depth * 255).astype(np.uint8)).convert("RGB")


def _signed(difference: Floats) -> Image.Image:
    """White for 0, red above, blue below."""
    strength = np.clip(difference / _MOST_DIFFERENCE, -1, 1)
    fade = 1 - np.abs(strength)
    red, blue = np.where(strength < 0, fade, 1), np.where(strength > 0, fade, 1)
    return Image.fromarray(np.rint(np.stack([red, fade, blue], -1) * 255).astype(np.uint8))
