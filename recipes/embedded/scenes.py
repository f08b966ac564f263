"""Scenes: pictures of things that can be asked about, with a record of what is where.

There are three kinds. On *tags* stands something too small for the first look; on *boards*
something large, coarse enough to be seen at once, or so fine that only a sharper encoder sees it;
*things* are plain shapes, few or many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recipes.embedded.handwriting import write_digit
from recipes.embedded.looks import LOOKS, background, clouds, grain
from recipes.embedded.marks import COLORS, LINES, PATTERNS, SHAPES, card_mask, shape_mask, texture
from vpt.boxes import Box
from vpt.protocol.tokens import RELEASED_GRID_SIZE

SIZE_PX = 448
TILE_PX = 34
TAG_PX = (83, 44)  # width, height of a tag: a colored mark left, the tile right
FINE_PX = (4.4, 5.1)  # wave length that no first look (112 px) can show; a closer one can
COARSE = (4.0, 5.5)  # waves across a board that the first look does show
GRAY = 152.0
_CONTRAST = 58.0
_JITTER_PX = 3  # of tags
_GRID = 4  # places for things along a side

KINDS = ("tags", "boards", "things")
FAMILIES = ("lines", "pattern", "number")
"""What can be read on a tag or board."""


@dataclass(frozen=True)
class Item:
    """Something in a scene.

    Attributes:
        kind: ``"tag"``, ``"board"`` or ``"thing"``.
        color: key of ``COLORS``; no two items of a scene share one.
        family: of ``FAMILIES``, or ``"shape"`` for a thing.
        value: what it shows: one of ``LINES``, ``PATTERNS``, ``SHAPES``, or a digit.
        fine: whether the first look cannot show the value.
        box: XYXY in pixels, of the whole item.
        tile: XYXY in pixels, of what there is to read.
    """

    kind: str
    color: str
    family: str
    value: str
    fine: bool
    box: Box
    tile: Box

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the tile, ``(x, y)`` in pixels."""
        x0, y0, x1, y1 = self.tile
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def phrase(self) -> str:
        """The phrase that names it in its scene."""
        return f"the {self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        kind: one of ``KINDS``.
        look: one of ``LOOKS``.
        image: ``SIZE_PX`` square, RGB.
        items: in no order.
    """

    kind: str
    look: str
    image: Image.Image
    items: tuple[Item, ...]


def draw_scene(rng: np.random.Generator, split: str, kind: str | None = None) -> Scene:
    """Draw a scene.

    Args:
        rng: decides everything.
        split: ``"train"`` or ``"heldout"``: whose backgrounds and handwriting.
        kind: one of ``KINDS``; at random if missing.
    """
    kind = kind or str(rng.choice(KINDS, p=(0.5, 0.3, 0.2)))
    look = str(rng.choice(LOOKS))
    canvas = background(look, SIZE_PX, split, rng)
    items = {"tags": _tags, "boards": _boards, "things": _things}[kind](canvas, rng, split)
    canvas += grain(SIZE_PX, rng)
    pixels = np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
    return Scene(kind, look, Image.fromarray(pixels), tuple(items))


def draw_tile(
    family: str,
    value: str,
    size_px: int,
    fine: bool,
    rng: np.random.Generator,
    split: str,
) -> NDArray[np.float32]:
    """What stands on a tag or board, ``[size_px, size_px]`` in 0..255."""
    gray: Any = GRAY + rng.uniform(-8, 8)
    if family == "number":
        gray += 8 * clouds(size_px, max(size_px // 5, 4), rng)
        side = 30 if fine else int(size_px * rng.uniform(0.75, 0.9))
        ink = write_digit(int(value), side, split, rng, halo_px=2.2 if fine else 0.0)
        if fine:
            ink = np.clip(ink * (1.2 / max(float(ink.max()), 1e-6)), -0.7, 1.0)
        tile = np.broadcast_to(np.asarray(gray, np.float32), (size_px, size_px)).copy()
        room = size_px - side
        slack = min(room // 2, 3)
        y, x = (int(room // 2 + d) for d in rng.integers(-slack, slack + 1, 2))
        tile[y : y + side, x : x + side] -= 125 * ink
        return tile
    period = rng.uniform(*FINE_PX) if fine else size_px / rng.uniform(*COARSE)
    waves = texture(value, size_px, period, rng.uniform(0, 2 * np.pi))
    return (gray + _CONTRAST * waves).astype(np.float32)


def random_value(family: str, rng: np.random.Generator) -> str:
    """A value of a family, all equally likely."""
    values: Sequence[str] = {
        "lines": LINES,
        "pattern": PATTERNS,
        "number": tuple("0123456789"),
        "shape": SHAPES,
    }[family]
    return str(rng.choice(values))


def draw_tag(
    canvas: NDArray[np.float32],
    center: tuple[int, int],
    color: str,
    family: str,
    rng: np.random.Generator,
    split: str,
) -> Item:
    """Draw a tag whose tile has its middle at ``(x, y)``; the tile is always fine."""
    width, height = TAG_PX
    tile_x, tile_y = center[0] - TILE_PX // 2, center[1] - TILE_PX // 2
    x, y = tile_x - 44, center[1] - height // 2
    _lay(canvas, card_mask(width, height, 6), (x, y), rng.uniform(212, 240, 3))
    mark = int(rng.integers(25, 31))
    shape = shape_mask(str(rng.choice(SHAPES[:2])), mark)
    _lay(canvas, shape, (x + 22 - mark // 2, center[1] - mark // 2), _shade(color, rng))
    value = random_value(family, rng)
    tile = draw_tile(family, value, TILE_PX, True, rng, split)
    canvas[tile_y : tile_y + TILE_PX, tile_x : tile_x + TILE_PX] = tile[..., None]
    return Item(
        kind="tag",
        color=color,
        family=family,
        value=value,
        fine=True,
        box=(x, y, x + width, y + height),
        tile=(tile_x, tile_y, tile_x + TILE_PX, tile_y + TILE_PX),
    )


def tag_places(rng: np.random.Generator) -> list[tuple[int, int]]:
    """Where tiles of tags can be without any tag over another, shuffled: ``(x, y)`` in pixels.

    They stand near the middles of cells of the region grid, none at the border, so that the crop
    of a cell shows the whole tag.
    """
    cell = SIZE_PX // RELEASED_GRID_SIZE
    places = []
    for row in range(1, RELEASED_GRID_SIZE - 1):
        first = int(rng.integers(1, 3))
        for column in range(first, RELEASED_GRID_SIZE - 1, 2):
            shift = rng.integers(-_JITTER_PX, _JITTER_PX + 1, 2)
            x, y = (
                cell * at + cell // 2 + int(d) for at, d in zip((column, row), shift, strict=True)
            )
            places.append((x, y))
    return [places[i] for i in rng.permutation(len(places))]


def _tags(canvas: NDArray[np.float32], rng: np.random.Generator, split: str) -> list[Item]:
    """Three to six tags."""
    colors = _colors(int(rng.integers(3, 7)), rng)
    places = tag_places(rng)[: len(colors)]
    return [
        draw_tag(canvas, place, color, str(rng.choice(FAMILIES, p=(0.4, 0.2, 0.4))), rng, split)
        for color, place in zip(colors, places, strict=True)
    ]


def _boards(canvas: NDArray[np.float32], rng: np.random.Generator, split: str) -> list[Item]:
    """Two or three boards with a frame each; lines and patterns are fine or coarse."""
    colors = _colors(int(rng.integers(2, 4)), rng)
    quarters = rng.permutation(4)[: len(colors)]
    half = SIZE_PX // 2
    items = []
    for color, quarter in zip(colors, quarters, strict=True):
        side, frame = int(rng.integers(148, 196)), 18
        x = int(quarter) % 2 * half + int(rng.integers(4, half - side - 3))
        y = int(quarter) // 2 * half + int(rng.integers(4, half - side - 3))
        family = str(rng.choice(FAMILIES, p=(0.38, 0.38, 0.24)))
        fine = family != "number" and rng.random() < 0.66
        value = random_value(family, rng)
        _lay(canvas, card_mask(side, side, 8), (x, y), _shade(color, rng))
        inner = side - 2 * frame
        tile = draw_tile(family, value, inner, fine, rng, split)
        x0, y0 = x + frame, y + frame
        canvas[y0 : y0 + inner, x0 : x0 + inner] = tile[..., None]
        items.append(
            Item(
                kind="board",
                color=color,
                family=family,
                value=value,
                fine=fine,
                box=(x, y, x + side, y + side),
                tile=(x0, y0, x0 + inner, y0 + inner),
            )
        )
    return items


def _things(canvas: NDArray[np.float32], rng: np.random.Generator, split: str) -> list[Item]:
    """Few (2 or 3) or many (7 or 8) shapes on plates."""
    many = rng.random() < 0.6
    colors = _colors(int(rng.integers(7, 9)) if many else int(rng.integers(2, 4)), rng)
    pitch = SIZE_PX // _GRID
    items = []
    for color, place in zip(colors, rng.permutation(_GRID * _GRID)[: len(colors)], strict=True):
        side = int(rng.integers(56, 68))
        plate = side + 16
        x = int(place) % _GRID * pitch + int(rng.integers(2, pitch - plate - 2))
        y = int(place) // _GRID * pitch + int(rng.integers(2, pitch - plate - 2))
        _lay(canvas, card_mask(plate, plate, 10), (x, y), rng.uniform(212, 240, 3))
        value = random_value("shape", rng)
        _lay(canvas, shape_mask(value, side), (x + 8, y + 8), _shade(color, rng))
        box = (x, y, x + plate, y + plate)
        items.append(Item("thing", color, "shape", value, False, box, box))
    return items


def is_crowded(scene: Scene) -> bool:
    """Whether there are so many things that a second, steered look is asked for."""
    return scene.kind == "things" and len(scene.items) > 4


def _colors(count: int, rng: np.random.Generator) -> list[str]:
    return [str(color) for color in rng.permutation(list(COLORS))[:count]]


def _shade(color: str, rng: np.random.Generator) -> NDArray[np.float32]:
    return (np.array(COLORS[color]) + rng.uniform(-14, 14, 3)).astype(np.float32)


def _lay(
    canvas: NDArray[np.float32],
    mask: NDArray[np.float32],
    corner: tuple[int, int],
    color: NDArray[np.floating],
) -> None:
    """Blend a color in where the mask is, in place; ``corner`` is ``(x, y)``."""
    x, y = corner
    height, width = mask.shape
    under = canvas[y : y + height, x : x + width]
    under += mask[..., None] * (color.astype(np.float32) - under)
