"""A new branch is one class and one table row: this toy has nothing else, and works everywhere."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bases import save_base
from PIL import Image
from torch import nn

import vpt
from vpt import cli
from vpt.branches import Features
from vpt.branches.encoder import EncoderBranch, complete_settings
from vpt.evaluation.evaluation import main as evaluate
from vpt.model.encoding import RowEncoder, collate
from vpt.protocol.tokens import BRANCH_TOKENS, BranchRow
from vpt.view.picture import draw, shown_in_panels
from vpt.view.renderers import seen_box_px
from vpt.view.timeline import timeline_html

SIDE, PATCH = 64, 16
PREPROCESS = {
    "size": {"shortest_edge": SIDE},
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
}


class ToyBranch(EncoderBranch):
    """Mean colours of patches, of the middle of an image."""

    name = "toy"
    released_preprocess = PREPROCESS

    def __init__(self, settings):
        encoder = nn.Conv2d(3, 5, PATCH, PATCH)
        encoder.config = SimpleNamespace(patch_size=PATCH)
        super().__init__(encoder, self._pixels, settings, feature_dim=5)

    @classmethod
    def build(cls, settings, backbone):
        return cls(complete_settings(settings.get("preprocess"), cls.released_preprocess))

    @staticmethod
    def _pixels(images, return_tensors):
        arrays = [np.array(image.resize((SIDE, SIDE))) / 255 for image in images]
        return {"pixel_values": torch.tensor(np.array(arrays)).permute(0, 3, 1, 2)}

    def encode(self, pixel_values):
        maps = self.encoder(pixel_values.to(self.encoder.weight))  # [B, 5, h, w]
        return [Features(one.flatten(1).T, tuple(one.shape[-2:])) for one in maps]


ROW = BranchRow(
    branch="toy",
    released="plaything",
    encoder="toy",
    title="the toy encoder",
    home=f"{__name__}:ToyBranch",
    stem="linear",
    arguments=("toy_images",),
)


@pytest.fixture(scope="module", autouse=True)
def toy_row():
    BRANCH_TOKENS["toy"] = ROW
    yield
    del BRANCH_TOKENS["toy"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    values = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(values).save(file)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made by ``vpt init`` of a plain Qwen2-VL."""
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("made") / "model"
    save_base(base)
    assert cli.main(["init", "--base", str(base), "--branches", "clip,toy", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def runtime(folder):
    return vpt.load(folder)


@pytest.fixture(scope="module")
def answer(runtime, photo):
    return runtime.ask(photo, "What is it?", perception="toy", max_new_tokens=12)


def test_a_new_model_has_the_branch(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_encoder_ls"] == ["clip", "toy"]
    assert config["plaything_action_id"] is not None
    assert "<|plaything_action_start|>" in (folder / "tokenizer.json").read_text()


@pytest.fixture(scope="module")
def row(photo):
    messages = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": ROW.call},
        {"role": "user", "content": ROW.placeholder},
        {"role": "assistant", "content": "A toy."},
    ]
    return {"messages": messages, "images": [str(photo)], ROW.column: [str(photo)]}


def test_a_row_trains_projector_and_encoder(folder, photo, row):
    runtime = vpt.load(folder)
    model, processor = runtime.model, runtime.processor
    encoder = RowEncoder(model.config, processor)
    sample = encoder.encode(row)
    pad = processor.tokenizer.convert_tokens_to_ids(ROW.pad)
    assert sample.input_ids.count(pad) == (SIDE // PATCH) ** 2
    assert encoder.pixels.count([("toy", str(photo))]) == {"toy": [(SIDE // PATCH) ** 2]}
    batch = collate([sample], processor.tokenizer.pad_token_id)
    assert batch["toy_images"].shape == (1, 3, SIDE, SIDE)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    parts = (model.projector("toy").linear_feature, model.projector("toy").linear_condition)
    for part in (*parts, model.branches["toy"].encoder):
        assert part.weight.grad.abs().sum() > 0


def test_generate_accepts_pixels_of_a_branch_added_after_import(runtime, row):
    model, processor = runtime.model, runtime.processor
    sample = RowEncoder(model.config, processor).encode(row, predict=True)
    batch = collate([sample], processor.tokenizer.pad_token_id, side="left")
    del batch["labels"]
    written = model.generate(**batch, max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        logits = model(**batch).logits
    assert written[0, len(sample.input_ids)] == logits[0, -1].argmax()


def test_a_saved_model_answers_as_before(runtime, answer, photo, tmp_path):
    runtime.model.save_pretrained(tmp_path)
    runtime.processor.save_pretrained(tmp_path)
    again = vpt.load(tmp_path).ask(photo, "What is it?", perception="toy", max_new_tokens=12)
    assert again.text == answer.text
    assert again.trace.calls[0].scores == answer.trace.calls[0].scores


def test_the_trace_holds_the_call(answer, tmp_path):
    (call, *_) = answer.trace.calls
    assert (call.branch, call.outcome, call.text) == ("toy", "executed", ROW.call)
    assert call.grid_hw == (SIDE // PATCH, SIDE // PATCH)
    assert len(call.scores) == (SIDE // PATCH) ** 2
    answer.trace.save(tmp_path / "trace.json")
    assert vpt.Trace.load(tmp_path / "trace.json").to_dict() == answer.trace.to_dict()


def test_picture_and_timeline_show_the_look(answer, photo):
    assert seen_box_px("toy", (120, 60)) == pytest.approx((30, 0, 90, 60), abs=1)
    image = Image.open(photo).convert("RGB")
    without = vpt.Trace.from_dict({**answer.trace.to_dict(), "calls": []})
    drawn, plain = shown_in_panels(answer.trace), shown_in_panels(without)
    assert len(drawn) == len(plain) + len(answer.trace.calls) > len(plain)
    assert draw(answer.trace, [image]) != draw(without, [image])
    assert "the toy encoder" in timeline_html(answer.trace)


def test_the_command_line_asks_for_it(folder, photo, tmp_path, capsys):
    words = ["ask", "--model", folder, "--perception", "toy", "--max-new-tokens", 8]
    words += ["--picture", tmp_path / "seen.png", "--json", photo, "What is it?"]
    assert cli.main([*map(str, words)]) == 0
    assert json.loads(capsys.readouterr().out)["calls"][0]["branch"] == "toy"
    assert (tmp_path / "seen.png").stat().st_size > 0


def test_the_report_of_an_evaluation_shows_it(folder, photo, tmp_path, capsys):
    split = tmp_path / "own.jsonl"
    entry = {"image": str(photo), "question": "What is it?", "answer": "x"}
    split.write_text(json.dumps(entry) + "\n")
    words = ["--splits", split, "--model", folder, "--device", "cpu", "--perception", "toy"]
    out = tmp_path / "run"
    assert evaluate([*map(str, [*words, "--max-new-tokens", 8, "--out", out])]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [entry["condition"] for entry in results["splits"]] == ["toy"]
    (record,) = (out / "records").glob("*--toy.jsonl")
    assert json.loads(record.read_text())["trace"]["calls"][0]["branch"] == "toy"
    assert ">toy<" in (out / "report.html").read_text()
