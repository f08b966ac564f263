"""Folders of generated scenes: pictures, depth maps, and what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from recipes.scenes.rendering import Scene, draw_scene
from vpt.data.depth_rows import OBJECTS
from vpt.data.making import keep_recipe, save_picture
from vpt.depth.maps import write_map
from vpt.files import write_whole

IMAGES, DEPTH = "images", "depth"


def write_scenes(
    folder: Path, split: str, num_scenes: int, seed: int, size_px: int
) -> Iterator[int]:
    """Draw scenes and write them; files that are there are left alone.

    ``images/000000.jpg``, ``depth/000000.png`` with 16 bits, and a line of ``objects.jsonl`` each.

    Args:
        folder: to write into; made if need be.
        split: one of ``rendering.SPLITS``.
        num_scenes: how many.
        seed: the same one gives the same scenes.
        size_px: side of the pictures.

    Yields:
        The number of each scene, when it is done.

    Raises:
        OSError: if a file cannot be written.
        PromptError: if the folder holds other scenes.
    """
    keep_recipe(folder, {"split": split, "seed": seed, "size_px": size_px})
    for name in (IMAGES, DEPTH):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(num_scenes):
        scene = draw_scene(seed, number, split, size_px)
        image, depth = f"{IMAGES}/{number:06d}.jpg", f"{DEPTH}/{number:06d}.png"
        if not (folder / depth).exists():  # it comes last
            save_picture(scene.image, folder / image)
            write_map(scene.depth, folder / depth)
        lines.append(_line(scene, image, depth))
        yield number
    write_whole("".join(lines), folder / OBJECTS)


def _line(scene: Scene, image: str, depth: str) -> str:
    objects = [asdict(item) for item in scene.objects]
    return json.dumps({"image": image, "depth": depth, "objects": objects}) + "\n"
