"""Folders of generated counting scenes, annotated as LVIS annotates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.counting.scenes import CountingScene, draw_counting_scene
from recipes.embedded.marks import SHAPES
from vpt.data.making import keep_recipe, save_picture
from vpt.files import write_whole

IMAGES, ANNOTATIONS = "images", "annotations.json"


def write_counting_scenes(
    folder: Path, split: str, num_scenes: int, seed: int, size_px: int
) -> Iterator[int]:
    """Draw scenes and write them; pictures that are there are left alone.

    ``images/000000.jpg`` and so on, and ``annotations.json`` in the format of LVIS. The category
    that is asked about is the only one annotated exhaustively; the others are distractors.

    Args:
        folder: to write into; made if need be.
        split: one of ``counting_scenes.SPLITS``.
        num_scenes: how many.
        seed: the same one gives the same scenes.
        size_px: side of the pictures.

    Yields:
        The number of each scene, when it is done.

    Raises:
        OSError: if a file cannot be written.
        PromptError: if the folder holds other scenes.
    """
    keep_recipe(folder, {"split": split, "seed": seed, "size_px": size_px, "of": "counting"})
    (folder / IMAGES).mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(num_scenes):
        scene = draw_counting_scene(seed, number, split, size_px)
        name = f"{number:06d}.jpg"
        if not (folder / IMAGES / name).exists():
            save_picture(scene.image, folder / IMAGES / name)
        images.append(_describe_image(number, name, scene))
        for thing in scene.things:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": SHAPES.index(thing.kind) + 1,
                    "bbox": _as_bbox(thing.box),
                    "area": (thing.box[2] - thing.box[0]) * (thing.box[3] - thing.box[1]),
                    "iscrowd": 0,
                    "color": thing.color,
                }
            )
        yield number
    categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_whole(json.dumps(content), folder / ANNOTATIONS)


def _describe_image(number: int, name: str, scene: CountingScene) -> dict[str, Any]:
    """What stands about a picture in the annotations.

    Kinds that only stand in the way are marked as not exhaustive, so that questions are about the
    kind whose number was drawn, which makes all numbers equally likely.
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
