"""Dense labels of a view: what every token of an encoder should know about its place.

The vision parts of the embedded model learn from these before any words come in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recipes.embedded.marks import COLORS, LINES, PATTERNS, SHAPES
from recipes.embedded.scenes import Item
from vpt.boxes import Box

IGNORE = -100
_SHOWN = 0.2  # share of a tile from which on a token is answerable for it
CONTENTS = (*LINES, *PATTERNS, *"0123456789", "too fine")
HEADS = {
    "content": len(CONTENTS),
    "color": len(COLORS),
    "shape": len(SHAPES),
    "tag": 4 * len(COLORS),
}
"""Head -> number of classes; each has one more for "nothing here". A token has four tag places."""

Grid = NDArray[np.int64]


@dataclass(frozen=True)
class Labels:
    """Classes of the tokens of a view, ``-100`` where there is none.

    Attributes:
        content: ``[n, n]``, index into ``CONTENTS`` of the tile there, ``len(CONTENTS)`` for none.
        color: ``[n, n]``, index into ``COLORS`` of the board or thing there.
        shape: ``[n, n]``, index into ``SHAPES`` of the thing there.
        tag: ``[n, n, 4]``, per quarter of a token the color of the tag whose tile is centred there.
    """

    content: Grid
    color: Grid
    shape: Grid
    tag: Grid


def label_view(items: Iterable[Item], box: Box, num_cells: int, *, reads_fine: bool) -> Labels:
    """Label a square view.

    Args:
        items: of the scene.
        box: XYXY in pixels, what the view shows.
        num_cells: ``n``, tokens along a side.
        reads_fine: whether the view is sharp enough for fine tiles on boards. Those on tags are
            read by a view that is at least as close as a crop.
    """
    n = num_cells
    step = (box[2] - box[0]) / n
    xs = box[0] + (np.arange(n) + 0.5) * step
    ys = box[1] + (np.arange(n) + 0.5) * (box[3] - box[1]) / n
    content = np.full((n, n), len(CONTENTS))
    color = np.full((n, n), len(COLORS))
    shape = np.full((n, n), len(SHAPES))
    quarter = np.full((2 * n, 2 * n), len(COLORS))
    best = np.zeros((n, n))  # share of a small tile that a token shows
    # A crop of 3 cells shows 42 px per token, a first look 112; so close, frames fill tokens, too.
    is_close = step < 50
    for item in items:
        reads = not item.fine or (is_close if item.kind == "tag" else reads_fine)
        value = CONTENTS.index(item.value) if reads and item.kind != "thing" else len(CONTENTS) - 1
        if item.kind == "tag":
            _label_small(content, best, item, value, box)
            _label_place(quarter, item, box)
            continue
        inside = _covers(item.tile, xs, ys)
        color[_covers(item.box if is_close else item.tile, xs, ys)] = list(COLORS).index(item.color)
        color[_touches(item.box, xs, ys, step) & ~_covers(item.box, xs, ys)] = IGNORE
        if item.kind == "thing":
            shape[inside] = SHAPES.index(item.value)
            continue
        content[_touches(item.tile, xs, ys, step)] = IGNORE
        content[inside] = value
    tag = quarter.reshape(n, 2, n, 2).transpose(0, 2, 1, 3).reshape(n, n, 4)
    return Labels(content, color, shape, tag)


def _covers(box: Box, xs: NDArray[np.floating], ys: NDArray[np.floating]) -> NDArray[np.bool_]:
    across = (xs >= box[0]) & (xs < box[2])
    down = (ys >= box[1]) & (ys < box[3])
    return down[:, None] & across[None]


def _touches(
    box: Box, xs: NDArray[np.floating], ys: NDArray[np.floating], step: float
) -> NDArray[np.bool_]:
    half = step / 2
    return _covers((box[0] - half, box[1] - half, box[2] + half, box[3] + half), xs, ys)


def _cell(point: tuple[float, float], box: Box, num_cells: int) -> tuple[int, int] | None:
    """``(row, column)`` of a point, or ``None`` outside."""
    x = (point[0] - box[0]) / (box[2] - box[0]) * num_cells
    y = (point[1] - box[1]) / (box[3] - box[1]) * num_cells
    inside = 0 <= x < num_cells and 0 <= y < num_cells
    return (int(y), int(x)) if inside else None


def _label_small(
    content: Grid, best: NDArray[np.float64], item: Item, value: int, box: Box
) -> None:
    """Label the tokens that show a good part of a small tile; of several tiles the larger part."""
    n = len(content)
    step = (box[2] - box[0]) / n
    x0, y0, x1, y1 = item.tile
    left = box[0] + np.arange(n) * step
    top = box[1] + np.arange(n) * step
    across = np.clip(np.minimum(left + step, x1) - np.maximum(left, x0), 0, None) / (x1 - x0)
    down = np.clip(np.minimum(top + step, y1) - np.maximum(top, y0), 0, None) / (y1 - y0)
    share = down[:, None] * across[None]  # of the tile, in each token
    better = share > best
    content[better] = np.where(share[better] >= _SHOWN, value, IGNORE)
    best[better] = share[better]


def _label_place(quarter: Grid, item: Item, box: Box) -> None:
    if (cell := _cell(item.center, box, len(quarter))) is not None:
        quarter[cell] = list(COLORS).index(item.color)
