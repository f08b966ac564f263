"""Dense labels of rooms and counting scenes: depth codes, objects and marked points per token.

The tower learns them in stage 1, before the language model writes a depth map or a box. A view of
280 px has 10 x 10 tokens, so a token lies exactly over the cell of a depth code.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from recipes.counting.files import ANNOTATIONS, IMAGES
from recipes.counting.scenes import draw_counting_scene
from recipes.embedded.labels import IGNORE
from recipes.embedded.marks import COLORS, SHAPES
from recipes.scenes.layout import COLORS as ROOM_COLORS
from recipes.scenes.layout import SHAPE_NAMES
from vpt.boxes import Box
from vpt.data.depth_rows import OBJECTS
from vpt.data.points import LAYOUTS, NUM_POINTS, Point, PointRule, draw_points, place_points
from vpt.depth.maps import Floats, fit_map, read_map
from vpt.depth.tokenizer import DepthTokenizer
from vpt.errors import DataError, PromptError
from vpt.protocol.tokens import RELEASED_PIXELS

GRID = 10
VIEW_PX = 28 * GRID
KINDS = (*SHAPE_NAMES, *SHAPES)
COLOR_NAMES = tuple(dict.fromkeys((*ROOM_COLORS, *COLORS)))
LETTERS = "ABCDE"
CLASSES = {
    "code": 128,
    "kind": len(KINDS) + 1,
    "color": len(COLOR_NAMES),
    "letter": len(LETTERS) + 1,
    "row": GRID,
    "column": GRID,
}
"""Classes per token; the last kind and the last letter mean that no centre lies in the cell."""

NUMBERS = {"box": 4, "point": 2, "depth": 16}
"""Numbers per token, in cells: centre from the middle of the cell, width and height of a box;
place of a point, likewise. Depth: means of the 4 x 4 parts of the cell, 0 to 1."""

_WEIGHTS = {"code": 4.0, "depth": 30.0, "color": 0.5}  # of losses; others 1
_NEIGHBOURS = 1.0  # cells from a centre within which a token is asked where it is
_MARKED, _CROWDED = 0.9, 0.5  # shares of rooms with marked points, and of these with many
_NUM_CROWDED = (6, 13)  # points of which letters are repeated; from these they are learned faster
_CROWD_SEED, _NUM_OTHERS = 2**20, (6, 13)  # of crowded counting scenes
_LEAST_GAP = 0.13  # between those, as a share of the side
_MARK_SCALE = 1.5  # as the rows about depth
_NOTHING = {"kind": len(KINDS), "letter": len(LETTERS)}  # the class for it
_LEAST_VOTE = 0.3  # for centres; chosen on training scenes, where 0.5 missed more than it spared
_SAME_PLACE, _NEXT_PLACE = 0.5, 0.8  # cells

Grid = NDArray[np.int64]


@dataclass(frozen=True)
class Thing:
    """An object: kind of ``KINDS``, color of ``COLOR_NAMES``, box XYXY in cells of the grid."""

    kind: str
    color: str
    box: Box

    @property
    def center(self) -> tuple[float, float]:
        """``(x, y)`` in cells."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Source:
    """A picture of a folder, its depth map if there is one, and its objects, nearest first."""

    image: Path
    depth: Path | None
    things: tuple[Thing, ...]


def room_sources(folder: Path) -> list[Source]:
    """Scenes of a folder that ``python -m recipes make-scenes`` wrote."""
    sources = []
    for line in _read(folder / OBJECTS, "make-scenes").splitlines():
        entry = json.loads(line)
        with Image.open(folder / entry["image"]) as image:
            cells = GRID / image.width
        things = tuple(
            Thing(item["shape"], item["color"], _scaled(item["box"], cells))
            for item in entry["objects"]
        )
        sources.append(Source(folder / entry["image"], folder / entry["depth"], things))
    return sources


def counting_sources(folder: Path) -> list[Source]:
    """Scenes of a folder that ``python -m recipes make-counting-scenes`` wrote."""
    content = json.loads(_read(folder / ANNOTATIONS, "make-counting-scenes"))
    names = {category["id"]: category["name"] for category in content["categories"]}
    cells = {image["id"]: GRID / image["width"] for image in content["images"]}
    things: defaultdict[int, list[Thing]] = defaultdict(list)
    for item in content["annotations"]:
        x, y, width, height = item["bbox"]
        box = _scaled((x, y, x + width, y + height), cells[item["image_id"]])
        things[item["image_id"]].append(Thing(names[item["category_id"]], item["color"], box))
    return [
        Source(folder / IMAGES / image["file_name"], None, tuple(things[image["id"]]))
        for image in content["images"]
    ]


