"""A depth map that the model wrote, in the colours of the score maps: far is low, near is high."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vpt.trace.records import ContentRecord
from vpt.view.album import read_data_uri
from vpt.view.heat import coloured


def depth_picture(content: ContentRecord, size_wh: tuple[int, int]) -> Image.Image | None:
    """Draw a map in the shape of its image, to which it was square.

    Args:
        content: of kind ``"depth"``.
        size_wh: ``(W, H)`` of the image.

    Returns:
        RGB, as wide and high as the kept map where the image is so; ``None`` if there is no map.

    Raises:
        ImageError: if it is damaged.
    """
    if content.picture is None:
        return None
    grey = np.asarray(read_data_uri(content.picture, "the depth map").convert("L"))
    side, longest = max(grey.shape), max(size_wh)
    shown_wh = (max(side * size_wh[0] // longest, 1), max(side * size_wh[1] // longest, 1))
    return coloured(grey / 255).resize(shown_wh, Image.Resampling.BILINEAR)


def why_no_picture(content: ContentRecord) -> str:
    """Say why a depth map cannot be drawn."""
    if not content.is_whole:
        return "cut off at the token limit"
    return "codes only: no depth tokenizer"
