"""Depth of photos by depth models of transformers: tiny random ones."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

from vpt.depth.maps import DepthEstimator
from vpt.errors import CheckpointError, ImageError


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory):
    """Folder of a Depth Anything of 28 pixels and random weights."""
    folder = tmp_path_factory.mktemp("depth-model")
    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=8,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[4, 8],
        fusion_hidden_size=4,
        head_hidden_size=4,
        head_in_index=-1,
    )
    model = DepthAnythingForDepthEstimation(config)
    for name, value in model.named_parameters():  # as drawn, the output hardly varies
        if name.startswith(("neck", "head")) and value.ndim > 1:
            torch.nn.init.normal_(value, std=0.3)
    torch.nn.init.constant_(model.head.conv3.bias, 3.0)  # a ReLU follows
    model.save_pretrained(folder)
    DPTImageProcessor(
        size={"height": 28, "width": 28}, ensure_multiple_of=14, keep_aspect_ratio=True
    ).save_pretrained(folder)
    return folder


def photo(size=(60, 40)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_a_photo_becomes_a_map_of_its_size(depth_model):
    depth = DepthEstimator.load(str(depth_model)).estimate(photo())
    assert depth.shape == (40, 60) and depth.dtype == np.float32
    assert depth.min() == 0 and depth.max() == 1


def test_distances_are_turned_around(depth_model):
    near = DepthEstimator.load(str(depth_model)).estimate(photo())
    far = DepthEstimator.load(str(depth_model), gives_distances=True).estimate(photo())
    assert np.corrcoef(near.ravel(), far.ravel())[0, 1] < -0.5


def test_a_model_that_is_not_there_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="cannot load the depth model"):
        DepthEstimator.load(str(tmp_path / "none"))


def test_a_photo_without_depth_is_told(depth_model):
    estimator = DepthEstimator.load(str(depth_model))
    torch.nn.init.constant_(estimator._model.head.conv3.weight, 0.0)
    with pytest.raises(ImageError, match="finds no depth in the picture"):
        estimator.estimate(photo())
