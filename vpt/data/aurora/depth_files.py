"""Files of rows about depth, made of photos and depth maps, and what to measure a model with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vpt.data.aurora.circles import draw_points
from vpt.data.aurora.depth_rows import POINT_QUESTION, map_row, point_rows
from vpt.data.aurora.depth_sources import DepthSource, describe, open_source
from vpt.data.aurora.parts import Part, join_parts, work_in_parts, write_index
from vpt.data.aurora.points import Floats, Point, PointRule, nearest, place_points
from vpt.data.making import keep_recipe, save_picture
from vpt.depth.reading import depth_at
from vpt.depth.tokenizer import DepthTokenizer
from vpt.errors import DataError, ImageError
from vpt.protocol.tokens import RELEASED_DEPTH_CELLS, RELEASED_DEPTH_CODES

MARKED = "marked"
MAPS, STEPS, DIRECT = "depth_maps", "depth_steps", "depth_direct"
QUESTIONS, ANSWERS = "questions", "answers"
"""Names of the files: rows of three kinds, and questions and answers in HardBLINK's layout."""

_REACH, _MOST_OVERLAP = 0.0875, 0.02  # of a circle and its letter, as shares of the side
_NAMES = (MAPS, STEPS, DIRECT, QUESTIONS, ANSWERS)
_LEAST_LEAD = 0.02  # of the nearest point on the drawn map: two of the 100 levels
_TRIES = 6  # to find points whose order the drawn map shows


@dataclass(frozen=True)
class DepthRecipe:
    """What rows about depth to make.

    Attributes:
        seed: of all chance.
        num_points: fewest and most; as many are taken as the picture permits.
        rule: which points may be compared.
        scale: of circles and letters, 1 for HardBLINK's.
        skip_bad: leave pictures out that cannot be used, instead of stopping at the first.

    Raises:
        DataError: if circles and letters of this size could cover each other.
    """

    seed: int = 0
    num_points: tuple[int, int] = (2, 5)
    rule: PointRule = field(default_factory=PointRule)
    scale: float = 1.0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.rule.min_distance < (needed := self.scale * _REACH - _MOST_OVERLAP):
            raise DataError(
                f"circles and letters of scale {self.scale:g} could cover each other at a distance "
                f"of {self.rule.min_distance:g}; ask for {needed:.2f} at least"
            )


class DepthRowMaker:
    """Makes rows about depth.

    Args:
        tokenizer: of depth maps; 100 codes of 128.
        recipe: what to make.
        folder: to write into.

    Raises:
        DataError: if the tokenizer makes other codes than models can write.
    """

    def __init__(self, tokenizer: DepthTokenizer, recipe: DepthRecipe, folder: Path) -> None:
        config = tokenizer.config
        if (config.num_cells, config.num_codes) != (RELEASED_DEPTH_CELLS, RELEASED_DEPTH_CODES):
            raise DataError(
                f"the depth tokenizer makes {config.num_cells} codes out of {config.num_codes}; "
                f"expected {RELEASED_DEPTH_CELLS} out of {RELEASED_DEPTH_CODES}"
            )
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._folder = folder

    def make(self, sources: Sequence[DepthSource]) -> Iterator[int]:
        """Make pictures and rows, as far as an earlier run has not made them.

        Yields:
            How many more photos are done.

        Raises:
            DataError: if a photo permits no question, and is not to be skipped.
            ImageError: if a photo cannot be read, and is not to be skipped.
            OSError: if something cannot be written.
            PromptError: if the folder holds other data.
        """
        recipe = asdict(self._recipe)
        recipe["photos"] = _digest(describe(list(sources)).encode())
        recipe["tokenizer"] = self._weights_digest()
        keep_recipe(self._folder, recipe)
        (self._folder / MARKED).mkdir(exist_ok=True)
        yield from work_in_parts(self._folder, sources, self._add)

    def finish(self, num_sources: int) -> Part:
        """Write the files of rows.

        Returns:
            All that was made, with counts.

        Raises:
            DataError: if no photo could be used.
            OSError: if something cannot be written.
        """
        whole = join_parts(self._folder, num_sources, _NAMES)
        if not whole.lines[MAPS]:
            which, why = whole.problems[0]
            raise DataError(f"no photo could be used; the first: {which}: {why}")
        write_index(self._folder, (MAPS, STEPS, DIRECT))
        return whole

    def _add(self, number: int, source: DepthSource, part: Part) -> None:
        try:
            entries, points = self._make_one(number, source)
        except (DataError, ImageError) as exc:
            if not self._recipe.skip_bad:
                raise type(exc)(f"{source.photo}: {exc} (--skip-bad leaves such out)") from exc
            part.problems.append((str(source.photo), str(exc)))
            return
        for name, entry in zip(_NAMES, entries, strict=True):
            part.lines.setdefault(name, []).append(entry)
        part.counts.update({f"{len(points)} points": 1, f"answer {nearest(points).letter}": 1})
        lowest = max(points, key=lambda point: point.y)
        part.counts["lowest is nearest"] += lowest == nearest(points)

    def _make_one(
        self, number: int, source: DepthSource
    ) -> tuple[tuple[dict[str, Any], ...], tuple[Point, ...]]:
        """Entries of all files, and the points."""
        photo, depth = open_source(source)
        codes = self._tokenizer.encode(depth)
        drawn = self._tokenizer.decode(codes)
        rng = np.random.default_rng([self._recipe.seed, number])
        points = self._place(depth, drawn, rng)
        path = f"{MARKED}/{number:06d}.jpg"
        if not (self._folder / path).exists():
            marked = draw_points(photo, points, self._recipe.scale)
            save_picture(marked, self._folder / path)
        plain = _path_from(self._folder, source.photo)
        note = {"photo": plain, "map": _path_from(self._folder, source.depth)}
        rows = (map_row(plain, codes, note), *point_rows(path, points, codes, drawn, note))
        category = f"{self._recipe.rule.layout}, {len(points)} points"
        question = {
            "question_id": number,
            "image": path,
            "text": POINT_QUESTION,
            "category": category,
            "points": [asdict(point) for point in points],
            **note,
        }
        answer = {
            "question_id": number,
            "text": f"({nearest(points).letter})",
            "category": category,
        }
        return (*rows, question, answer), points

    def _place(self, depth: Floats, drawn: Floats, rng: np.random.Generator) -> tuple[Point, ...]:
        """As many points as were drawn by lot, or fewer; the drawn map shows which is nearest."""
        least, most = self._recipe.num_points
        problem = ""
        for num_points in range(int(rng.integers(least, most + 1)), least - 1, -1):
            for _ in range(_TRIES):
                try:
                    points = place_points(depth, num_points, self._recipe.rule, rng)
                except DataError as exc:
                    problem = str(exc)
                    break
                if _is_shown(points, drawn):
                    return points
                problem = "the map that the codes stand for does not show which point is nearest"
        raise DataError(problem)

    def _weights_digest(self) -> str:
        network = self._tokenizer.network
        values = [value.detach().cpu().numpy().tobytes() for value in network.state_dict().values()]
        return _digest(b"".join(values))


def _is_shown(points: Sequence[Point], drawn: Floats) -> bool:
    """Whether the drawn map has the nearest point before all others, by a clear lead."""
    first = nearest(points)
    at_first = depth_at(drawn, first.x, first.y)
    others = [depth_at(drawn, p.x, p.y) for p in points if p != first]
    return at_first - max(others) >= _LEAST_LEAD


def _path_from(folder: Path, file: Path) -> str:
    """A path that leads from a folder to a file: relative, in the way of POSIX."""
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
