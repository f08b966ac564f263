"""Generated pictures of things to count: several kinds, some asked about, others in the way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recipes.embedded.looks import LOOKS, background, clouds, grain
from recipes.embedded.marks import COLORS, PATTERNS, SHAPES, shape_mask, texture
from vpt.boxes import PixelBox

SIZE_PX = 336
LEAST_SIZE_PX, MOST_SIZE_PX = 96, 1024
SPLITS = ("train", "heldout")
"""Scenes of two splits have nothing to do with each other, whatever their seeds and numbers."""

NUM_ASKED = (2, 9)
"""Fewest and most things of the kind that is asked about; all equally likely."""

NUM_OTHERS = (0, 7)
"""Fewest things of other kinds, and one more than the most."""

NUM_KINDS = (3, 5)
"""Fewest and most things where each is of another kind."""

_SIDE = (0.09, 0.19)  # of a thing, as a share of the picture's side
_GAP = 0.012  # between two things
_TRIES = 60

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Counted:
    """A thing in a scene.

    Attributes:
        kind: one of ``marks.SHAPES``.
        color: key of ``marks.COLORS``.
        box: XYXY in pixels, the last two exclusive, of what is drawn.
    """

    kind: str
    color: str
    box: PixelBox


@dataclass(frozen=True)
class CountingScene:
    """A picture of things.

    Attributes:
        image: RGB, square.
        things: those of the kind asked about first.
        look: of the background.
    """

    image: Image.Image
    things: tuple[Counted, ...]
    look: str


def draw_counting_scene(
    seed: int,
    number: int,
    split: str = "train",
    size_px: int = SIZE_PX,
    num_others: tuple[int, int] = NUM_OTHERS,
    *,
    one_of_each: bool = False,
) -> CountingScene:
    """Draw a scene; the same arguments give the same scene.

    Args:
        seed: of a set of scenes.
        number: of the scene in its set.
        split: one of :data:`SPLITS`.
        size_px: side of the picture, 96 to 1024.
        num_others: as :data:`NUM_OTHERS`; with more than a dozen there is hardly room.
        one_of_each: as many kinds as things, :data:`NUM_KINDS`.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    kinds = [str(kind) for kind in rng.permutation(SHAPES)]
    if one_of_each:
        wanted = kinds[: int(rng.integers(NUM_KINDS[0], NUM_KINDS[1] + 1))]
    else:
        num_asked = int(rng.integers(NUM_ASKED[0], NUM_ASKED[1] + 1))
        others = [str(kind) for kind in rng.choice(kinds[1:], rng.integers(*num_others))]
        wanted = [kinds[0]] * num_asked + others
    boxes: list[PixelBox] = []
    while len(boxes) < len(wanted):  # too crowded by chance: place all again
        boxes = _place(len(wanted), size_px, rng)
    look = str(rng.choice(LOOKS))
    canvas = background(look, size_px, split, rng)
    things = []
    for kind, box in zip(wanted, boxes, strict=True):
        color = str(rng.choice(list(COLORS)))
        things.append(Counted(kind, color, _draw(canvas, kind, color, box, rng)))
    canvas += grain(size_px, rng)
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    return CountingScene(Image.fromarray(pixels), tuple(things), look)


def _place(num_things: int, size_px: int, rng: np.random.Generator) -> list[PixelBox]:
    """Squares that do not touch, as many as were found."""
    gap = _GAP * size_px
    places: list[PixelBox] = []
    for _ in range(num_things):
        for _ in range(_TRIES):
            side = round(size_px * rng.uniform(*_SIDE))
            x, y = (int(at) for at in rng.integers(2, size_px - side - 2, 2))
            is_free = all(
                x + side + gap <= x0 or x1 + gap <= x or y + side + gap <= y0 or y1 + gap <= y
                for x0, y0, x1, y1 in places
            )
            if is_free:
                places.append((x, y, x + side, y + side))
                break
    return places


def _draw(
    canvas: Array, kind: str, color: str, place: PixelBox, rng: np.random.Generator
) -> PixelBox:
    """Draw a thing with its shadow, in place.

    Returns:
        XYXY of what is drawn, without the shadow.
    """
    x0, y0, x1, y1 = place
    mask = shape_mask(kind, x1 - x0)
    side = len(mask)
    drop = max(side // 14, 1)
    under = canvas[y0 + drop : y1 + drop, x0 + drop : x1 + drop]
    under *= 1 - np.float32(0.35) * mask[: len(under), : under.shape[1], None]
    paint = (np.array(COLORS[color]) + rng.uniform(-16, 16, 3)).astype(np.float32)
    surface = np.broadcast_to(paint, (side, side, 3)).copy()
    surface += 10 * clouds(side, 4, rng)[..., None]
    surface += np.linspace(16, -16, side, dtype=np.float32)[:, None, None]  # lit from above
    if rng.random() < 0.3:
        pattern = str(rng.choice(PATTERNS))
        waves = texture(pattern, side, max(side / 4, 4.0), float(rng.uniform(0, 6.28)))
        surface += 22 * waves[..., None]
    here = canvas[y0:y1, x0:x1]
    here += mask[..., None] * (surface - here)
    shown_rows, shown_columns = (np.flatnonzero((mask > 0.5).any(axis)) for axis in (1, 0))
    return (
        x0 + int(shown_columns[0]),
        y0 + int(shown_rows[0]),
        x0 + int(shown_columns[-1]) + 1,
        y0 + int(shown_rows[-1]) + 1,
    )
