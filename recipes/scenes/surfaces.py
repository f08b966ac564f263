"""What surfaces of generated scenes look like: patterns in metres, and grain."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_TILE = 256  # side of the noise, which repeats beyond
_TILE_M = 4.0  # metres that it covers
_OCTAVES = (4, 8, 16, 32, 64)


@cache
def noise_tile() -> Floats:
    """Smooth noise that can be laid side by side.

    Returns:
        ``[256, 256]``, mean 0, standard deviation 1. The same in every process; do not write to it.
    """
    rng = np.random.default_rng(7)
    spectrum = np.fft.rfft2(rng.standard_normal((_TILE, _TILE)))
    across = np.fft.fftfreq(_TILE)[:, None] * _TILE
    along = np.fft.rfftfreq(_TILE)[None, :] * _TILE
    radius = np.hypot(across, along)
    weight = sum(np.exp(-((radius / octave) ** 2)) / octave for octave in _OCTAVES)
    weight[0, 0] = 0
    tile = np.fft.irfft2(spectrum * weight, s=(_TILE, _TILE))
    tile = ((tile - tile.mean()) / tile.std()).astype(np.float32)
    tile.flags.writeable = False
    return tile


@cache
def grain_tile() -> Floats:
    """Noise of a camera.

    Returns:
        ``[512, 512]``, mean 0, standard deviation 1. The same in every process; do not write to it.
    """
    tile = np.random.default_rng(8).standard_normal((512, 512), dtype=np.float32)
    tile.flags.writeable = False
    return tile


def _cloudy(u: Floats, v: Floats) -> Floats:
    scale = np.float32(_TILE / _TILE_M)
    rows = (v * scale).astype(np.int32) & (_TILE - 1)
    columns = (u * scale).astype(np.int32) & (_TILE - 1)
    return noise_tile()[rows, columns]


def _checkered(u: Floats, v: Floats) -> Floats:
    odd = (np.floor(u).astype(np.int32) + np.floor(v).astype(np.int32)) & 1
    return (odd * 2 - 1).astype(np.float32) + 0.3 * _cloudy(u, v)


def _planked(u: Floats, v: Floats) -> Floats:
    plank = np.floor(u * 3).astype(np.int32)
    gap = (u * 3 - plank) < 0.08
    tone = ((plank * 37) % 7).astype(np.float32) / 3 - 1
    return np.where(gap, np.float32(-2), tone) + 0.3 * _cloudy(v, u)


def _bricked(u: Floats, v: Floats) -> Floats:
    row = np.floor(v * 4).astype(np.int32)
    along = u * 2 + 0.5 * (row & 1)
    joint = ((v * 4 - row) < 0.14) | ((along - np.floor(along)) < 0.07)
    return np.where(joint, np.float32(1.6), np.float32(-0.4)) + 0.4 * _cloudy(u, v)


PATTERNS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "cloudy": _cloudy,
    "checkered": _checkered,
    "planked": _planked,
    "bricked": _bricked,
}
"""Name -> brightness at ``(u, v)`` metres along a surface; about 0, about -2 to 2."""
