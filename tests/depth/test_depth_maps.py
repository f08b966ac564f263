"""Depth maps: files that are read or refused, points on maps, maps of photos."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

from vpt.depth.maps import (
    DepthEstimator,
    answer_from_map,
    as_map,
    find_maps,
    fit_map,
    read_map,
    write_map,
)
from vpt.errors import CheckpointError, DataError, ImageError

RAMP = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)


def test_a_written_map_reads_back_to_16_bits(tmp_path):
    write_map(RAMP, tmp_path / "a.png")
    back = read_map(tmp_path / "a.png")
    assert back.dtype == np.float32 and back.shape == (3, 4)
    assert np.abs(back - RAMP).max() < 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 255).astype(np.uint8),
        (RAMP * 65535).astype(np.uint16),
        RAMP,
        RAMP.astype(np.float64),
        RAMP.astype(np.float16),
        RAMP[None],
        RAMP[:, :, None],
    ],
)
def test_arrays_of_every_kind_read_alike(tmp_path, values):
    np.save(tmp_path / "a.npy", values)
    assert np.allclose(read_map(tmp_path / "a.npy"), RAMP, atol=0.005)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_8_bit_pictures_read_alike(tmp_path, mode):
    grey = Image.fromarray((RAMP * 255).astype(np.uint8))
    grey.convert(mode).save(tmp_path / "a.png")
    assert np.allclose(read_map(tmp_path / "a.png"), RAMP, atol=0.005)


def write_text(file):
    file.write_text("no map")


def write_colours(file):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(file)


def write_pickle(file):
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("gone.png", lambda file: None, "does not exist"),
        ("a.png", write_text, "cannot be read as a depth map"),
        ("a.npy", write_text, "cannot be read as a depth map"),
        ("a.npy", write_pickle, "cannot be read as a depth map"),
        ("a.png", write_colours, "is coloured; expected grey"),
        ("a.npy", lambda f: np.save(f, RAMP[0]), r"has shape \[4\]; expected \[H, W\]"),
        ("a.npy", lambda f: np.save(f, RAMP[:0]), "has 0 pixels"),
        ("a.npy", lambda f: np.save(f, RAMP * 3), r"values from 0 to 3; expected 0 \(farthest\)"),
        ("a.npy", lambda f: np.save(f, RAMP / 0.0), "values that are not finite"),
        ("a.npy", lambda f: np.save(f, RAMP.astype(int)), "has int64 values; expected uint8"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_files_that_are_no_map_are_refused(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read_map(tmp_path / name)


def test_maps_are_found_in_folders_of_folders(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.png", "b/y.npy", "b/c/x.PNG", "b/note.txt", ".hidden.png", "photo.jpg"):
        (tmp_path / name).touch()
    found = [file.relative_to(tmp_path).as_posix() for file in find_maps(tmp_path)]
    assert found == ["b/c/x.PNG", "b/y.npy", "z.png"]


def test_a_folder_without_maps_is_told(tmp_path):
    with pytest.raises(DataError, match=r"holds no depth maps; expected \.png, \.npy files"):
        find_maps(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        find_maps(tmp_path / "none")


def test_maps_are_stretched_to_a_square():
    wide = as_map(np.tile(np.linspace(0, 1, 64, dtype=np.float32), (16, 1)))
    square = fit_map(wide, 32)
    assert square.shape == (32, 32)
    assert (np.diff(square[0]) > 0).all() and square.min() >= 0 and square.max() <= 1
    assert fit_map(square, 32) is square


# Distances

MILLIMETRES = np.array([[500, 1000], [2000, 8000]], dtype=np.uint16)


def test_distances_in_millimetres_are_not_taken_for_nearness(tmp_path):
    Image.fromarray(MILLIMETRES).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"16-bit values up to 8000, .* Pass --distances"):
        read_map(tmp_path / "a.png")
    with pytest.raises(DataError, match="the array has 16-bit values up to 8000"):
        as_map(MILLIMETRES)
    np.save(tmp_path / "a.npy", MILLIMETRES / 1000)
    with pytest.raises(DataError, match="or pass --distances if it holds distances"):
        read_map(tmp_path / "a.npy")


def test_distances_are_inverted_whatever_their_unit(tmp_path):
    Image.fromarray(MILLIMETRES).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", MILLIMETRES / 1000)
    for name in ("a.png", "a.npy"):
        near = read_map(tmp_path / name, distances=True)
        assert near.dtype == np.float32 and near.max() == near[0, 0] == 1 and near.min() == 0
        assert near[0, 1] == pytest.approx((1 / 1000 - 1 / 8000) / (1 / 500 - 1 / 8000))


@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "has no distance in 25.0% of its pixels"), (np.nan, "values that are not finite")],
)
def test_distances_that_are_not_known_are_refused(tmp_path, value, message):
    distances = MILLIMETRES.astype(np.float32)
    distances[1, 1] = value
    np.save(tmp_path / "a.npy", distances)
    with pytest.raises(DataError, match=message):
        read_map(tmp_path / "a.npy", distances=True)


def test_one_distance_everywhere_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 2), 3.0))
    with pytest.raises(DataError, match="has the same distance everywhere"):
        read_map(tmp_path / "a.npy", distances=True)


def test_a_dark_map_that_was_written_here_is_read(tmp_path):
    write_map(RAMP / 10, tmp_path / "a.png")
    assert np.allclose(read_map(tmp_path / "a.png"), RAMP / 10, atol=1e-4)


# Points

RIGHT_IS_NEAR = np.tile(np.linspace(0, 1, 320, dtype=np.float32), (320, 1))


def test_the_point_with_the_greatest_value_is_the_nearest():
    read = answer_from_map(RIGHT_IS_NEAR, {"A": (30, 10), "B": (300, 200), "C": (168, 330)})
    assert read.nearest == "B"
    assert list(read.depths) == ["A", "B", "C"]
    assert read.depths["B"] == pytest.approx(300 / 336, abs=0.01)
    assert read.lead == pytest.approx((300 - 168) / 336, abs=0.01)


def test_points_of_the_same_depth_have_no_nearest():
    read = answer_from_map(RIGHT_IS_NEAR, {"A": (50, 10), "B": (50, 300), "C": (9, 9)})
    assert read.nearest is None and read.lead == 0


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.lists(st.tuples(st.integers(0, 335), st.integers(0, 335)), min_size=2, max_size=5),
)
def test_every_point_of_the_grid_is_read_from_a_map_of_any_size(shape, places):
    depth = np.random.default_rng(0).random(shape, dtype=np.float32)
    read = answer_from_map(depth, {str(i): place for i, place in enumerate(places)})
    assert set(read.depths.values()) <= set(depth.flatten().tolist())
    assert read.nearest is None or read.depths[read.nearest] == max(read.depths.values())


def test_the_corners_of_the_grid_are_the_corners_of_the_map():
    depth = np.arange(6, dtype=np.float32).reshape(2, 3) / 5
    corners = {"A": (0, 0), "B": (335, 0), "C": (0, 335), "D": (335, 335)}
    read = answer_from_map(depth, corners)
    assert list(read.depths.values()) == pytest.approx([0, 0.4, 0.6, 1])
    assert answer_from_map(depth, {"A": (0, 0), "B": (7, 7)}, num_pixels=8).nearest == "B"


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"A": (1, 1)}, "expected at least two points to compare, got 1"),
        ({"A": (1, 1), "B": (336, 0)}, "point B is at 336, 0; expected 0 to 335"),
        ({"A": (1, -1), "B": (0, 0)}, "point A is at 1, -1; expected 0 to 335"),
    ],
)
def test_points_that_make_no_sense_are_refused(points, message):
    with pytest.raises(DataError, match=message):
        answer_from_map(RIGHT_IS_NEAR, points)


# Photos


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
