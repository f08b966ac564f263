"""What the tests of Aurora's data share: maps, and a depth tokenizer that needs no training."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from vpt.depth.maps import write_map


class GreyTokenizer:
    """Codes a map by the mean of each of 10 x 10 cells."""

    config = SimpleNamespace(num_cells=100, num_codes=128, size_px=80)
    network = torch.nn.Identity()

    def encode(self, depth):
        rows = np.array_split(depth, 10, axis=0)
        cells = [cell.mean() for row in rows for cell in np.array_split(row, 10, axis=1)]
        return tuple(min(int(value * 128), 127) for value in cells)

    def decode(self, codes):
        grid = (np.array(codes, np.float32).reshape(10, 10) + 0.5) / 128
        return np.kron(grid, np.ones((8, 8), np.float32))


def blocks(seed, size=80):
    """A map of flat blocks at several depths, ``[size, size]``."""
    grid = np.random.default_rng(seed).random((5, 5)).astype(np.float32)
    return np.kron(grid, np.ones((size // 5, size // 5), np.float32))


def write_photos(folder, num, size=80):
    """Photos and maps as `python -m recipes make-scenes` lays them out, without drawing scenes."""
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True)
    lines = []
    for number in range(num):
        depth = blocks(number, size)
        write_map(depth, folder / f"depth/{number:06d}.png")
        grey = Image.fromarray((depth * 255).astype(np.uint8)).convert("RGB")
        grey.save(folder / f"images/{number:06d}.jpg")
        lines.append(f'{{"image": "images/{number:06d}.jpg", "depth": "depth/{number:06d}.png"}}\n')
    (folder / "objects.jsonl").write_text("".join(lines))
    return folder
