import functools
import hashlib
import json

import pytest
import torch
from PIL import Image
from recorded import IMAGES, encoder_weights, golden_output, open_image, read_json, recorded_pixels
from transformers import SamConfig, SamModel, SamVisionConfig

from vpt.branches import Branch, BranchError, SamBranch
from vpt.branches.sam import (
    RELEASED_CONFIG,
    RELEASED_PREPROCESS,
    config_from_shapes,
    resize_sam_state_dict,
)


def tiny_config(**changes):
    numbers = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_dim": 32,
        "global_attn_indexes": [1],
        "window_size": 3,
        "output_channels": 8,
        "image_size": 128,
        "initializer_range": 0.5,
    }
    return SamVisionConfig(**{**numbers, **changes})


def randomise(module):
    """Give every parameter a value that shows: SAM starts positions at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return module


@pytest.fixture
def branch():
    return randomise(SamBranch(tiny_config())).eval()


@pytest.fixture(scope="module")
def recorded_branch():
    config = SamVisionConfig(**read_json("checkpoints/sam/sam_vision_config.json"))
    branch = SamBranch(config, read_json("checkpoints/sam/sam_preprocessor_config.json"))
    branch.encoder.load_state_dict(encoder_weights("sam", "seg_model."))
    return branch.eval()


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_pixels_are_those_of_the_released_implementation(recorded_branch, path):
    key = f"images/{path.name}"
    pixel_values = recorded_branch.preprocess([open_image(key)])["pixel_values"]
    assert torch.equal(pixel_values, recorded_pixels("sam", key))
    digest = read_json("image_tensors.json")["sam"][key]["sha256_float32_le"]
    assert hashlib.sha256(pixel_values.numpy().tobytes()).hexdigest() == digest


def test_features_are_those_of_the_released_implementation(recorded_branch):
    expected = golden_output("sam", "encoder_features_strided")[0]  # [32, 8, 8]
    with torch.no_grad():
        (features,) = recorded_branch.encode(
            **recorded_branch.preprocess([open_image("images/a_scene.png")])
        )
    assert features.grid_hw == (64, 64)
    feature_map = features.values.T.reshape(256, 64, 64)[::8, ::8, ::8]
    assert (feature_map - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_released_settings_are_those_of_the_recorded_checkpoint():
    recorded = read_json("checkpoints/sam/sam_preprocessor_config.json")
    ignored = ("image_processor_type", "processor_class", "mask_size", "mask_pad_size")
    assert {k: v for k, v in recorded.items() if k not in ignored} == RELEASED_PREPROCESS


def test_released_config_builds_the_encoder_of_vit_l():
    with torch.device("meta"):
        branch = SamBranch(SamVisionConfig(**RELEASED_CONFIG))
    # Counted on segment_anything.build_sam_vit_l().image_encoder
    assert sum(weight.numel() for weight in branch.parameters()) == 308_278_272
    assert branch.feature_dim == 256


def test_branch_has_the_promised_form(branch):
    assert isinstance(branch, Branch)
    assert branch.name == "sam"
    assert json.loads(json.dumps(branch.preprocess_config)) == branch.preprocess_config
    assert branch.preprocess_config["pad_size"] == {"height": 128, "width": 128}


def test_features_are_the_map_in_reading_order(branch):
    pixel_values = torch.randn(2, 3, 128, 128)
    maps = branch.encoder(pixel_values).last_hidden_state
    for features, expected in zip(branch.encode(pixel_values), maps, strict=True):
        assert features.grid_hw == (8, 8)
        assert torch.equal(features.values[11], expected[:, 1, 3])


def test_padding_is_zero_after_normalisation(branch):
    pixel_values = branch.preprocess([Image.new("RGB", (60, 30)), Image.new("RGB", (10, 20))])
    wide, tall = pixel_values["pixel_values"]
    assert (wide[:, :64] != 0).all() and (wide[:, 64:] == 0).all()
    assert (tall[:, :, :64] != 0).all() and (tall[:, :, 64:] == 0).all()


def test_pixels_of_another_size_are_rejected(branch):
    with pytest.raises(BranchError, match=r"expected pixel_values \[B, 3, 128, 128\]; got"):
        branch.encode(torch.zeros(1, 3, 64, 64))


def test_settings_must_fit_the_encoder():
    with pytest.raises(BranchError, match="encoder of image_size 128 needs"):
        SamBranch(tiny_config(), RELEASED_PREPROCESS)
    with pytest.raises(BranchError, match="unknown preprocess settings padding"):
        SamBranch(tiny_config(), {"padding": 1})


def test_gradients_flow_and_pixels_follow_the_dtype(branch):
    branch.encode(torch.zeros(1, 3, 128, 128))[0].values.sum().backward()
    assert branch.encoder.pos_embed.grad is not None
    features = branch.to(torch.bfloat16).encode(torch.zeros(1, 3, 128, 128))
    assert features[0].values.dtype == torch.bfloat16


def test_resizing_to_the_same_size_changes_nothing(branch):
    weights = branch.encoder.state_dict()
    resized = resize_sam_state_dict(weights, image_size=128, config=branch.encoder.config)
    assert resized.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.allclose(resized[key], value, atol=1e-6), key


def test_resizing_touches_positions_of_global_layers_only(branch):
    weights = branch.encoder.state_dict()
    resized = resize_sam_state_dict(weights, image_size=256, config=branch.encoder.config)
    changed = {key for key in weights if resized[key].shape != weights[key].shape}
    assert changed == {
        "pos_embed",
        "layers.1.attn.rel_pos_h",
        "layers.1.attn.rel_pos_w",
    }
    bigger = SamBranch(tiny_config(image_size=256))
    bigger.encoder.load_state_dict(resized)
    features = bigger.encode(**bigger.preprocess([Image.new("RGB", (60, 30), "red")]))
    assert features[0].grid_hw == (16, 16)


def test_a_linear_ramp_of_positions_stays_linear(branch):
    weights = branch.encoder.state_dict()
    ramp = torch.arange(8.0)
    weights["pos_embed"] = ramp[None, :, None, None].expand(1, 8, 8, 16)
    resized = resize_sam_state_dict(weights, image_size=64, config=branch.encoder.config)
    assert torch.allclose(resized["pos_embed"][0, :, 0, 0], torch.tensor([0.5, 2.5, 4.5, 6.5]))


def test_an_image_size_that_cuts_patches_is_rejected(branch):
    with pytest.raises(BranchError, match="multiple of the patch size 16; got 100"):
        resize_sam_state_dict({}, image_size=100, config=branch.encoder.config)


def test_a_transformers_checkpoint_gives_its_vision_encoder(tmp_path, branch):
    model = SamModel(
        SamConfig(
            vision_config=tiny_config(),
            prompt_encoder_config={"hidden_size": 8, "image_size": 128},
            mask_decoder_config={"hidden_size": 8, "num_attention_heads": 2, "mlp_dim": 8},
        )
    )
    model.vision_encoder.load_state_dict(branch.encoder.state_dict())
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 128, 128)
    loaded = SamBranch.from_pretrained(tmp_path)
    expected = branch.encode(pixel_values)[0].values
    assert torch.equal(loaded.encode(pixel_values)[0].values, expected)

    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"resample": 3, "size": {"longest_edge": 1024}, "mask_size": {}})
    )
    bigger = SamBranch.from_pretrained(tmp_path, image_size=192)
    assert bigger.preprocess_config["resample"] == 3
    assert bigger.encode(torch.zeros(1, 3, 192, 192))[0].grid_hw == (12, 12)


def original_encoder(**changes):
    pytest.importorskip("segment_anything")
    from segment_anything.modeling import ImageEncoderViT

    numbers = {
        "img_size": 128,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
        "out_chans": 8,
        "use_rel_pos": True,  # False by default there, though every released SAM has it
        "window_size": 3,
        "global_attn_indexes": (1,),
        "norm_layer": functools.partial(torch.nn.LayerNorm, eps=1e-6),
    }
    return randomise(ImageEncoderViT(**{**numbers, **changes})).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window_size": 14},  # windows larger than the grid
        {"window_size": 8},  # as large as the grid
        {"embed_dim": 24, "num_heads": 3, "mlp_ratio": 2.0, "qkv_bias": False},
        {"global_attn_indexes": (0, 2), "patch_size": 8, "img_size": 64},
    ],
)
def test_segment_anything_weights_give_equal_features(changes):
    encoder = original_encoder(**changes)
    branch = SamBranch.from_segment_anything(encoder.state_dict(), encoder.img_size)
    pixel_values = torch.randn(2, 3, encoder.img_size, encoder.img_size)
    with torch.no_grad():
        expected = encoder(pixel_values)
        for features, feature_map in zip(branch.encode(pixel_values), expected, strict=True):
            assert torch.allclose(features.values, feature_map.flatten(1).T, atol=1e-4)


def test_a_segment_anything_file_is_read_and_resized(tmp_path):
    encoder = original_encoder()
    weights = {f"image_encoder.{key}": value for key, value in encoder.state_dict().items()}
    weights["mask_decoder.iou_token.weight"] = torch.zeros(1, 8)
    torch.save(weights, tmp_path / "sam.pth")
    branch = SamBranch.from_segment_anything(tmp_path / "sam.pth", image_size=256)
    features = branch.encode(**branch.preprocess([Image.new("RGB", (60, 30), "red")]))
    assert features[0].grid_hw == (16, 16)
    assert branch.encoder.config.num_attention_heads == 2


def test_released_sizes_are_read_off_the_shapes():
    pytest.importorskip("segment_anything")
    from segment_anything import sam_model_registry

    from vpt.branches.sam import rename_segment_anything

    with torch.device("meta"):
        model = sam_model_registry["vit_l"]()
    numbers = config_from_shapes(rename_segment_anything(model.state_dict()))
    assert {key: numbers[key] for key in RELEASED_CONFIG} == RELEASED_CONFIG


def test_weights_of_something_else_are_rejected():
    with pytest.raises(BranchError, match=r"segment-anything's image encoder .*got conv1"):
        SamBranch.from_segment_anything({"conv1": torch.zeros(1)})


def test_weights_without_relative_positions_are_rejected():
    weights = original_encoder(use_rel_pos=False).state_dict()
    with pytest.raises(BranchError, match="expected an encoder with absolute and relative"):
        SamBranch.from_segment_anything(weights, 128)
