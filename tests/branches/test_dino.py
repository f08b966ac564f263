import hashlib
import json

import pytest
import torch
from PIL import Image
from recorded import IMAGES, encoder_weights, golden_output, open_image, read_json, recorded_pixels
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from vpt.branches import Branch, BranchError, DinoBranch
from vpt.branches.dino import (
    RELEASED_CONFIG,
    RELEASED_PREPROCESS,
    _newer_weights,
)


def tiny_config(**changes):
    numbers = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    return Dinov2Config(**{**numbers, **changes})


@pytest.fixture
def branch():
    torch.manual_seed(0)
    return DinoBranch(tiny_config()).eval()


@pytest.fixture(scope="module")
def recorded_branch():
    config = Dinov2Config(**read_json("checkpoints/dino/dinov2_config.json"))
    branch = DinoBranch(config, read_json("checkpoints/dino/dinov2_preprocessor_config.json"))
    weights = encoder_weights("dino", "detection_model.")
    branch.load_state_dict({f"encoder.{key}": value for key, value in weights.items()})
    return branch.eval()


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_pixels_are_those_of_the_released_implementation(recorded_branch, path):
    key = f"images/{path.name}"
    pixel_values = recorded_branch.preprocess([open_image(key)])["pixel_values"]
    assert torch.equal(pixel_values, recorded_pixels("dino", key))
    digest = read_json("image_tensors.json")["dino"][key]["sha256_float32_le"]
    assert hashlib.sha256(pixel_values.numpy().tobytes()).hexdigest() == digest


