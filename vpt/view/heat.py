"""Where a branch looked: its scores as colours over a photo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vpt.boxes import Box, clamp
from vpt.branches.base import branch_class
from vpt.errors import PromptError
from vpt.protocol.tokens import BRANCH_TOKENS
from vpt.trace.records import CallRecord, Trace
from vpt.view.lettering import INK, PAPER, QUIET, SHADE, latin_font

# Eleven steps of viridis, even in lightness (Smith and van der Walt, CC0,
# https://bids.github.io/colormap); between them colours are interpolated.
VIRIDIS = (
    *((68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140)),
    *((34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37)),
)
HEAT_SHARE = 0.62  # of the colour, over the photo in grey


def seen_box_px(
    branch: str, size_wh: tuple[int, int], preprocess: Mapping[str, Any] | None = None
) -> Box:
    """The part of an image that the features of a branch cover.

    Args:
        preprocess: settings of the branch that differ from the released ones.

    Returns:
        XYXY in pixels of the image, not rounded. With padding it reaches beyond the image.

    Raises:
        PromptError: for an unknown branch.
    """
    if branch not in BRANCH_TOKENS:
        raise PromptError(f"unknown branch {branch!r}; available: {', '.join(BRANCH_TOKENS)}")
    return branch_class(BRANCH_TOKENS[branch].home).seen_box_px(size_wh, preprocess)


def score_map(call: CallRecord) -> NDArray[np.float32] | None:
    """The scores of a call as ``[h, w]``; a ``PromptError`` if they do not fit the grid."""
    if not call.scores or call.grid_hw is None:
        return None
    if len(call.scores) != math.prod(call.grid_hw):
        raise PromptError(
            f"the trace holds {len(call.scores)} scores for a grid of "
            f"{call.grid_hw[0]}x{call.grid_hw[1]}; expected one per place"
        )
    return np.asarray(call.scores, dtype=np.float32).reshape(call.grid_hw)


def seen_of_call(trace: Trace, call: CallRecord) -> Box:
    """The part of its image that a call's features cover, as of :func:`seen_box_px`."""
    preprocess = trace.model.get("preprocess", {}).get(call.branch)
    return seen_box_px(call.branch, trace.images[call.image].size_wh, preprocess)


def heat_over(
    photo: Image.Image, scores: NDArray[np.float32], seen_box: Box
) -> tuple[Image.Image, float, float]:
    """Draw a score map over the part of a photo that its features cover.

    Args:
        photo: RGB.
        scores: ``[h, w]``; what is not finite is drawn as the lowest.
        seen_box: XYXY in pixels of the photo, the extent of the map; may reach beyond the photo.

    Returns:
        The photo in grey under the colours, pale where the map does not reach; the lowest and
        the highest score on it, which are the ends of the colour scale.
    """
    x0, y0, x1, y1 = clamp(seen_box, photo.size)
    left, top = min(round(x0), photo.width - 1), min(round(y0), photo.height - 1)
    right, bottom = max(round(x1), left + 1), max(round(y1), top + 1)
    # The same part in cells of the map; never empty, never outside.
    grid_wh = np.array(scores.shape[::-1])
    origin, end = np.array(seen_box).reshape(2, 2)
    scale = grid_wh / (end - origin)
    u0, v0 = np.clip((np.array((left, top)) - origin) * scale, 0, grid_wh - 1e-3)
    u1, v1 = np.clip((np.array((right, bottom)) - origin) * scale, (u0 + 1e-3, v0 + 1e-3), grid_wh)
    part = scores[math.floor(v0) : math.ceil(v1), math.floor(u0) : math.ceil(u1)]
    finite = part[np.isfinite(part)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    clean = np.clip(np.where(np.isfinite(scores), scores, low), low, high).astype(np.float32)
    smooth = Image.fromarray(clean).resize(
        (right - left, bottom - top), Image.Resampling.BILINEAR, box=(u0, v0, u1, v1)
    )
    share = (np.asarray(smooth) - low) / ((high - low) or 1)
    grey = photo.convert("L").convert("RGB")
    result = Image.blend(grey, Image.new("RGB", photo.size, PAPER), 0.55)
    inside = grey.crop((left, top, right, bottom))
    result.paste(Image.blend(inside, coloured(share), HEAT_SHARE), (left, top))
    if inside.size != photo.size:
        frame = (left, top, right - 1, bottom - 1)
        ImageDraw.Draw(result).rectangle(frame, outline=INK, width=max(photo.width // 200, 1))
    return result, low, high


def colour_bar(ends: tuple[str, str], size_wh: tuple[int, int]) -> Image.Image:
    """Draw the colour scale, with a text at its low and its high end."""
    bar, font = Image.new("RGB", size_wh, SHADE), latin_font(13)
    pen, middle = ImageDraw.Draw(bar), size_wh[1] // 2
    pen.text((8, middle), ends[0], QUIET, font, anchor="lm")
    pen.text((size_wh[0] - 8, middle), ends[1], QUIET, font, anchor="rm")
    start, end = (math.ceil(font.getlength(text)) + 16 for text in ends)
    if (length := size_wh[0] - start - end) > 0:
        ramp = np.broadcast_to(np.linspace(0, 1, length), (10, length))
        bar.paste(coloured(ramp), (start, middle - 5))
    return bar


def coloured(share: NDArray[Any]) -> Image.Image:
    """Draw values in [0, 1], ``[H, W]``, in viridis: low is violet, high is yellow."""
    steps = np.linspace(0, 1, len(VIRIDIS))
    mixed = [np.interp(share, steps, channel) for channel in zip(*VIRIDIS, strict=True)]
    return Image.fromarray(np.stack(mixed, axis=-1).round().astype(np.uint8))
