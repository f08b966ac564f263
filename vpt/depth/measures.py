"""Quality of a depth tokenizer: errors, use of the codebook, order of points, and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True)
class Measured:
    """Scores of many maps; values of maps are 0 to 1."""

    num_maps: int
    mse: float
    mse_spread: float  # standard deviation of the errors of the maps
    mae: float
    mse_flat: float  # baseline: the mean of each map
    mse_blocks: float  # baseline: the mean of each cell of the grid of codes, unrounded
    pair_order: float | None  # share of point pairs in the right order, if there are pairs
    num_codes: int
    codes_used: int
    perplexity: float  # of the frequencies of codes


def measure(tokenizer: DepthTokenizer, maps: Iterable[Floats]) -> Measured:
    """Encode and decode maps ``[H, W]`` of 0 to 1, and compare; `DataError` for no maps."""
    config = tokenizer.config
    side, grid, cell = config.size_px, config.grid_size, config.size_px // config.grid_size
    counts = np.zeros(config.num_codes, np.int64)
    errors, pairs = [], []  # one row per map
    for number, depth in enumerate(maps):
        true = fit_map(depth, side)
        codes = tokenizer.encode(true)
        counts += np.bincount(codes, minlength=config.num_codes)
        decoded = tokenizer.decode(codes)
        means = true.reshape(grid, cell, grid, cell).mean((1, 3))
        blocks = np.kron(means, np.ones((cell, cell), np.float32))
        squared = [float(np.square(other - true).mean()) for other in (decoded, blocks)]
        errors.append((*squared, float(np.abs(decoded - true).mean()), float(true.var())))
        pairs.append(_count_ordered(true, decoded, np.random.default_rng([5, number])))
    if not errors:
        raise DataError("there are no depth maps to measure on")
    mse, mse_blocks, mae, mse_flat = (round(float(e), 6) for e in np.mean(errors, axis=0))
    num_ordered, num_pairs = (int(number) for number in np.sum(pairs, axis=0))
    return Measured(
        num_maps=len(errors),
        mse=mse,
        mse_spread=round(float(np.std(errors, axis=0)[0]), 6),
        mae=mae,
        mse_flat=mse_flat,
        mse_blocks=mse_blocks,
        pair_order=round(num_ordered / num_pairs, 4) if num_pairs else None,
        num_codes=config.num_codes,
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
