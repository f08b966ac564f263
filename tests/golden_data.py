"""Reads the goldens: cases, tensors and pixels as tests/goldens/README.md describes them."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

GOLDENS = Path(__file__).parent / "goldens"
VARIANTS = ("clip", "dino", "sam")
PIXEL_STATS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@cache
def tensors(variant, group):
    return load_file(GOLDENS / "goldens" / variant / f"{group}.safetensors")


@cache
def cases(variant, group):
    content = json.loads((GOLDENS / "goldens" / variant / f"{group}.json").read_text())
    return {case["name"]: case for case in content["cases"]}


def case_names(group, variants=VARIANTS):
    return [(v, name) for v in variants for name in cases(v, group)]


def tensor(variant, group, entry):
    value = tensors(variant, group)[entry["tensor"]]
    return value.long() if value.dtype == torch.int32 else value


def outputs(variant, group, name):
    entries = cases(variant, group)[name]["outputs"]
    return {key: tensor(variant, group, entry) for key, entry in entries.items()}


def inputs(variant, group, name):
    """Keyword arguments of forward for one case."""
    case = cases(variant, group)[name]
    result = {}
    if source := case.get("inputs_from"):
        result = inputs(variant, source["group"], source["case"])
    for key, entry in case.get("inputs", {}).items():
        if entry is None:
            result[key] = None
        elif "tensor" in entry:
            result[key] = tensor(variant, group, entry)
        else:
            result[key] = pixels(entry["pixels"], entry["images"])
    return result


@cache
def _image_tensors():
    return load_file(GOLDENS / "image_tensors.safetensors")


@cache
def image_records():
    return json.loads((GOLDENS / "image_tensors.json").read_text())


def pixels(kind, images):
    if kind == "qwen":
        return torch.cat([_image_tensors()[f"qwen/{image}/pixel_values"] for image in images])
    return torch.stack([_encoder_pixels(kind, image) for image in images])


def _encoder_pixels(kind, image):
    path = GOLDENS / image_records()[kind][image]["uint8_png"]
    values = torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255)
    mean, std = (torch.tensor(values) for values in PIXEL_STATS)
    chw = ((values - mean) / std).permute(2, 0, 1)
    if kind == "sam":
        chw = torch.nn.functional.pad(chw, (0, 1024 - chw.shape[2], 0, 1024 - chw.shape[1]))
    return chw


def plain_positions(input_ids):
    """What ``position_ids=None`` meant in the released forward."""
    return torch.arange(input_ids.shape[1]).expand(3, *input_ids.shape)