def _read(file: Path, command: str) -> str:
    if not file.is_file():
        raise PromptError(f"there is no {file}; make it with `python -m recipes {command}`")
    return file.read_text(encoding="utf-8")


def _scaled(box: Sequence[float], factor: float) -> Box:
    x0, y0, x1, y1 = (value * factor for value in box)
    return x0, y0, x1, y1


def check_tokenizer(tokenizer: DepthTokenizer) -> DepthTokenizer:
    """The tokenizer; `PromptError` if its grid is not that of the tokens."""
    config = tokenizer.config
    if (config.grid_size, config.num_codes) != (GRID, CLASSES["code"]):
        raise PromptError(
            f"expected a depth tokenizer of {GRID} x {GRID} cells and {CLASSES['code']} codes, "
            f"got {config.grid_size} x {config.grid_size} cells and {config.num_codes} codes"
        )
    return tokenizer


@dataclass(frozen=True, eq=False)
class View:
    """A picture as the tower sees it, and all that is known about it.

    Attributes:
        pixels: ``[280, 280, 3]`` uint8.
        depth: ``[H, W]`` of 0 to 1, if there is a map.
        things: nearest first.
        points: marked ones.
    """

    pixels: NDArray[np.uint8]
    depth: Floats | None
    things: tuple[Thing, ...]
    points: tuple[Point, ...] = ()


def make_view(source: Source, rng: np.random.Generator, num_points: int | None = None) -> View:
    """Load a picture; at random mirror it and, where there is a depth map, mark points.

    Args:
        source: of the picture.
        rng: decides.
        num_points: to mark, in a picture that is not mirrored; at random if missing. Fewer where
            there is no room.
    """
    with Image.open(source.image) as file:
        image = file.convert("RGB").resize((VIEW_PX, VIEW_PX), Image.Resampling.BICUBIC)
    depth = read_map(source.depth) if source.depth else None
    things = source.things
    if num_points is None and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        things = tuple(Thing(t.kind, t.color, _mirrored(t.box)) for t in things)
        depth = None if depth is None else np.ascontiguousarray(depth[:, ::-1])
    if depth is None:
        return View(np.asarray(image), None, things)
    points = _draw_points(depth, num_points, rng)
    return View(np.asarray(draw_points(image, points, _MARK_SCALE)), depth, things, points)


def _mirrored(box: Box) -> Box:
    return GRID - box[2], box[1], GRID - box[0], box[3]


def _draw_points(
    depth: Floats, num_points: int | None, rng: np.random.Generator
) -> tuple[Point, ...]:
    rule = PointRule(str(rng.choice(LAYOUTS)))
    if num_points is None:
        is_marked = rng.random() < _MARKED
        if is_marked and rng.random() < _CROWDED:
            return _draw_crowd(rng)
        num_points = int(rng.integers(NUM_POINTS[0], NUM_POINTS[1] + 1)) if is_marked else 0
    while num_points >= NUM_POINTS[0]:
        try:
            return place_points(depth, num_points, rule, rng)
        except DataError:  # no room for as many
            num_points -= 1
    return ()


def _draw_crowd(rng: np.random.Generator) -> tuple[Point, ...]:
    """Many points anywhere, with letters in no order."""
    low, high = (round(share * RELEASED_PIXELS) for share in (0.05, 0.95))
    points: list[Point] = []
    for x, y in rng.integers(low, high, (int(rng.integers(*_NUM_CROWDED)), 2)).tolist():
        away = (max(abs(x - point.x), abs(y - point.y)) for point in points)
        if all(distance > _LEAST_GAP * RELEASED_PIXELS for distance in away):
            points.append(Point(LETTERS[rng.integers(len(LETTERS))], x, y, 0.0))
    return tuple(points)


def label_tokens(view: View) -> dict[str, NDArray[Any]]:
    """Targets of the heads: ``[10, 10]`` classes, ``[10, 10, k]`` numbers, ``nan`` for none."""
    rows, columns = np.mgrid[:GRID, :GRID]
    kind = np.full((GRID, GRID), len(KINDS))
    color = np.full((GRID, GRID), IGNORE)
    for thing in reversed(view.things):  # of two in one cell the nearest counts
        cell = _cell(thing.center)
        kind[cell] = KINDS.index(thing.kind)
        color[cell] = COLOR_NAMES.index(thing.color)
    letter = np.full((GRID, GRID), len(LETTERS))
    places = [place_in_cells(point) for point in view.points]
    for point, place in zip(view.points, places, strict=True):
        letter[_cell(place)] = LETTERS.index(point.letter)
    boxes = [(*t.center, t.box[2] - t.box[0], t.box[3] - t.box[1]) for t in view.things]
    return {
        "kind": kind,
        "color": color,
        "letter": letter,
        "row": rows,
        "column": columns,
        "box": _nearest(boxes, 4),
        "point": _nearest(places, 2),
        "depth": _depth_parts(view.depth),
    }


