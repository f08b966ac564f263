"""Pixels of the grounding branch: an image in, and a box back to the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SHORTEST_EDGE_PX, LONGEST_EDGE_PX = 800, 1333
IMAGE_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGE_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


Pixels = np.ndarray[Any, np.dtype[np.float32]]


def resize(image: Image.Image) -> Image.Image:
    """Resize as ``RandomResize([800], max_size=1333)`` of groundingdino/datasets/transforms.py."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    edge = SHORTEST_EDGE_PX
    if long / short * edge > LONGEST_EDGE_PX:
        edge = round(LONGEST_EDGE_PX * short / long)
    if short == edge:
        return image
    scaled = int(edge * long / short)
    size = (edge, scaled) if width < height else (scaled, edge)
    return image.resize(size, Image.Resampling.BILINEAR)


def normalise(image: Image.Image) -> Pixels:
    """Turn an RGB image into ``[3, h, w]``, each channel with about zero mean and unit spread."""
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)  # [h, w, 3]
    return np.ascontiguousarray(((pixels - IMAGE_MEAN) / IMAGE_STD).transpose(2, 0, 1))


def to_pixels(box_cxcywh: Sequence[float], size_wh: tuple[int, int]) -> tuple[int, int, int, int]:
    """Round outwards to whole pixels inside the image, at least one wide and high."""
    edges = []
    for centre, extent, size in zip(box_cxcywh[:2], box_cxcywh[2:], size_wh, strict=True):
        low = math.floor((centre - extent / 2) * size)
        high = math.ceil((centre + extent / 2) * size)
        low = min(max(low, 0), size - 1)
        edges.append((low, min(max(high, low + 1), size)))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def pad(arrays: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
    """Batch images of several sizes, padded right and bottom to the largest.

    Args:
        arrays: ``[3, h, w]`` each.

    Returns:
        ``[B, 3, H, W]`` float32, zeros where padded, and ``[B, H, W]`` bool, False there.
    """
    height = max(array.shape[1] for array in arrays)
    width = max(array.shape[2] for array in arrays)
    pixel_values = torch.zeros(len(arrays), 3, height, width)
    pixel_mask = torch.zeros(len(arrays), height, width, dtype=torch.bool)
    for i, array in enumerate(arrays):
        pixel_values[i, :, : array.shape[1], : array.shape[2]] = torch.from_numpy(array)
        pixel_mask[i, : array.shape[1], : array.shape[2]] = True
    return pixel_values, pixel_mask