def test_features_are_those_of_the_released_implementation(recorded_branch):
    expected = golden_output("dino", "encoder_features")[0]
    with torch.no_grad():
        (features,) = recorded_branch.encode(
            **recorded_branch.preprocess([open_image("images/a_scene.png")])
        )
    assert features.grid_hw == (16, 16)
    assert (features.values - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_released_settings_are_those_of_the_recorded_checkpoint():
    recorded = read_json("checkpoints/dino/dinov2_preprocessor_config.json")
    del recorded["image_processor_type"]
    assert recorded == RELEASED_PREPROCESS


def test_released_config_builds_dinov2_large():
    with torch.device("meta"):
        branch = DinoBranch(Dinov2Config(**RELEASED_CONFIG))
    # 304,368,640 parameters: https://huggingface.co/facebook/dinov2-large (with the mask token)
    assert sum(weight.numel() for weight in branch.parameters()) == 304_368_640
    assert branch.feature_dim == 1024


def test_branch_has_the_promised_form(branch):
    assert isinstance(branch, Branch)
    assert branch.name == "dino"
    assert all(key.startswith("encoder.") for key in branch.state_dict())
    assert json.loads(json.dumps(branch.preprocess_config)) == branch.preprocess_config


@pytest.mark.parametrize(
    ("size_hw", "grid_hw"), [((224, 224), (16, 16)), ((336, 224), (24, 16)), ((518, 518), (37, 37))]
)
def test_any_input_size_gives_its_grid(branch, size_hw, grid_hw):
    pixels = branch.encode(torch.zeros(1, 3, *size_hw))
    assert pixels[0].grid_hw == grid_hw
    assert pixels[0].values.shape == (grid_hw[0] * grid_hw[1], 16)


def test_a_rest_smaller_than_a_patch_is_not_seen(branch):
    pixel_values = torch.randn(1, 3, 60, 56)
    cut = branch.encode(pixel_values[:, :, :56])[0]
    assert torch.allclose(branch.encode(pixel_values)[0].values, cut.values, atol=1e-6)
    assert cut.grid_hw == (4, 4)


def test_features_are_patch_tokens_in_reading_order(branch):
    pixel_values = torch.randn(2, 3, 28, 42)
    hidden_states = branch.encoder(pixel_values).last_hidden_state
    for features, expected in zip(branch.encode(pixel_values), hidden_states, strict=True):
        assert features.grid_hw == (2, 3)
        assert torch.equal(features.values, expected[1:])


def test_images_of_other_sizes_and_settings_are_preprocessed():
    branch = DinoBranch(
        tiny_config(),
        {"size": {"shortest_edge": 60}, "crop_size": {"height": 56, "width": 42}},
    )
    images = [Image.new("RGB", (90, 70), "red"), Image.new("RGB", (40, 200), "blue")]
    pixels = branch.preprocess(images)
    assert pixels["pixel_values"].shape == (2, 3, 56, 42)
    assert pixels["pixel_values"].dtype == torch.float32
    assert [features.grid_hw for features in branch.encode(**pixels)] == [(4, 3), (4, 3)]


def test_gradients_flow_and_pixels_follow_the_dtype(branch):
    branch.encode(torch.zeros(1, 3, 28, 28))[0].values.sum().backward()
    assert branch.encoder.embeddings.patch_embeddings.projection.bias.grad is not None
    features = branch.to(torch.bfloat16).encode(torch.zeros(1, 3, 28, 28))
    assert features[0].values.dtype == torch.bfloat16


def test_pixels_of_a_wrong_shape_are_rejected(branch):
    with pytest.raises(BranchError, match=r"H and W >= 14; got \[3, 28, 28\]"):
        branch.encode(torch.zeros(3, 28, 28))
    with pytest.raises(BranchError, match="got"):
        branch.encode(torch.zeros(1, 3, 28, 13))


def test_an_unknown_setting_is_rejected():
    with pytest.raises(BranchError, match="unknown preprocess settings crop_pct"):
        DinoBranch(tiny_config(), {"crop_pct": 0.9})


@pytest.mark.parametrize("use_swiglu_ffn", [False, True])
def test_older_and_newer_parameter_names_both_load(use_swiglu_ffn):
    branch = DinoBranch(tiny_config(use_swiglu_ffn=use_swiglu_ffn))
    stored = branch.stored_weights(branch.state_dict())
    newer = _newer_weights(stored)
    assert stored.keys() != newer.keys()
    for weights in (stored, newer):
        holder = torch.nn.ModuleDict({"dino": DinoBranch(branch.encoder.config)})
        holder.load_state_dict({f"dino.{key}": value for key, value in weights.items()})
        for key, value in holder["dino"].state_dict().items():
            assert torch.equal(value, branch.state_dict()[key])


def test_stored_names_are_those_of_the_released_files():
    branch = DinoBranch(tiny_config(use_swiglu_ffn=True))
    layer = "encoder.encoder.layer.0."
    names = {
        key.removeprefix(layer)
        for key in branch.stored_weights(branch.state_dict())
        if layer in key
    }
    matrices = {name.removesuffix(".weight") for name in names if "norm" not in name}
    assert {name for name in matrices if not name.endswith((".bias", ".lambda1"))} == {
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
        "mlp.weights_in",
        "mlp.weights_out",
    }


def test_a_missing_half_of_a_gated_layer_is_an_error():
    branch = DinoBranch(tiny_config(use_swiglu_ffn=True))
    weights = _newer_weights(branch.stored_weights(branch.state_dict()))
    del weights["encoder.encoder.layer.0.mlp.up_proj.bias"]
    with pytest.raises(RuntimeError, match=r"layer\.0\.mlp\."):
        branch.load_state_dict(weights)


def test_a_missing_parameter_is_still_an_error(branch):
    weights = branch.state_dict()
    del weights["encoder.layernorm.bias"]
    with pytest.raises(RuntimeError, match=r"encoder\.layernorm\.bias"):
        branch.load_state_dict(weights)


def test_a_plain_checkpoint_is_loaded_with_its_settings(tmp_path):
    torch.manual_seed(0)
    encoder = Dinov2Model(tiny_config()).eval()
    encoder.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")
    pixel_values = torch.randn(1, 3, 56, 56)
    branch = DinoBranch.from_pretrained(tmp_path)
    assert branch.preprocess_config == RELEASED_PREPROCESS
    expected = encoder(pixel_values).last_hidden_state[0, 1:]
    assert torch.equal(branch.encode(pixel_values)[0].values, expected)
    assert not any(weight.is_meta for weight in branch.parameters())

    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 56}}')
    branch = DinoBranch.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert branch.preprocess_config["size"] == {"shortest_edge": 56}
    assert branch.encoder.dtype == torch.bfloat16