def place_in_cells(point: Point) -> tuple[float, float]:
    """``(x, y)`` of a marked point in cells."""
    return (point.x + 0.5) * GRID / RELEASED_PIXELS, (point.y + 0.5) * GRID / RELEASED_PIXELS


def _cell(place: tuple[float, float]) -> tuple[int, int]:
    """``(row, column)``."""
    return min(int(place[1]), GRID - 1), min(int(place[0]), GRID - 1)


def _nearest(places: Sequence[tuple[float, ...]], num: int) -> Floats:
    """Per cell what is nearest to its middle: ``(x, y)`` from there, and the rest; or ``nan``."""
    out = np.full((GRID, GRID, num), np.nan, np.float32)
    if not places:
        return out
    given = np.asarray(places, np.float32)  # [N, num]
    middles = np.stack(np.meshgrid(*[np.arange(GRID) + 0.5] * 2), -1)  # [10, 10, 2]
    away = np.hypot(*np.moveaxis(given[:, :2] - middles[:, :, None], -1, 0))  # [10, 10, N]
    best = away.argmin(-1)
    found = given[best]
    found[..., :2] -= middles
    is_near = away.min(-1) <= _NEIGHBOURS
    out[is_near] = found[is_near]
    return out


def _depth_parts(depth: Floats | None) -> Floats:
    """Means of the 4 x 4 parts of each cell, ``[10, 10, 16]``."""
    if depth is None:
        return np.full((GRID, GRID, 16), np.nan, np.float32)
    parts = fit_map(depth, VIEW_PX).reshape(GRID, 4, 7, GRID, 4, 7).mean((2, 5))
    return parts.transpose(0, 2, 1, 3).reshape(GRID, GRID, 16)


def stack_views(views: Sequence[View], tokenizer: DepthTokenizer) -> dict[str, Tensor]:
    """A batch: ``pixels`` ``[B, 280, 280, 3]``, and the targets of every head."""
    labels = [label_tokens(view) for view in views]
    batch = {"pixels": torch.from_numpy(np.stack([view.pixels for view in views]))}
    for name in labels[0]:
        batch[name] = torch.from_numpy(np.stack([one[name] for one in labels]))
    batch["code"] = torch.full((len(views), GRID, GRID), IGNORE)
    mapped = [number for number, view in enumerate(views) if view.depth is not None]
    if mapped:
        size = tokenizer.config.size_px
        maps = [fit_map(view.depth, size) for view in views if view.depth is not None]
        with torch.inference_mode():
            codes = tokenizer.network.encode(torch.from_numpy(np.stack(maps))[:, None])
        batch["code"][mapped] = codes.clone()
    return batch


def crowded_view(rng: np.random.Generator) -> View:
    """A counting scene with many things, from which their kinds are learned faster."""
    number = int(rng.integers(2**31))
    scene = draw_counting_scene(_CROWD_SEED, number, size_px=VIEW_PX, num_others=_NUM_OTHERS)
    things = (Thing(t.kind, t.color, _scaled(t.box, GRID / VIEW_PX)) for t in scene.things)
    return View(np.asarray(scene.image), None, tuple(things))


class SceneBatches(Dataset[dict[str, Tensor]]):
    """Batches of labelled views; the number of a batch is its seed.

    Five of eight are rooms; of the others half are crowded.

    Args:
        rooms: with depth maps.
        counting: without depth maps.
        tokenizer: of the maps.
        batch_size: views of a batch.
        num_batches: how many there are.
        seed: of the choice.
    """

    def __init__(
        self,
        rooms: Sequence[Source],
        counting: Sequence[Source],
        tokenizer: DepthTokenizer,
        batch_size: int,
        num_batches: int,
        seed: int,
    ) -> None:
        self.rooms, self.counting, self.tokenizer = rooms, counting, check_tokenizer(tokenizer)
        self.batch_size, self.num_batches, self.seed = batch_size, num_batches, seed

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, number])
        num_rooms = self.batch_size * 5 // 8
        num_counting = (self.batch_size - num_rooms + 1) // 2
        views = [make_view(self._one_of(self.rooms, rng), rng) for _ in range(num_rooms)]
        views += [make_view(self._one_of(self.counting, rng), rng) for _ in range(num_counting)]
        views += [crowded_view(rng) for _ in range(self.batch_size - len(views))]
        return stack_views(views, self.tokenizer)

    @staticmethod
    def _one_of(sources: Sequence[Source], rng: np.random.Generator) -> Source:
        return sources[int(rng.integers(len(sources)))]


