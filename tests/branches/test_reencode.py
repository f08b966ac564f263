import pytest
import torch
from PIL import Image
from recorded import GOLDENS, open_image, read_json
from safetensors.torch import load_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vpt.branches import Branch, BranchError, ReencodeBranch
from vpt.branches.base import Backbone
from vpt.branches.reencode import split_tower_tokens


def image_processor():
    settings = read_json("checkpoints/dino/preprocessor_config.json")
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": settings["min_pixels"], "longest_edge": settings["max_pixels"]},
        patch_size=settings["patch_size"],
        temporal_patch_size=settings["temporal_patch_size"],
        merge_size=settings["merge_size"],
        image_mean=settings["image_mean"],
        image_std=settings["image_std"],
    )


def mean_tower(pixel_values, image_grid_thw):
    """Stand in for a tower: the mean of each 2x2 block of patches."""
    assert len(pixel_values) == image_grid_thw.prod(dim=1).sum()
    return pixel_values.reshape(-1, 4, 1176).mean(dim=1)


@pytest.fixture
def branch():
    return ReencodeBranch(mean_tower, image_processor(), merge_size=2, feature_dim=1176)


@pytest.mark.parametrize(
    "key", ["a_scene.png", "a_tall.png", "a_tall.png_11,0,78,112", "a_tile.png"]
)
def test_pixels_are_those_of_the_released_implementation(branch, key):
    recorded = load_file(GOLDENS / "image_tensors.safetensors")
    pixels = branch.preprocess([open_image(f"images/{key}")])
    assert torch.equal(pixels["pixel_values"], recorded[f"qwen/images/{key}/pixel_values"])
    grid = recorded[f"qwen/images/{key}/grid_thw"].reshape(1, 3)
    assert torch.equal(pixels["image_grid_thw"], grid.to(torch.int64))


def test_branch_has_the_promised_form_and_no_weights(branch):
    assert isinstance(branch, Branch)
    assert (branch.name, branch.feature_dim) == ("reencode", 1176)
    assert not isinstance(branch, torch.nn.Module)


def test_tokens_are_split_by_image_on_the_merged_grid(branch):
    images = [open_image("images/a_scene.png"), open_image("images/a_tall.png")]
    pixels = branch.preprocess(images)
    features = branch.encode(**pixels)
    assert [one.grid_hw for one in features] == [(3, 4), (5, 3)]
    alone = [branch.encode(**branch.preprocess([image]))[0] for image in images]
    for together, single in zip(features, alone, strict=True):
        assert torch.equal(together.values, single.values)


def test_features_lie_row_major_on_the_grid(branch):
    image = Image.new("RGB", (112, 84))
    image.paste((255, 255, 255), (56, 28, 84, 56))  # one merged cell: row 1, column 2
    (features,) = branch.encode(**branch.preprocess([image]))
    brightness = features.values.mean(dim=1).reshape(features.grid_hw)
    assert divmod(int(brightness.argmax()), features.grid_hw[1]) == (1, 2)


def test_a_tower_with_another_number_of_tokens_is_an_error():
    branch = ReencodeBranch(
        lambda pixel_values, _: pixel_values, image_processor(), merge_size=2, feature_dim=1176
    )
    with pytest.raises(BranchError, match=r"need 12 tokens but the tower returned 48"):
        branch.encode(**branch.preprocess([open_image("images/a_scene.png")]))


@pytest.mark.parametrize("grid", [(2, 4, 4), (1, 3, 4)])
def test_grids_that_are_no_merged_image_are_rejected(grid):
    with pytest.raises(BranchError, match=r"expected image grids \(1, h, w\)"):
        split_tower_tokens(torch.zeros(8, 4), torch.tensor([grid]), 2)


def test_tower_and_image_processor_must_merge_alike():
    with pytest.raises(BranchError, match=r"tower merges 4x4 patches but .* merge_size=2"):
        ReencodeBranch(mean_tower, image_processor(), merge_size=4, feature_dim=1176)


def test_no_image_is_rejected(branch):
    with pytest.raises(BranchError, match="at least one image"):
        branch.preprocess([])


def test_the_branch_can_have_a_size_of_its_own():
    size = {"shortest_edge": 784, "longest_edge": 4 * 784}
    backbone = Backbone(image_processor=image_processor(), merge_size=2, hidden_size=1176)
    branch = ReencodeBranch.build({"preprocess": {"size": size}}, backbone)
    assert branch.grid_hw((448, 448)) == (2, 2)
    (grid,) = branch.preprocess([Image.new("RGB", (448, 448))])["image_grid_thw"].tolist()
    assert grid == [1, 4, 4]
    assert branch.preprocess_config["size"] == size
    assert ReencodeBranch.build({}, backbone).grid_hw((448, 448)) == (4, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"preprocess": {"size": {"longest_edge": 3136}}},
        {"preprocess": {"size": {"shortest_edge": 3136, "longest_edge": 784}}},
        {"preprocess": {"size": {"shortest_edge": 0, "longest_edge": 784}}},
        {"preprocess": {"size": {"shortest_edge": 784, "longest_edge": "3136"}}},
        {"preprocess": {"size": 784}},
        {"preprocess": {"resample": 2}},
        {"encoder": {}},
    ],
)
def test_other_settings_of_the_tower_are_refused(settings):
    with pytest.raises(BranchError, match=r"shortest_edge.*least and most pixels"):
        ReencodeBranch.build(settings, Backbone())
