"""What is drawn on a card: fine lines, patterns, handwriting; and the shapes of things.

All are arrays of float32: textures in [-1, 1] around a mean of 0, masks in [0, 1].
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float32]

COLORS = {
    "red": (208, 38, 44),
    "orange": (242, 128, 24),
    "yellow": (238, 202, 40),
    "green": (36, 148, 68),
    "blue": (44, 84, 208),
    "purple": (138, 60, 176),
    "pink": (244, 142, 184),
    "black": (28, 28, 30),
}
LINES = ("horizontal", "vertical", "rising", "falling")
PATTERNS = ("dots", "checks", "waves", "rings")
SHAPES = ("circle", "square", "triangle", "star", "cross")

_DIAGONAL = 0.86
"""Diagonal waves are made shorter by this, since a square grid of pixels shows them longer."""


def texture(name: str, size_px: int, period_px: float, phase: float) -> Array:
    """A square of lines or of a pattern.

    Args:
        name: one of ``LINES`` or ``PATTERNS``.
        size_px: side of the square.
        period_px: length of a wave.
        phase: radians.

    Returns:
        ``[size_px, size_px]``.
    """
    y, x = np.mgrid[0:size_px, 0:size_px].astype(np.float32)
    turn = 2 * math.pi / period_px
    if name == "horizontal":
        return np.sin(turn * y + phase)
    if name == "vertical":
        return np.sin(turn * x + phase)
    rising, falling = (x + y) / math.sqrt(2), (x - y) / math.sqrt(2)
    diagonal = turn / _DIAGONAL
    if name == "rising":
        return np.sin(diagonal * rising + phase)
    if name == "falling":
        return np.sin(diagonal * falling + phase)
    if name == "dots":
        return (np.sin(turn * x + phase) + np.sin(turn * y + phase)) / 1.6
    if name == "checks":
        return (np.sin(diagonal * rising + phase) + np.sin(diagonal * falling + phase)) / 1.6
    if name == "rings":
        middle = (size_px - 1) / 2
        return np.sin(turn * np.hypot(x - middle, y - middle) + phase)
    if name == "waves":
        return np.sin(turn * y + phase + 1.4 * np.sin(turn * x / 2.5))
    raise ValueError(f"unknown texture {name!r}; available: {', '.join((*LINES, *PATTERNS))}")


@lru_cache(maxsize=256)
def shape_mask(name: str, size_px: int) -> Array:
    """``[size_px, size_px]``: 1 inside the shape, smooth at its edge."""
    scale = 4
    n = size_px * scale
    image = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(image)
    if name == "circle":
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
    elif name == "square":
        draw.rectangle((n * 0.06, n * 0.06, n * 0.94, n * 0.94), fill=255)
    elif name == "triangle":
        draw.polygon([(n / 2, 0), (n - 1, n * 0.95), (0, n * 0.95)], fill=255)
    elif name == "cross":
        draw.rectangle((n * 0.34, 0, n * 0.66, n), fill=255)
        draw.rectangle((0, n * 0.34, n, n * 0.66), fill=255)
    elif name == "star":
        corners = []
        for corner in range(10):
            radius = n / 2 if corner % 2 == 0 else n / 5
            angle = -math.pi / 2 + corner * math.pi / 5
            corners.append((n / 2 + radius * math.cos(angle), n / 2 + radius * math.sin(angle)))
        draw.polygon(corners, fill=255)
    else:
        raise ValueError(f"unknown shape {name!r}; available: {', '.join(SHAPES)}")
    small = image.resize((size_px, size_px), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)


@lru_cache(maxsize=256)
def card_mask(width_px: int, height_px: int, radius_px: int) -> Array:
    """``[height_px, width_px]``: a rectangle with round corners."""
    scale = 4
    image = Image.new("L", (width_px * scale, height_px * scale), 0)
    ImageDraw.Draw(image).rounded_rectangle(
        (0, 0, width_px * scale - 1, height_px * scale - 1), radius_px * scale, fill=255
    )
    small = image.resize((width_px, height_px), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)
