"""A crop narrowed to an object: the rest is dimmed, and the trace says by how much."""

import json

import numpy as np
import pytest
import torch
from colors import ColorDetector
from PIL import Image
from tiny_model import tiny_model

import vpt
from vpt.boxes import GridBox
from vpt.cli import main
from vpt.errors import CheckpointError, PromptError
from vpt.images import load_image
from vpt.inference.results import dim_rest
from vpt.segmenter import Segmenter
from vpt.trace.records import Trace

BOX = (100, 60, 160, 120)


class FilledBox:
    """Takes all of a box for the object."""

    def __init__(self):
        self.asked = []

    def segment(self, image, box):
        self.asked.append(box)
        box = box if len(box) == 4 else (*box, box[0] + 1, box[1] + 1)
        mask = np.zeros(image.size[::-1], dtype=bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        return mask


@pytest.fixture
def segmenter():
    return FilledBox()


@pytest.fixture(scope="module")
def made():
    return tiny_model()


@pytest.fixture
def runtime(made, segmenter):
    return vpt.Runtime(*made, detector=ColorDetector(), segmenter=segmenter)


def blue(size=(320, 240)):
    image = Image.new("RGB", size, (200, 180, 160))
    image.paste((0, 0, 255), BOX)
    return image


LOOK = {"look_for": "blue", "mask": True, "max_calls": 1, "max_new_tokens": 12}


def test_the_rest_is_dimmed_to_a_quarter():
    pixels = Image.new("RGB", (4, 2), (200, 100, 40))
    mask = np.zeros((2, 4), dtype=bool)
    mask[0, 1] = True
    dimmed = np.asarray(dim_rest(pixels, mask))
    assert dimmed[0, 1].tolist() == [200, 100, 40]
    assert (dimmed[~mask] == [50, 25, 10]).all()
    assert dim_rest(pixels, ~mask & False) is pixels


def test_a_found_box_is_what_the_segmenter_is_asked_about(runtime, segmenter, tmp_path):
    answer = runtime.ask(blue(), "What?", **LOOK)
    assert segmenter.asked == [BOX]
    (look,) = answer.looks
    record = answer.trace.images[1]
    x0, y0, x1, y1 = record.box_xyxy_px
    assert record.object_share == pytest.approx(60 * 60 / ((x1 - x0) * (y1 - y0)))
    crop = np.asarray(look.crop, dtype=int)
    inside = crop[BOX[1] - y0 + 4 : BOX[3] - y0 - 4, BOX[0] - x0 + 4 : BOX[2] - x0 - 4]
    assert abs(inside - [0, 0, 255]).max() < 20
    assert abs(crop[0, 0] - [50, 45, 40]).max() < 20  # JPEG keeps it roughly
    answer.trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == answer.trace
    assert answer.trace.settings["mask"] is True
    answer.picture()


def test_the_model_sees_what_the_trace_shows(runtime, made):
    masked = runtime.ask(blue(), "What?", **LOOK)
    plain = runtime.ask(blue(), "What?", **LOOK | {"mask": False})
    assert masked.trace.images[1].digest != plain.trace.images[1].digest
    assert plain.trace.images[1].object_share is None
    assert masked.trace.counts.prompt_tokens == plain.trace.counts.prompt_tokens


def test_a_region_without_a_found_box_asks_about_its_cells(runtime, segmenter):
    options = {"region": GridBox(2, 2, 3, 3), "mask": True, "max_calls": 1, "max_new_tokens": 8}
    runtime.ask(blue(), "What?", **options)
    assert segmenter.asked == [(80, 60, 160, 120)]
    runtime.ask(blue(), "What?", **options)
    assert len(segmenter.asked) == 1  # kept


def test_a_point_names_its_cell_and_the_object_there(runtime, segmenter):
    options = {"mask": True, "max_calls": 1, "max_new_tokens": 8}
    answer = runtime.ask(blue(), "What?", point=(130, 90), **options)
    assert segmenter.asked == [(130, 90)]
    (call,) = answer.trace.calls
    assert call.region == (3, 3, 3, 3) and answer.trace.settings["point"] == [130, 90]
    assert Trace.from_dict(json.loads(answer.trace.to_json())) == answer.trace
    corner = runtime.ask(blue(), "What?", point=(319, 239), max_calls=1, max_new_tokens=8)
    assert corner.trace.calls[0].region == (7, 7, 7, 7)
    tiny = runtime.ask(Image.new("RGB", (3, 2)), "What?", point=(2, 1), max_new_tokens=8)
    assert tiny.trace.calls[0].box_xyxy_px[2:] == (3, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"point": (320, 0)}, "point 320, 0 lies outside image 0, which has 320x240 px"),
        ({"point": (-1, 0)}, "point must be a whole number of at least 0"),
        ({"point": (1,)}, "point must be x and y in pixels"),
        ({"point": (1, 2), "look_for": "blue"}, "look_for and point both name the first look"),
        ({"point": (1, 2), "max_calls": 0}, "point needs an image, a call"),
    ],
)
def test_what_is_no_point_is_refused(runtime, options, words):
    with pytest.raises(PromptError, match=words):
        runtime.ask(blue(), "What?", **options)


