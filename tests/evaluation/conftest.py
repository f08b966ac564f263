"""A tiny runtime with random weights, pictures, and a split of people's own made of them."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_model import tiny_model

from vpt.runtime import Runtime

NUM_SAMPLES = 7


@pytest.fixture(scope="session")
def runtime():
    return Runtime(*tiny_model(), name="tiny")


@pytest.fixture
def own_split(tmp_path):
    """A file of plain annotations, with pictures beside it; every other one has evidence."""
    lines = []
    for number in range(NUM_SAMPLES):
        pixels = np.random.default_rng(number).integers(0, 256, (96, 112, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        line = {"image": f"{number}.png", "question": f"What is number {number}?", "answer": "x"}
        if number % 2 == 0:
            line["box"] = [8, 8, 40, 30]
        lines.append(json.dumps(line))
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
