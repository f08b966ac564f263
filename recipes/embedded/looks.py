"""Backgrounds: a form, a wall of signs, a shelf, a landscape; all drawn, none loaded."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]

LOOKS = ("form", "wall", "shelf", "scene")
_POOL = 24  # of each look


def background(look: str, size_px: int, split: str, rng: np.random.Generator) -> Array:
    """A picture to put things on, ``[size_px, size_px, 3]`` in 0..255.

    Each split has a pool of its own; what comes out of it is mirrored and lit at random.

    Args:
        look: one of ``LOOKS``.
        size_px: side.
        split: ``"train"`` or ``"heldout"``.
        rng: decides which.
    """
    picture = _pool(look, size_px, split)[rng.integers(_POOL)]
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    lit = picture * np.float32(rng.uniform(0.85, 1.05))
    lit += rng.uniform(-12, 8, 3).astype(np.float32)
    return lit


def grain(size_px: int, rng: np.random.Generator) -> Array:
    """The noise of a sensor, ``[size_px, size_px, 1]``: a window of a larger one drawn once."""
    noise = _noise()
    y, x = rng.integers(0, len(noise) - size_px, 2)
    return noise[y : y + size_px, x : x + size_px, None]


@lru_cache(maxsize=1)
def _noise() -> Array:
    return np.random.default_rng(0).normal(0, 2, (1024, 1024)).astype(np.float32)


@lru_cache(maxsize=16)
def _pool(look: str, size_px: int, split: str) -> list[Array]:
    rng = np.random.default_rng([LOOKS.index(look), size_px, split == "heldout"])
    return [_DRAWERS[look](size_px, rng) for _ in range(_POOL)]


def clouds(size_px: int, cells: int, rng: np.random.Generator) -> Array:
    """Smooth noise, ``[size_px, size_px]``, about -1..1, with ``cells`` bumps along a side."""
    coarse = Image.fromarray(rng.normal(0, 0.5, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size_px, size_px), Image.Resampling.BICUBIC), np.float32)


def _grain(size_px: int, strength: float, rng: np.random.Generator) -> Array:
    return rng.normal(0, strength, (size_px, size_px, 1)).astype(np.float32)


def _form(size_px: int, rng: np.random.Generator) -> Array:
    """Paper with ruled lines and a header bar."""
    paper = rng.uniform([225, 222, 205], [250, 247, 238]).astype(np.float32)
    out = paper + 10 * clouds(size_px, 5, rng)[..., None] + _grain(size_px, 2, rng)
    pitch, first = int(rng.integers(22, 40)), int(rng.integers(30, 60))
    for y in range(first, size_px, pitch):
        out[y : y + 2] -= np.asarray(rng.uniform([30, 20, 8], [60, 45, 30]), np.float32)
    if rng.random() < 0.7:
        x = int(rng.integers(20, 60))
        out[:, x : x + 2] -= np.array([10, 60, 60], np.float32)
    if rng.random() < 0.6:
        out[: int(rng.integers(10, 24))] = rng.uniform(60, 160, 3)
    return out


def _wall(size_px: int, rng: np.random.Generator) -> Array:
    """Bricks, or boards painted over."""
    base = rng.uniform([110, 90, 80], [190, 170, 160]).astype(np.float32)
    out = base + 14 * clouds(size_px, 7, rng)[..., None] + _grain(size_px, 3, rng)
    height, width = int(rng.integers(24, 44)), int(rng.integers(50, 96))
    for row, y in enumerate(range(0, size_px, height)):
        out[y : y + 3] += rng.uniform(15, 35)
        offset = (row % 2) * width // 2
        for x in range(offset, size_px, width):
            out[y : y + height, x : x + 3] += 22
            out[y : y + height, x : x + width] += rng.normal(0, 5)
    return out


def _shelf(size_px: int, rng: np.random.Generator) -> Array:
    """Wooden boards with a shadow under each."""
    wood = rng.uniform([120, 80, 45], [205, 160, 115]).astype(np.float32)
    veins = np.repeat(clouds(size_px, 40, rng)[:, :1].T, size_px, axis=0)
    veins = veins + 0.5 * clouds(size_px, 9, rng)
    out = wood + 12 * veins[..., None] + _grain(size_px, 2.5, rng)
    gap = int(rng.integers(90, 150))
    for y in range(int(rng.integers(40, gap)), size_px, gap):
        out[y : y + 9] += 28
        shadow = np.linspace(40, 0, 24, dtype=np.float32)[: max(size_px - y - 9, 0), None, None]
        out[y + 9 : y + 9 + len(shadow)] -= shadow
    return out


def _scene(size_px: int, rng: np.random.Generator) -> Array:
    """Sky over hills."""
    y = np.linspace(0, 1, size_px, dtype=np.float32)[:, None, None]
    top = rng.uniform([90, 130, 180], [150, 190, 235]).astype(np.float32)
    low = rng.uniform([200, 200, 200], [245, 235, 225]).astype(np.float32)
    out = top + (low - top) * y + 18 * clouds(size_px, 5, rng)[..., None]
    across = np.arange(size_px)
    for hill in range(int(rng.integers(2, 4))):
        ridge = size_px * (0.45 + 0.18 * hill) + size_px * 0.12 * clouds(size_px, 4, rng)[0]
        color = rng.uniform([70, 100, 60], [150, 165, 110]).astype(np.float32)
        ground = np.arange(size_px)[:, None] > ridge[None, across]
        texture = color + 14 * clouds(size_px, 30, rng)[..., None]
        out = np.where(ground[..., None], texture, out)
    return out + _grain(size_px, 2.5, rng)


_DRAWERS = {"form": _form, "wall": _wall, "shelf": _shelf, "scene": _scene}
