"""Requests of every kind, valid and not: an answer or an error of ours, alone and in batches."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.limits import within_limits
from golden_data import GOLDENS
from PIL import Image
from tiny_model import tiny_model

import vpt
from vpt.boxes import GridBox
from vpt.errors import RunError, VPTError
from vpt.inference.request import Sampling

PHOTO = GOLDENS / "images" / "a_scene.png"
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "I", "F")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "PDF")
FITTING = {
    "perception": ["auto", "none", "region", "reencode", "clip", "dino", "sam"],
    "max_calls": [0, 1, 2, np.int64(2), 10**6],
    "max_new_tokens": [1, 2, 4, np.int32(3)],
    "constrain": [True, False, np.True_],
    "look_at": ["first", "latest"],
    "system": [None, "", "Be brief.", "é 猫"],
    "region": [None, GridBox(0, 0, 1, 1), GridBox(2, 1, 7, 7), GridBox(0, 0, 8, 8)],
    "replace_looks": [None, "blank", "random"],
    "temperature": [0, 0.7, 1e-40, 1e-320, 1e300, np.float32(2)],
    "top_k": [0, 1, 5, 10**30],
    "top_p": [1, 0.5, 1e-300, np.float64(0.9)],
    "seed": [0, 1, 2**64 - 1, np.uint64(3)],
}
ODD = [
    *(None, True, "8", "", "foo", b"x", -1, 0, 1.5, float("nan"), float("inf"), -0.0),
    *(2**64, -(2**63), 10**400, (1,), [], {}, set(), object(), Path("x"), np.zeros(2), np.bool_(0)),
    *(np.float16("nan"), np.str_("auto"), torch.tensor(3), Sampling(), range(3), int, "\ud800"),
]
QUESTIONS = ["What?", "é 猫 🙂", "a\x00b", "x" * 500, "<image>", "\u202e", "Region 0:"]
ODD_QUESTIONS = ["", "<|im_end|>", "<|vision_start|>", "<|x_1|>", "\ud800", None, 3, b"What?"]


@pytest.fixture(scope="module")
def runtime():
    return vpt.Runtime(*tiny_model())


def make_picture(draw):
    size = draw.choice([(1, 1), (1, 300), (250, 1), (draw.randint(1, 90), draw.randint(1, 90))])
    return Image.effect_noise(size, 60).convert("RGB")


def as_file(draw, picture):
    buffer, kind = io.BytesIO(), draw.choice(FORMATS)
    if kind == "ICO":  # Pillow writes icons of some sizes only
        picture = picture.resize((16, 16))
    picture.save(buffer, format=kind)
    return buffer.getvalue()


def make_image(draw, folder):
    """One image in any form, or something that is none."""
    kind, picture = draw.randrange(12), make_picture(draw)
    if kind == 0:
        return draw.choice([PHOTO, str(PHOTO), vpt.load_image(PHOTO)])
    if kind == 1:
        return draw.choice(
            ["missing.png", "http://x/y.png", "a\x00b", ".", Path("/"), "", "data:x"]
        )
    if kind == 2:
        return draw.choice(ODD)
    if kind == 3:
        return draw.randbytes(draw.randrange(200))
    if kind == 4:
        data = as_file(draw, picture)
        return data[: draw.randrange(len(data))]
    if kind == 5:
        data = bytearray(as_file(draw, picture))
        for _ in range(draw.randint(1, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)
    if kind == 6:
        path = folder / "picture.bin"
        path.write_bytes(as_file(draw, picture))
        return path
    if kind == 7:
        return io.BytesIO(as_file(draw, picture))
    if kind == 8:
        shape = [draw.choice([0, 1, 3, 4, 17]) for _ in range(draw.randrange(5))]
        return np.zeros(shape, draw.choice(["uint8", "float32", "int64", "bool", "object"]))
    mode = draw.choice(MODES)
    through = "L" if mode.startswith(("I", "F")) else "RGB"  # Pillow converts to them from L only
    return picture if mode == "LAB" else picture.convert(through).convert(mode)


def make_request(draw, folder):
    """Arguments of a request; most are valid."""
    images = make_image(draw, folder) if draw.random() < 0.5 else PHOTO
    if draw.random() < 0.3:
        images = [images, *(make_image(draw, folder) for _ in range(draw.randrange(3)))]
    if draw.random() < 0.1:
        images = draw.choice([[], (), [[PHOTO]], {"a": PHOTO}, iter([PHOTO])])
    given = {"images": images, "max_new_tokens": draw.randint(1, 4)}
    given["question"] = draw.choice(QUESTIONS if draw.random() < 0.9 else ODD_QUESTIONS)
    for name in draw.sample(sorted(FITTING), draw.randrange(4)):
        value = draw.choice(FITTING[name] if draw.random() < 0.9 else ODD)
        if name != "max_new_tokens" or not isinstance(value, int) or value < 9:  # ends soon
            given[name] = value
    if draw.random() < 0.04:
        given[draw.choice(["max_token", "sampling", "images"])] = draw.choice(ODD)
    if draw.random() < 0.02:
        del given[draw.choice(list(given))]
    return given


def check(outcome):
    """An answer, or an error of ours that is no bug."""
    assert isinstance(outcome, vpt.Answer | VPTError)
    if isinstance(outcome, RunError):
        raise outcome
    assert not isinstance(outcome, VPTError) or str(outcome)


def ask_alone(runtime, given, what):
    with within_limits(what):
        if not {"images", "question"} <= set(given):
            return
        try:
            check(runtime.ask(**given))
        except VPTError as exc:
            check(exc)


def run(runtime, numbers, folder):
    good = {"images": PHOTO, "question": "What is it?", "max_new_tokens": 3}
    expected = runtime.ask(**good).text
    batch = []
    for number in numbers:
        draw = random.Random(number)
        given = make_request(draw, folder)
        if number % 2:
            ask_alone(runtime, given, f"request {number}")
            continue
        batch.append(given)
        if len(batch) < 5:
            continue
        with within_limits(f"the batch that ends with request {number}"):
            answers = runtime.ask_many([*batch, good], draw.randint(1, 6), on_error="return")
        assert len(answers) == len(batch) + 1
        for outcome in answers:
            check(outcome)
        assert answers[-1].text == expected
        batch = []


def test_a_few_requests_are_answered_or_refused(runtime, tmp_path):
    run(runtime, range(60), tmp_path)


@pytest.mark.slow
def test_many_requests_are_answered_or_refused(runtime, tmp_path):
    run(runtime, range(60, 2060), tmp_path)
