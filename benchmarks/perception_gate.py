"""Measure what linear heads read from the tower's tokens on held-out scenes.

Run ``python benchmarks/perception_gate.py configs/embedded/2-perception.yaml --rooms
data/perception/rooms/heldout --counting data/perception/counting/heldout``, also during the
training: the last checkpoint is read. Intervals are 95 % ones: of Wilson for shares, of the
bootstrap over pictures for F1. Codes of a picture are not independent, so theirs is too narrow.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from recipes.embedded.perception import (
    GRID,
    Found,
    SceneHeads,
    Source,
    Thing,
    View,
    check_tokenizer,
    counting_sources,
    find_centers,
    find_letters,
    make_view,
    place_in_cells,
    room_sources,
    stack_views,
)
from recipes.embedded.shape import fresh_model
from recipes.embedded.views import TowerView
from recipes.embedded.vision import Settings, vision_settings
from vpt.depth.maps import answer_from_map, depth_at, fit_map
from vpt.depth.tokenizer import DepthTokenizer, load_depth_tokenizer
from vpt.errors import VPTError
from vpt.evaluation.intervals import wilson_interval

_SEED = 11
_NUM_POINTS = (2, 3, 5)  # in turn
_BATCH_SIZE = 20
_REACH = 0.5  # cells between a place that was read and the true one
_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Reader:
    """The tower and its heads, as a checkpoint of stage 1 has them."""

    view: TowerView
    heads: SceneHeads

    @classmethod
    def load(cls, settings: Settings) -> tuple[Reader, int]:
        """The last checkpoint of a training, and its step."""
        model, processor = fresh_model(settings.seed, settings.tower_depth)
        heads = SceneHeads(model.config.text_config.hidden_size)
        trained = torch.nn.ModuleDict(
            {"view": TowerView(model, processor), "scene_heads": heads}
        ).eval()
        state = torch.load(Path(settings.output_dir) / "tower.pt", weights_only=True)
        trained.load_state_dict({name: state["trained"][name] for name in trained.state_dict()})
        return cls(trained["view"], heads), int(state["step"])  # type: ignore[arg-type]

    def read(self, pixels: Tensor) -> list[dict[str, Tensor]]:
        """What the heads read from each picture."""
        with torch.inference_mode():
            out = self.heads(self.view(pixels))
        return [{name: value[i] for name, value in out.items()} for i in range(len(pixels))]


@dataclass
class Matches:
    """Per picture: centres found and true, found only, and missed."""

    rows: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, found: Sequence[Found], things: Sequence[Thing]) -> None:
        """Count the centres of a picture; each true one is found once at most."""
        left = list(things)
        for one in sorted(found, key=lambda one: -one.votes):
            fits = [t for t in left if t.kind == one.kind and _is_close(t.center, one.place)]
            if fits:
                left.remove(min(fits, key=lambda t: _distance(t.center, one.place)))
        hits = len(things) - len(left)
        self.rows.append((hits, len(found) - hits, len(left)))

    @property
    def table(self) -> NDArray[np.int64]:
        """``[pictures, 3]``."""
        return np.array(self.rows)

    def say(self) -> str:
        """F1 with its interval; precision and recall."""
        rng = np.random.default_rng(_SEED)
        drawn = rng.integers(len(self.rows), size=(_NUM_RESAMPLES, len(self.rows)))
        low, high = np.quantile([_f1(self.table[one].sum(0)) for one in drawn], (0.025, 0.975))
        hits, extra, missed = self.table.sum(0)
        return (
            f"{_f1(self.table.sum(0)):.3f} [{low:.3f}, {high:.3f}], precision "
            f"{hits / max(hits + extra, 1):.3f}, recall {hits / max(hits + missed, 1):.3f}"
        )


def _f1(row: NDArray[np.int64]) -> float:
    hits, extra, missed = row
    return float(2 * hits / max(2 * hits + extra + missed, 1))


def _distance(one: tuple[float, float], other: tuple[float, float]) -> float:
    return float(np.hypot(*np.subtract(one, other)))


def _is_close(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return _distance(one, other) <= _REACH


def share(values: Sequence[bool]) -> str:
    """Share of ``True`` with its interval and number."""
    interval = wilson_interval(int(sum(values)), len(values))
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}] | {len(values)}"


def read_all(
    reader: Reader, sources: Sequence[Source], tokenizer: DepthTokenizer, name: str
) -> Iterator[tuple[View, dict[str, Tensor], Tensor]]:
    """Each picture with what was read from it, and its true codes."""
    rng = np.random.default_rng(_SEED)
    for first in tqdm(range(0, len(sources), _BATCH_SIZE), desc=name, mininterval=5):
        chosen = range(first, min(first + _BATCH_SIZE, len(sources)))
        views = [make_view(sources[i], rng, _NUM_POINTS[i % len(_NUM_POINTS)]) for i in chosen]
        batch = stack_views(views, tokenizer)
        yield from zip(views, reader.read(batch["pixels"]), batch["code"], strict=True)


def measure_rooms(
    reader: Reader, sources: Sequence[Source], tokenizer: DepthTokenizer
) -> dict[str, str]:
    """Codes, order of marked points, letters, objects."""
    right, order, best_order, close, nearest = [], [], [], [], []
    all_codes, errors, objects = [], [], Matches()
    for view, read, codes in read_all(reader, sources, tokenizer, "rooms"):
        assert view.depth is not None
        read_codes = read["code"].argmax(-1)
        right += (read_codes == codes).flatten().tolist()
        all_codes.append(codes.flatten().numpy())
        written, best = (tokenizer.decode(c.flatten().tolist()) for c in (read_codes, codes))
        true = fit_map(view.depth, len(written))
        errors.append([np.abs(one - true).mean() for one in (written, best)])
        for one, other in combinations(view.points, 2):
            is_nearer = one.depth > other.depth
            for depth, into in ((written, order), (best, best_order)):
                into.append(
                    (depth_at(depth, one.x, one.y) > depth_at(depth, other.x, other.y)) == is_nearer
                )
        places = find_letters(read["letter"], read["point"], [p.letter for p in view.points])
        close += [_is_close(places[p.letter], place_in_cells(p)) for p in view.points]
        if len(view.points) > 1:
            inside = {k: tuple(min(max(v, 0.0), GRID - 1e-3) for v in p) for k, p in places.items()}
            answer = answer_from_map(written, inside, GRID).nearest  # type: ignore[arg-type]
            nearest.append(answer == max(view.points, key=lambda p: p.depth).letter)
        objects.add(find_centers(read["kind"], read["box"]), view.things)
    counts = [np.bincount(column).max() for column in np.array(all_codes).T]
    return {
        "depth codes, top-1 (gate 0.7)": share(right),
        "always the commonest code of the place": f"{sum(counts) / len(right):.3f} | {len(right)}",
        "pairs of marked points in order on the read map (gate 0.93)": share(order),
        "the same on the map of the true codes": share(best_order),
        "mean error of the read map, of that of the true codes": "{:.4f}, {:.4f}".format(
            *np.mean(errors, axis=0)
        )
        + f" | {len(errors)}",
        "letters within half a cell (gate 0.95)": share(close),
        "nearest point by the read map at the read places": share(nearest),
        "objects of rooms: F1 of centres with kinds": f"{objects.say()} | {len(objects.rows)}",
    }


def measure_counting(
    reader: Reader, sources: Sequence[Source], tokenizer: DepthTokenizer
) -> dict[str, str]:
    """Centres of the kind that is asked about."""
    asked, same_number = Matches(), []
    for view, read, _ in read_all(reader, sources, tokenizer, "counting"):
        kind = view.things[0].kind
        found = [f for f in find_centers(read["kind"], read["box"]) if f.kind == kind]
        things = [thing for thing in view.things if thing.kind == kind]
        asked.add(found, things)
        same_number.append(len(found) == len(things))
    return {
        "centres of the kind asked about, F1 (gate 0.9)": f"{asked.say()} | {len(asked.rows)}",
        "as many as there are": share(same_number),
    }


def main() -> None:
    """Read the scenes, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rooms", type=Path, required=True, help="held-out, of make-scenes")
    parser.add_argument(
        "--counting", type=Path, required=True, help="held-out, of make-counting-scenes"
    )
    parser.add_argument("--limit", type=int, help="pictures of each kind")
    args = parser.parse_args()
    try:
        settings = vision_settings(args.config, args.overrides)
        tokenizer = check_tokenizer(load_depth_tokenizer(settings.depth_tokenizer))
        rooms = room_sources(args.rooms)[: args.limit]
        counting = counting_sources(args.counting)[: args.limit]
        reader, step = Reader.load(settings)
    except (OSError, ValueError, VPTError) as exc:
        parser.error(str(exc))
    rows = measure_rooms(reader, rooms, tokenizer)
    rows |= measure_counting(reader, counting, tokenizer)
    print(f"| step {step} | value [95 %] | n |\n|---|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
