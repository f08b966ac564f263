"""Measure where the score maps of the embedded model are high: on the object asked about?

Run ``python benchmarks/score_maps.py``. It draws held-out scenes of ``recipes.embedded``, asks
about their objects, and compares the maps of the model's re-encodings with the objects' boxes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

import vpt
from recipes.embedded.make import PARTS
from recipes.embedded.questions import Question, reading_questions
from recipes.embedded.scenes import Scene, draw_scene
from vpt.boxes import Box
from vpt.evaluation.intervals import wilson_interval
from vpt.runtime import Runtime
from vpt.view.renderers import score_map, seen_of_call, z_scores

Grid = NDArray[np.float64]
HELDOUT = next(part for part in PARTS if part.split == "heldout")


@dataclass(frozen=True)
class Map:
    """The z-scores of one re-encoding, ``[h, w]``, and which places belong to what."""

    branch: str
    scene: int
    z: Grid
    asked: NDArray[np.bool_]
    others: NDArray[np.bool_]


def maps_of(runtime: Runtime, num_scenes: int, batch_size: int) -> Iterator[Map]:
    """Maps of the re-encodings that the model chose, up to four questions per scene."""
    asked: list[tuple[int, Scene, Question]] = []
    for number in range(num_scenes):
        rng = np.random.default_rng([HELDOUT.seed, number])
        scene = draw_scene(rng, HELDOUT.split)
        questions = reading_questions(scene, rng)[:4]
        asked += [(number, scene, one) for one in questions if one.mode not in ("direct", "region")]
    requests = [
        {"images": scene.image, "question": one.text, "max_calls": 1, "max_new_tokens": 24}
        for _, scene, one in asked
    ]
    answers = runtime.ask_many(requests, batch_size=batch_size)
    for (number, scene, question), answer in zip(asked, answers, strict=True):
        call = next(iter(answer.trace.calls), None)
        scores = score_map(call) if call else None
        z = None if scores is None else z_scores(scores)
        if call is None or z is None:
            continue
        assert question.item is not None
        seen = seen_of_call(answer.trace, call)
        here = _inside(z.shape, seen, [question.item.box])
        rest = _inside(
            z.shape, seen, [item.box for item in scene.items if item is not question.item]
        )
        yield Map(call.branch, number, z, here, rest & ~here)


def _inside(shape: tuple[int, ...], seen: Box, boxes: Sequence[Box]) -> NDArray[np.bool_]:
    """Places of the map whose centres lie in a box."""
    (height, width), (x0, y0, x1, y1) = shape, seen
    x = x0 + (np.arange(width) + 0.5) / width * (x1 - x0)
    y = (y0 + (np.arange(height) + 0.5) / height * (y1 - y0))[:, None]
    inside = [(a <= x) & (x < c) & (b <= y) & (y < d) for a, b, c, d in boxes]
    return np.any([np.zeros(shape, bool), *inside], axis=0)


def share(hits: Sequence[bool]) -> str:
    """A share with its 95 % Wilson interval."""
    found = wilson_interval(sum(map(int, hits)), len(hits))
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def auc(z: Grid, mask: NDArray[np.bool_]) -> float:
    """Probability that a place in the mask scores higher than one outside of it."""
    inside, outside = z[mask], z[~mask]
    if not len(inside) or not len(outside):
        return float("nan")
    return float(np.mean(inside[:, None] > outside))


def rows(maps: Sequence[Map]) -> Iterator[tuple[str, str]]:
    """What is measured, and its value, of the maps of one encoder."""
    yield "maps", str(len(maps))
    yield "places of a map", "x".join(map(str, maps[0].z.shape[::-1]))
    for name, mask_of in (("object asked about", 0), ("another object", 1)):
        masks = [(one.asked, one.others)[mask_of] for one in maps]
        pairs = list(zip(maps, masks, strict=True))
        yield f"{name}: share of places", f"{np.mean([mask.mean() for mask in masks]):.2f}"
        yield f"{name}: highest score", share([m.flat[one.z.argmax()] for one, m in pairs])
        yield f"{name}: lowest score", share([m.flat[one.z.argmin()] for one, m in pairs])
        inside = [one.z[mask].mean() for one, mask in pairs if mask.any()]
        yield f"{name}: mean z", f"{np.mean(inside):+.2f}" if inside else "-"
    turned = {
        "as drawn": lambda z: z,
        "mirrored": np.fliplr,
        "upside down": np.flipud,
        "transposed": np.transpose,
    }
    for name, turn in turned.items():
        values = [auc(turn(one.z), one.asked | one.others) for one in maps]
        yield f"AUC of objects, {name}", f"{np.nanmean(values):.2f}"
    groups = defaultdict(list)
    for one in maps:
        groups[one.scene].append(one.z.ravel().argsort().argsort())
    pairs_of = [pair for ranks in groups.values() for pair in combinations(ranks, 2)]
    found = [np.corrcoef(a, b)[0, 1] for a, b in pairs_of]
    median = f"{np.median(found):.2f} (n = {len(found)})" if found else "-"
    yield "rank correlation, two questions", median


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    found = list(maps_of(vpt.load(), args.scenes, args.batch_size))
    branches = sorted({one.branch for one in found})
    columns = [dict(rows([one for one in found if one.branch == branch])) for branch in branches]
    print(" | ".join(["", *branches]))
    for name in columns[0]:
        print(" | ".join([name, *(column[name] for column in columns)]))


if __name__ == "__main__":
    main()
