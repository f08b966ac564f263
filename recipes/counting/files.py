"""Folders of generated counting scenes, annotated as LVIS annotates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from recipes.counting.scenes import Counted, CountingScene, draw_counting_scene
from recipes.embedded.marks import SHAPES
from recipes.splits import write_split
from vpt.data.making import save_picture

IMAGES, ANNOTATIONS = "images", "annotations.json"


def write_counting_scenes(
    folder: Path,
    split: str,
    num_scenes: int,
    seed: int,
    size_px: int,
    num_workers: int = 1,
    *,
    one_of_each: bool = False,
) -> Iterator[int]:
    """Write ``images/000000.jpg`` and so on, and ``annotations.json`` in the format of LVIS.

    The category that is asked about is the only one annotated exhaustively; the others are
    distractors.

    Yields:
        The number of each scene, when it is done.
    """
    write = partial(_write_scene, folder, split, seed, size_px, one_of_each)
    kind = "one of each" if one_of_each else "counting"
    recipe = {"split": split, "seed": seed, "size_px": size_px, "of": kind}
    return write_split(
        folder, recipe, (IMAGES,), num_scenes, write, _describe, ANNOTATIONS, num_workers
    )


def _write_scene(
    folder: Path, split: str, seed: int, size_px: int, one_of_each: bool, number: int
) -> tuple[dict[str, Any], list[Counted]]:
    scene = draw_counting_scene(seed, number, split, size_px, one_of_each=one_of_each)
    name = f"{number:06d}.jpg"
    if not (folder / IMAGES / name).exists():
        save_picture(scene.image, folder / IMAGES / name)
    return _describe_image(number, name, scene), list(scene.things)


def _describe(scenes: list[tuple[dict[str, Any], list[Counted]]]) -> str:
    """Content of ``annotations.json``."""
    annotations: list[dict[str, Any]] = []
    for image, things in scenes:
        for thing in things:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": SHAPES.index(thing.kind) + 1,
                    "bbox": _as_bbox(thing.box),
                    "area": (thing.box[2] - thing.box[0]) * (thing.box[3] - thing.box[1]),
                    "iscrowd": 0,
                    "color": thing.color,
                }
            )
    return json.dumps(
        {
            "images": [image for image, _ in scenes],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in enumerate(SHAPES, 1)],
        }
    )


def _describe_image(number: int, name: str, scene: CountingScene) -> dict[str, Any]:
    """Entry of a picture in the annotations.

    Distractors are marked as not exhaustive, so that questions are about the kind whose number was
    drawn, which makes all numbers equally likely.
    """
    asked = scene.things[0].kind
    others = sorted({SHAPES.index(t.kind) + 1 for t in scene.things if t.kind != asked})
    return {
        "id": number,
        "file_name": name,
        "width": scene.image.width,
        "height": scene.image.height,
        "not_exhaustive_category_ids": others,
        "look": scene.look,
    }


def _as_bbox(box: tuple[int, int, int, int]) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
