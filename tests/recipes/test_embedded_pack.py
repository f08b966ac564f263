"""The trained model is packed small, and loads as it was."""

import pytest
import torch
from drawing import CONTENT, SHAPE
from tiny_model import tiny_model

import vpt
from recipes.embedded import pack as packing
from recipes.embedded.shape import fresh_model
from vpt.depth.tokenizer import DepthTokenizer, load_depth_tokenizer
from vpt.errors import CheckpointError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    model, processor = fresh_model(3)
    eos = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = [eos, eos]  # as a second stage of training leaves it
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_packed_model_is_the_model(trained, tmp_path):
    size = packing.pack(trained, tmp_path)
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir()) < 12e6
    one, other = (vpt.load(str(folder), device="cpu") for folder in (trained, tmp_path))
    weights = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=1e-3, rtol=1e-3)
    assert one.vocabulary.ids == other.vocabulary.ids
    assert len(other.model.generation_config.eos_token_id) == 1


def test_a_small_tokenizer_is_packed_with_the_model(tmp_path):
    model, processor = tiny_model(("clip",), content=CONTENT)
    for one in (model, processor):
        one.save_pretrained(tmp_path / "trained")
    tokenizer = DepthTokenizer(SHAPE.build(3), SHAPE)
    tokenizer.save(tmp_path / "tokenizer")
    size = packing.pack(tmp_path / "trained", tmp_path / "packed", tmp_path / "tokenizer")
    files = [file for file in (tmp_path / "packed").rglob("*") if file.is_file()]
    assert size == sum(file.stat().st_size for file in files)
    packed = load_depth_tokenizer(tmp_path / "packed" / "depth_tokenizer")
    for name, value in tokenizer.network.state_dict().items():
        torch.testing.assert_close(packed.network.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    weights = tmp_path / "packed" / "depth_tokenizer" / "model.safetensors"
    assert weights.stat().st_size < 0.6 * (tmp_path / "tokenizer" / weights.name).stat().st_size


def test_a_model_that_is_too_large_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MOST_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"takes [\d,]+ bytes, more than 1,000"):
        packing.pack(trained, tmp_path)


def test_the_embedded_model_ships_with_the_package():
    runtime = vpt.load(device="cpu")
    assert runtime.name == "embedded"
    assert set(runtime.vocabulary.branches) == {"crop", "reencode", "dino", "sam"}
    files = (file for file in vpt.loading.EMBEDDED_MODEL.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    assert size <= packing.MOST_BYTES