class SceneHeads(nn.Module):
    """One linear read-out per head over a token of the tower.

    Args:
        feature_dim: width of the tokens.
    """

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        sizes = {**CLASSES, **NUMBERS}
        self.heads = nn.ModuleDict({name: nn.Linear(feature_dim, n) for name, n in sizes.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Tokens ``[B, 100, D]`` to logits and numbers ``[B, 10, 10, k]`` per head."""
        tokens = self.norm(features).unflatten(1, (GRID, GRID))
        return {name: head(tokens) for name, head in self.heads.items()}

    def loss(
        self, features: Tensor, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the losses, and what each head is worth.

        The losses of kinds and letters are sums over all tokens, divided by the number of those
        that have one: few have, and their probabilities must not be shifted.

        Returns:
            The loss; per head of classes the share of right ones among tokens that have one, per
            head of numbers the mean absolute error.
        """
        read, total, shown = self(features), features.new_zeros(()), {}
        for name in CLASSES:
            logits, labels = read[name].flatten(0, 2), batch[name].flatten()
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
            counted = (labels != IGNORE) & (labels != _NOTHING.get(name, IGNORE))
            total = total + _WEIGHTS.get(name, 1.0) * loss / counted.sum().clamp_min(1)
            if counted.any():
                is_right = logits[counted].argmax(-1) == labels[counted]
                shown[name] = float(is_right.float().mean())
        for name in NUMBERS:
            wanted = batch[name]
            counted = ~wanted.isnan()
            if counted.any():
                difference = (read[name][counted] - wanted[counted]).abs()
                total = total + _WEIGHTS.get(name, 1.0) * difference.mean()
                shown[name] = float(difference.detach().mean())
        return total, shown


# Reading


@dataclass(frozen=True)
class Found:
    """A centre that was read: kind, ``(x, y)`` in cells, and votes of the tokens, about 0 to 1."""

    kind: str
    place: tuple[float, float]
    votes: float


def find_centers(kinds: Tensor, boxes: Tensor) -> list[Found]:
    """Centres of objects in a picture.

    Each token votes for a place with the probability that a centre lies in its cell; votes for
    about the same place add up, so a centre on the border of two cells is found once.

    Args:
        kinds: logits ``[10, 10, K + 1]``.
        boxes: ``[10, 10, 4]``, of which the first two are used.
    """
    chances = kinds.softmax(-1)[..., :-1].flatten(0, 1)  # [100, K]
    places = _places(boxes[..., :2]).flatten(0, 1)  # [100, 2]
    away = torch.cdist(places, places)
    votes = (away < _SAME_PLACE).float() @ chances  # [100, K]
    found = []
    while float(votes.max()) >= _LEAST_VOTE:
        token, kind = divmod(int(votes.argmax()), votes.shape[1])
        close = away[token] < _SAME_PLACE
        weights = chances[close, kind]
        x, y = (weights @ places[close] / weights.sum()).tolist()
        found.append(Found(KINDS[kind], (x, y), float(votes[token, kind])))
        votes[away[token] < _NEXT_PLACE] = 0  # two things are never that close
    return found


def find_letters(letters: Tensor, points: Tensor, wanted: Sequence[str]) -> dict[str, Any]:
    """Place ``(x, y)`` in cells of each wanted letter.

    Args:
        letters: logits ``[10, 10, 6]``.
        points: ``[10, 10, 2]``.
        wanted: letters that are in the picture.
    """
    chances = letters.softmax(-1).flatten(0, 1)  # [100, 6]
    places = _places(points).flatten(0, 1)  # [100, 2]
    found = {}
    for letter in wanted:
        weights = chances[:, LETTERS.index(letter)]
        close = (places - places[weights.argmax()]).norm(dim=-1) < _SAME_PLACE
        weights = weights * close
        found[letter] = tuple((weights @ places / weights.sum()).tolist())
    return found


def _places(offsets: Tensor) -> Tensor:
    """Offsets ``[10, 10, 2]`` from the middles of the cells to places in cells."""
    middles = torch.arange(GRID, dtype=offsets.dtype) + 0.5
    return offsets + torch.stack(torch.meshgrid(middles, middles, indexing="xy"), -1)
