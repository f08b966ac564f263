"""Sheets: pictures crowded with tags and tiles, from which vision parts learn faster."""

from __future__ import annotations

import numpy as np
from PIL import Image

from recipes.embedded.looks import LOOKS, Array, background, grain
from recipes.embedded.marks import COLORS
from recipes.embedded.scenes import (
    FAMILIES,
    SIZE_PX,
    TILE_PX,
    Item,
    Scene,
    draw_tag,
    draw_tile,
    random_value,
    tag_places,
)

CLOSE_PX = 168
"""Side of what a crop of 3x3 cells shows."""


def far_sheet(rng: np.random.Generator, split: str) -> Scene:
    """A picture full of tags, colors repeated."""
    canvas, look = _canvas(rng, split, SIZE_PX)
    items = [
        draw_tag(
            canvas, place, str(rng.choice(list(COLORS))), str(rng.choice(FAMILIES)), rng, split
        )
        for place in tag_places(rng)[: rng.integers(8, 19)]
    ]
    return Scene("tags", look, _finish(canvas, rng), tuple(items))


def close_sheet(rng: np.random.Generator, split: str) -> Scene:
    """A piece of a picture as large as a crop, full of tiles."""
    canvas, look = _canvas(rng, split, CLOSE_PX)
    if rng.random() < 0.7:
        canvas[:] = rng.uniform(212, 240, 3)
    pitch = CLOSE_PX // 3
    items = []
    for place in range(9):
        if rng.random() < 0.1:
            continue
        x, y = (
            at * pitch + (pitch - TILE_PX) // 2 + int(rng.integers(-3, 4))
            for at in (place % 3, place // 3)
        )
        family = str(rng.choice(FAMILIES, p=(0.2, 0.2, 0.6)))
        value = random_value(family, rng)
        tile = draw_tile(family, value, TILE_PX, True, rng, split)
        canvas[y : y + TILE_PX, x : x + TILE_PX] = tile[..., None]
        box = (x, y, x + TILE_PX, y + TILE_PX)
        items.append(Item("tag", "black", family, value, True, box, box))
    return Scene("tags", look, _finish(canvas, rng), tuple(items))


def _canvas(rng: np.random.Generator, split: str, size_px: int) -> tuple[Array, str]:
    look = str(rng.choice(LOOKS))
    return background(look, size_px, split, rng), look


def _finish(canvas: Array, rng: np.random.Generator) -> Image.Image:
    canvas = canvas + grain(len(canvas), rng)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