def test_replaced_looks_are_not_dimmed(runtime, segmenter):
    answer = runtime.ask(blue(), "What?", replace_looks="random", **LOOK)
    assert not segmenter.asked and answer.trace.images[1].object_share is None


def test_no_object_leaves_the_crop_as_it_is_and_warns(made):
    class Nothing:
        def segment(self, image, box):
            return np.zeros(image.size[::-1], dtype=bool)

    runtime = vpt.Runtime(*made, detector=ColorDetector(), segmenter=Nothing())
    answer = runtime.ask(blue(), "What?", **LOOK)
    assert answer.trace.images[1].object_share == 0
    assert any("no object was found in box" in one for one in answer.warnings)


def test_several_boxes_are_several_regions(made):
    class Two:
        def propose(self, image, phrase):
            boxes = [(0, 0, 30, 30), (280, 200, 310, 230), (281, 201, 309, 229)]
            return [vpt.branches.Proposal(box, 0.9, phrase) for box in boxes]

    runtime = vpt.Runtime(*made, detector=Two())
    options = {"look_for": "tags", "max_calls": 1, "max_new_tokens": 30}
    (one,) = runtime.ask(blue(), "What?", **options).trace.calls
    calls = runtime.ask(blue(), "What?", max_boxes=3, **options).trace.calls
    assert calls[0].region == one.region
    assert len({call.region for call in calls}) == len(calls) == 2
    assert {call.turn for call in calls} == {0}
    with pytest.raises(PromptError, match=r"max_boxes must be .* at most 4"):
        runtime.ask(blue(), "What?", max_boxes=5, **options)


def test_without_a_segmenter_the_request_is_refused(made):
    runtime = vpt.Runtime(*made, detector=ColorDetector())
    with pytest.raises(PromptError, match="mask needs a segmenter: load the model with segmenter="):
        runtime.ask(blue(), "What?", **LOOK)


def test_a_mask_of_another_size_is_told(made):
    class Small:
        def segment(self, image, box):
            return np.ones((3, 4), dtype=bool)

    with pytest.raises(CheckpointError, match=r"a mask of \[3, 4\]; expected \[H, W\], \[240, 320"):
        Segmenter(Small()).segment(load_image(blue()), BOX)


@pytest.mark.parametrize("name", ["missing-folder", "missing.pth"])
def test_a_segmenter_that_cannot_be_loaded_is_told(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"cannot load the segmenter .*missing"):
        Segmenter(str(tmp_path / name)).segment(load_image(blue()), BOX)


def test_weights_of_another_kind_are_told(tmp_path):
    pytest.importorskip("segment_anything")
    torch.save({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"not a file of segment-anything; expected its ViT"):
        Segmenter(tmp_path / "other.pth").segment(load_image(blue()), BOX)


def tiny_sam(folder):
    from transformers import SamConfig, SamModel, SamProcessor
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64}
    vision |= {"image_size": 128, "patch_size": 16, "output_channels": 32, "window_size": 4}
    vision |= {"global_attn_indexes": [1], "num_pos_feats": 16}
    prompt = {"hidden_size": 32, "image_size": 128, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2}
    parts = {"prompt_encoder_config": prompt, "mask_decoder_config": decoder}
    torch.manual_seed(0)
    SamModel(SamConfig(vision_config=vision, **parts)).save_pretrained(folder)
    sizes = {"size": {"longest_edge": 128}, "pad_size": {"height": 128, "width": 128}}
    mask_sizes = {"mask_size": {"longest_edge": 32}, "mask_pad_size": {"height": 32, "width": 32}}
    SamProcessor(SamImageProcessorPil(**sizes, **mask_sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", [(320, 240), (90, 200)])
def test_sam_of_transformers_gives_a_mask_of_the_image(tmp_path, size):
    segmenter = Segmenter(tiny_sam(tmp_path / "sam"))
    for place in ((10, 20, 80, 100), (40, 60)):
        mask = segmenter.segment(load_image(blue(size)), place)
        assert mask.shape == size[::-1] and mask.dtype == bool


@pytest.mark.slow
def test_sam_of_the_package_gives_a_mask_of_the_image(tmp_path):
    package = pytest.importorskip("segment_anything")
    torch.save(package.sam_model_registry["vit_b"]().state_dict(), tmp_path / "sam.pth")
    segmenter = Segmenter(tmp_path / "sam.pth")
    for place in (BOX, (130, 90)):
        mask = segmenter.segment(load_image(blue()), place)
        assert mask.shape == (240, 320) and mask.dtype == bool


def test_the_command_line_takes_it(capsys, monkeypatch, tmp_path, segmenter):
    load = vpt.load
    finders = {"detector": ColorDetector(), "segmenter": segmenter}
    monkeypatch.setattr(
        "vpt.loading.load", lambda *args, **options: load(*args, **{**options, **finders})
    )
    words = ["examples/tags.jpg", "What number is on the blue one?", "--look-for", "the blue tag"]
    words += ["--mask", "--max-calls", "1", "--device", "cpu", "--json"]
    assert not main(["ask", *words])
    trace = json.loads(capsys.readouterr().out)
    assert 0 < trace["images"][1]["object_share"] < 1
