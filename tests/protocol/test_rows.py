"""Rows of the released format become the ids, labels and pixels that were recorded."""

import json

import golden_data as golden
import pytest
import torch
from golden_data import GOLDENS, VARIANTS

from vpt.errors import FeatureCountError, PromptError, RegionError
from vpt.model.config import load_config
from vpt.model.encoding import RowEncoder, collate, open_row_image, share_room
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import split_crop_suffix


def recorded(variant):
    return json.loads((GOLDENS / "goldens" / variant / "data_pipeline.json").read_text())


def unroll(ids):
    """``[id, n]`` in a recorded list stands for n repetitions."""
    return [
        i for entry in ids for i in ([entry[0]] * entry[1] if isinstance(entry, list) else [entry])
    ]


@pytest.fixture(scope="module")
def encoders():
    made = {}
    for variant in VARIANTS:
        folder = str(GOLDENS / "checkpoints" / variant)
        made[variant] = RowEncoder(
            load_config(folder),
            VPTProcessor.from_pretrained(folder),
            lambda path: open_row_image(path, GOLDENS),
        )
    return made


SAMPLES = [(v, s["name"]) for v in VARIANTS for s in recorded(v)["samples"]]


@pytest.mark.parametrize(("variant", "name"), SAMPLES)
def test_a_row_is_encoded_as_released(encoders, variant, name):
    (expected,) = [s for s in recorded(variant)["samples"] if s["name"] == name]
    for mode in ("train", "predict"):
        sample = encoders[variant].encode(expected["row"], predict=mode == "predict")
        assert sample.input_ids == unroll(expected[mode]["input_ids"])
        assert sample.labels == unroll(expected[mode]["labels"])
    mm_inputs = expected["mm_inputs"]
    assert set(sample.pixels) == set(mm_inputs)
    for key, entry in mm_inputs.items():
        if isinstance(entry, list):
            assert sample.pixels[key].tolist() == entry
        else:
            assert torch.equal(sample.pixels[key], golden.pixels(entry["pixels"], entry["images"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_long_rows_are_cut_as_released(encoders, variant):
    content = recorded(variant)
    rows = {s["name"]: s["row"] for s in content["samples"]}
    for expected in content["cutoff"]:
        cutoff_len = expected["cutoff_len"]
        sample = encoders[variant].encode(rows[expected["sample"]], cutoff_len=cutoff_len)
        assert sample.input_ids == unroll(expected["input_ids"]), (expected["sample"], cutoff_len)
        assert sample.labels == unroll(expected["labels"])
        assert len(sample.input_ids) <= cutoff_len


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ((10, 5, 100), (10, 5)),
        ((50, 5, 20), (15, 5)),
        ((5, 50, 20), (5, 15)),
        ((30, 10, 20), (15, 5)),
        ((30, 10, 0), (0, 0)),
        ((30, 10, -4), (0, 0)),
    ],
)
def test_room_is_shared_between_prompt_and_answer(lengths, kept):
    assert share_room(*lengths) == kept


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_are_collated_as_released(encoders, variant):
    content = recorded(variant)
    rows = {s["name"]: s["row"] for s in content["samples"]}
    for expected in content["batches"]:
        predict = expected["mode"] == "predict"
        samples = [encoders[variant].encode(rows[n], predict=predict) for n in expected["rows"]]
        batch = collate(
            samples,
            pad_token_id=470,
            side=expected["padding_side"],
            pad_to_multiple_of=expected["pad_to_multiple_of"],
        )
        for key in ("input_ids", "attention_mask", "labels"):
            assert batch[key].tolist() == [unroll(row) for row in expected[key]], key
        assert batch["image_grid_thw"].tolist() == expected["image_grid_thw"]
        for key, shape in expected["mm_shapes"].items():
            assert list(batch[key].shape) == shape


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b.png", ("a/b.png", None)),
        ("a/b.png_1,2,3,4", ("a/b.png", (1, 2, 3, 4))),
        ("a_b.x/c.jpeg_-1,0,30,40", ("a_b.x/c.jpeg", (-1, 0, 30, 40))),
        ("a/b_1,2,3,4", ("a/b_1,2,3,4", None)),
        ("a/b.png_1,2,3", ("a/b.png_1,2,3", None)),
    ],
)
def test_crop_suffixes_are_split_off(path, expected):
    assert split_crop_suffix(path) == expected


def test_a_box_beyond_the_image_is_filled_with_black():
    image = open_row_image("images/a_tall.png_-5,0,10,10", GOLDENS)
    assert image.size_wh == (15, 10)
    assert image.pixels.getpixel((0, 0)) == (0, 0, 0)


def test_an_empty_box_is_refused():
    with pytest.raises(RegionError, match="names an empty box"):
        open_row_image("images/a_tall.png_5,5,5,9", GOLDENS)


def row(*contents, **columns):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    return {"messages": messages, **columns}


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (row("q"), PromptError, "expected user and assistant by turns"),
        (row(), PromptError, "expected user and assistant by turns"),
        (row("<image>q", "a"), FeatureCountError, "more <image> than the row has"),
        (row("q", "a", images=["images/a_tall.png"]), FeatureCountError, "1 image.s. more"),
        (row("<seg_image>q", "a", seg_images=["x.png"]), PromptError, "lacks that branch"),
    ],
)
def test_bad_rows_are_refused(encoders, bad, error, words):
    with pytest.raises(error, match=words):
        encoders["dino"].encode(bad)
