"""One picture of what a depth tokenizer keeps: true maps, decoded ones, and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vpt.depth.maps import Floats, fit_map
from vpt.depth.tokenizer import DepthTokenizer
from vpt.errors import DataError
from vpt.view.lettering import INK, PAPER, latin_font

ROWS = ("true", "decoded", "difference")

_NUM_DRAWN = 8
_LABEL_PX = 76
_GAP_PX = 4
_MOST_DIFFERENCE = 0.5  # and beyond, is drawn in the darkest red or blue


def draw_reconstructions(
    tokenizer: DepthTokenizer, maps: Sequence[Floats], side_px: int = 160
) -> Image.Image:
    """Draw maps above what comes back from their codes; near is bright.

    Differences are red where the decoded map is too near, blue where it is too far.

    Args:
        tokenizer: to look at.
        maps: ``[H, W]`` each, 0 to 1; one column each.
        side_px: of each map in the picture.

    Returns:
        RGB.

    Raises:
        DataError: if there are no maps.
    """
    if not maps:
        raise DataError("there are no depth maps to draw")
    step = side_px + _GAP_PX
    picture = Image.new("RGB", (_LABEL_PX + len(maps) * step, len(ROWS) * step), PAPER)
    pen = ImageDraw.Draw(picture)
    for row, name in enumerate(ROWS):
        pen.text((4, row * step + side_px // 2), name, INK, latin_font(13), anchor="lm")
    for column, depth in enumerate(maps):
        true = fit_map(depth, tokenizer.config.size_px)
        decoded = tokenizer.decode(tokenizer.encode(true))
        for row, drawn in enumerate((_grey(true), _grey(decoded), _signed(decoded - true))):
            small = drawn.resize((side_px, side_px), Image.Resampling.BOX)
            picture.paste(small, (_LABEL_PX + column * step, row * step))
    return picture


def spread(files: Sequence[Path]) -> list[Path]:
    """A few out of a long list, evenly."""
    return list(files[:: max(1, len(files) // _NUM_DRAWN)][:_NUM_DRAWN])


def _grey(depth: Floats) -> Image.Image:
    return Image.fromarray(np.rint(depth * 255).astype(np.uint8)).convert("RGB")


def _signed(difference: Floats) -> Image.Image:
    """White for none, red above, blue below."""
    strength = np.clip(difference / _MOST_DIFFERENCE, -1, 1)
    fade = 1 - np.abs(strength)
    red, blue = np.where(strength < 0, fade, 1), np.where(strength > 0, fade, 1)
    return Image.fromarray(np.rint(np.stack([red, fade, blue], -1) * 255).astype(np.uint8))
