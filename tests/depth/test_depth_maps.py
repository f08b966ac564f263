"""Depth maps in files: which are read, how, and which are refused."""

import numpy as np
import pytest
from PIL import Image

from vpt.depth.maps import as_map, find_maps, fit_map, read_map, write_map
from vpt.errors import DataError

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
