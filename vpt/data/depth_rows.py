"""Rows about depth, made of photos and depth maps, and questions to measure a model with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vpt.data.content_rows import POINT_QUESTION, map_row, point_rows
from vpt.data.making import RowMaking, digest, path_from, save_picture
from vpt.data.points import NUM_POINTS, Point, PointRule, draw_points, nearest, place_points
from vpt.data.rows import read_entries
from vpt.depth.maps import SUFFIXES, Floats, depth_at, read_map
from vpt.errors import DataError
from vpt.images import load_image
from vpt.protocol.calls import format_depth
from vpt.protocol.tokens import RELEASED_DEPTH_CELLS, RELEASED_DEPTH_CODES

if TYPE_CHECKING:
    from vpt.depth.tokenizer import DepthTokenizer

OBJECTS = "objects.jsonl"
"""File that names the pictures and maps of generated scenes."""

_MOST_STRETCH = 0.02  # by which the aspect ratios of photo and map may differ
_REACH, _MOST_OVERLAP = 0.0875, 0.02  # of a circle and its letter, as shares of the side
_LEAST_LEAD = 0.02  # of the nearest point on the drawn map: two of the 100 levels
_TRIES = 6  # to find points whose order the drawn map shows


# Photos and their maps


@dataclass(frozen=True)
class DepthSource:
    """Files of a photo and its depth map."""

    photo: Path
    depth: Path
    distances: bool = False  # see :func:`vpt.depth.maps.read_map`


def scene_sources(folder: Path) -> list[DepthSource]:
    """Pictures and maps of a folder that ``python -m recipes make-scenes`` wrote."""
    file = folder / OBJECTS
    if not file.is_file():
        raise DataError(
            f"{folder} holds no {OBJECTS}; expected a folder as `python -m recipes make-scenes` "
            "writes, such as scenes/train"
        )
    entries = read_entries(file)
    if not entries:
        raise DataError(f"{file} names no scenes")
    try:
        return [DepthSource(folder / entry["image"], folder / entry["depth"]) for entry in entries]
    except (KeyError, TypeError) as exc:
        raise DataError(f"{file} has lines without 'image' and 'depth'; make it again") from exc


def photo_sources(
    photos: list[Path], root: Path, maps: Path, distances: bool = False
) -> list[DepthSource]:
    """Photos in a folder ``root``, and their maps in another; `DataError` if one is missing.

    The map of ``a/b.jpg`` is ``a/b.jpg.png``, as ``vpt depth-tokenizer train --photos`` keeps it,
    or ``a/b.png`` or ``a/b.npy``.
    """
    sources = []
    for photo in photos:
        within = photo.relative_to(root)
        names = [f"{within}.png", *(str(within.with_suffix(suffix)) for suffix in SUFFIXES)]
        found = next((maps / name for name in names if (maps / name).is_file()), None)
        if found is None:
            raise DataError(
                f"there is no depth map of {photo}; expected {maps / names[0]} or {maps / names[1]}"
            )
        sources.append(DepthSource(photo, found, distances))
    return sources


def open_source(source: DepthSource) -> tuple[Image.Image, Floats]:
    """Read photo (RGB) and map ``[H, W]``, which may differ in size, but not in shape."""
    photo = load_image(source.photo).pixels
    depth = read_map(source.depth, distances=source.distances)
    stretch = (photo.width / photo.height) / (depth.shape[1] / depth.shape[0])
    if abs(stretch - 1) > _MOST_STRETCH:
        raise DataError(
            f"{source.depth} has {depth.shape[1]}x{depth.shape[0]} px, {source.photo} has "
            f"{photo.width}x{photo.height}; expected the same shape, after EXIF orientation"
        )
    return photo, depth


def describe(sources: Sequence[DepthSource]) -> str:
    """Text that identifies a list of files."""
    held = [["distances"]] if any(source.distances for source in sources) else []
    return json.dumps([[str(source.photo), str(source.depth)] for source in sources] + held)


# Rows


@dataclass(frozen=True)
class DepthRecipe:
    """Options of rows about depth; `DataError` if circles and letters could cover each other."""

    seed: int = 0  # of all random choices
    num_points: tuple[int, int] = NUM_POINTS  # fewest and most
    rule: PointRule = field(default_factory=PointRule)
    scale: float = 1.0  # of circles and letters, relative to HardBLINK's
    skip_bad: bool = False  # skip photos that cannot be used, instead of stopping at the first

    def __post_init__(self) -> None:
        if self.rule.min_distance < (needed := self.scale * _REACH - _MOST_OVERLAP):
            raise DataError(
                f"circles and letters of scale {self.scale:g} could cover each other at a distance "
                f"of {self.rule.min_distance:g}; ask for {needed:.2f} at least"
            )


def make_depth_rows(
    sources: Sequence[DepthSource], tokenizer: DepthTokenizer, recipe: DepthRecipe, folder: Path
) -> RowMaking:
    """Prepare rows about depth in ``folder``; marked photos are written as it runs."""
    config = tokenizer.config
    if (config.num_cells, config.num_codes) != (RELEASED_DEPTH_CELLS, RELEASED_DEPTH_CODES):
        raise DataError(
            f"the depth tokenizer makes {config.num_cells} codes out of {config.num_codes}; "
            f"expected {RELEASED_DEPTH_CELLS} out of {RELEASED_DEPTH_CODES}"
        )
    weights = tokenizer.network.state_dict().values()
    content = {
        **asdict(recipe),
        "photos": digest(describe(sources).encode()),
        "tokenizer": digest(b"".join(value.detach().cpu().numpy().tobytes() for value in weights)),
    }
    return RowMaking(
        folder,
        content,
        ("depth_maps", "depth_steps", "depth_direct"),
        [(str(source.photo), source) for source in sources],
        partial(_make_one, tokenizer, recipe, folder),
        "photo",
        recipe.skip_bad,
    )


def _make_one(
    tokenizer: DepthTokenizer,
    recipe: DepthRecipe,
    folder: Path,
    number: int,
    source: DepthSource,
    counts: Counter[str],
) -> Sequence[tuple[dict[str, Any], ...]]:
    """Mark a photo, and return an entry for each file."""
    photo, depth = open_source(source)
    codes = tokenizer.encode(depth)
    drawn = tokenizer.decode(codes)
    points = _place(depth, drawn, recipe, np.random.default_rng([recipe.seed, number]))
    path = f"marked/{number:06d}.jpg"
    if not (folder / path).exists():
        (folder / path).parent.mkdir(exist_ok=True)
        save_picture(draw_points(photo, points, recipe.scale), folder / path)
    plain = path_from(folder, source.photo)
    note = {"photo": plain, "map": path_from(folder, source.depth)}
    rows = (map_row(plain, codes, note), *point_rows(path, points, codes, drawn, note))
    first = nearest(points)
    about = {"category": f"{recipe.rule.layout}, {len(points)} points"}
    question = {"question_id": number, "image": path, "text": POINT_QUESTION, **about}
    question |= {"points": [asdict(point) for point in points], "content": format_depth(codes)}
    question |= note
    answer = {"question_id": number, "text": f"({first.letter})", **about}
    counts.update({f"{len(points)} points": 1, f"answer {first.letter}": 1})
    counts["lowest is nearest"] += max(points, key=lambda point: point.y) == first
    return [(*rows, question, answer)]


def _place(
    depth: Floats, drawn: Floats, recipe: DepthRecipe, rng: np.random.Generator
) -> tuple[Point, ...]:
    """A random number of points, or fewer; the drawn map shows which is nearest."""
    least, most = recipe.num_points
    problem = ""
    for num_points in range(int(rng.integers(least, most + 1)), least - 1, -1):
        for _ in range(_TRIES):
            try:
                points = place_points(depth, num_points, recipe.rule, rng)
            except DataError as exc:
                problem = str(exc)
                break
            if _is_shown(points, drawn):
                return points
            problem = "the map that the codes stand for does not show which point is nearest"
    raise DataError(problem)


def _is_shown(points: Sequence[Point], drawn: Floats) -> bool:
    """Whether the nearest point leads clearly on the drawn map, too."""
    first = nearest(points)
    at_first = depth_at(drawn, first.x, first.y)
    others = [depth_at(drawn, p.x, p.y) for p in points if p != first]
    return at_first - max(others) >= _LEAST_LEAD
