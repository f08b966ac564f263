"""Recorded inputs and outputs of the released implementation (tests/goldens/README.md)."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

GOLDENS = Path(__file__).parents[1] / "goldens"
IMAGES = sorted((GOLDENS / "images").glob("*.png"))
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def read_json(path):
    return json.loads((GOLDENS / path).read_text(encoding="utf-8"))


def open_image(key):
    """Open an image by its key in image_tensors.json, "path" or "path_x0,y0,x1,y1" (a crop)."""
    path, _, box = key.partition(".png_")
    image = Image.open(GOLDENS / (path if not box else path + ".png")).convert("RGB")
    return image.crop(tuple(int(edge) for edge in box.split(","))) if box else image


def recorded_pixels(kind, key):
    """Rebuild ``[1, 3, H, W]`` float32 exactly as recorded, from the uint8 image."""
    entry = read_json("image_tensors.json")[kind][key]
    with Image.open(GOLDENS / entry["uint8_png"]) as image:
        pixels = (np.asarray(image.convert("RGB"), dtype=np.float32) / 255 - MEAN) / STD
    values = torch.from_numpy(pixels.transpose(2, 0, 1))
    if kind == "sam":
        height, width = values.shape[-2:]
        values = torch.nn.functional.pad(values, (0, 1024 - width, 0, 1024 - height))
    return values[None]


def encoder_weights(variant, prefix):
    """Weights of the encoder inside a checkpoint, float32, without the prefix."""
    weights = load_file(GOLDENS / "checkpoints" / variant / "model.safetensors")
    return {
        key.removeprefix(prefix): value.float()
        for key, value in weights.items()
        if key.startswith(prefix)
    }


def golden_output(variant, name):
    return load_file(GOLDENS / "goldens" / variant / "forward.safetensors")[f"action_pos1d/{name}"]
