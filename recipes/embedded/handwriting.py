"""Handwritten digits: scikit-learn's bundled UCI set, 1,797 real ones of 8x8 pixels.

https://archive.ics.uci.edu/dataset/80 (CC BY 4.0). No picture is in two splits.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from vpt.errors import PromptError

_HELD_OUT = 400
_SPLIT_SEED = 0


@lru_cache(maxsize=2)
def digit_pictures(split: str) -> dict[int, NDArray[np.uint8]]:
    """Digit -> ``[n, 8, 8]`` pictures, ink 255 on 0.

    Args:
        split: ``"train"`` or ``"heldout"``.

    Raises:
        PromptError: if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as exc:
        raise PromptError(
            "the handwritten digits are those of scikit-learn; install it: "
            "pip install scikit-learn, or the extra eval"
        ) from exc
    digits = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    chosen = order[:-_HELD_OUT] if split == "train" else order[-_HELD_OUT:]
    pictures = (digits.images * (255 / 16)).astype(np.uint8)
    return {
        digit: pictures[[i for i in chosen if digits.target[i] == digit]] for digit in range(10)
    }


def write_digit(
    digit: int, size_px: int, split: str, rng: np.random.Generator, halo_px: float = 0.0
) -> NDArray[np.float32]:
    """A handwritten digit, turned and sheared a little.

    Args:
        digit: 0 to 9.
        size_px: side of the square it is written in.
        split: whose pictures to use.
        rng: decides which one, and how it is bent.
        halo_px: if positive, the ink has a light edge of about this width, as engraving has. From
            far away ink and edge cancel out, so that only a close look can read it.

    Returns:
        ``[size_px, size_px]``: 1 is ink; with a halo around a mean of 0.
    """
    pictures = digit_pictures(split)[digit]
    picture = Image.fromarray(pictures[rng.integers(len(pictures))])
    scale = 8 / size_px
    angle, shear = rng.uniform(-0.12, 0.12), rng.uniform(-0.1, 0.1)
    a, b = scale * np.cos(angle), scale * (np.sin(angle) + shear)
    d, e = -scale * np.sin(angle), scale * np.cos(angle)
    middle = (size_px - 1) / 2
    ink = picture.transform(
        (size_px, size_px),
        Image.Transform.AFFINE,
        (a, b, 4 - a * middle - b * middle, d, e, 4 - d * middle - e * middle),
        Image.Resampling.BICUBIC,
    )
    values = np.asarray(ink, np.float32) / np.float32(255)
    if halo_px <= 0:
        return values
    blurred = ink.filter(ImageFilter.GaussianBlur(halo_px))
    return values - np.asarray(blurred, np.float32) / np.float32(255)
