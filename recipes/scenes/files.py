"""Folders of generated scenes: pictures, depth maps, and the objects in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from recipes.scenes.rendering import draw_scene
from recipes.splits import write_split
from vpt.data.depth_rows import OBJECTS
from vpt.data.making import save_picture
from vpt.depth.maps import write_map

IMAGES, DEPTH = "images", "depth"


def write_scenes(
    folder: Path, split: str, num_scenes: int, seed: int, size_px: int, num_workers: int = 1
) -> Iterator[int]:
    """Write ``images/000000.jpg``, ``depth/000000.png`` of 16 bits and a line of ``objects.jsonl``.

    Yields:
        The number of each scene, when it is done.
    """
    write = partial(_write_scene, folder, split, seed, size_px)
    recipe = {"split": split, "seed": seed, "size_px": size_px}
    folders = (IMAGES, DEPTH)
    return write_split(folder, recipe, folders, num_scenes, write, "".join, OBJECTS, num_workers)


def _write_scene(folder: Path, split: str, seed: int, size_px: int, number: int) -> str:
    scene = draw_scene(seed, number, split, size_px)
    image, depth = f"{IMAGES}/{number:06d}.jpg", f"{DEPTH}/{number:06d}.png"
    if not (folder / depth).exists():  # it comes last
        save_picture(scene.image, folder / image)
        write_map(scene.depth, folder / depth)
    objects = [asdict(item) for item in scene.objects]
    return json.dumps({"image": image, "depth": depth, "objects": objects}) + "\n"
