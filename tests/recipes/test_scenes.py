"""Generated scenes: the same by seed, true to what they say is in them."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from recipes.__main__ import main
from recipes.scenes.files import write_scenes
from recipes.scenes.layout import COLORS, NUM_THINGS, SHAPE_NAMES
from recipes.scenes.rendering import draw_scene
from recipes.scenes.shapes import SHAPES
from recipes.scenes.surfaces import PATTERNS
from vpt.depth.maps import read_map

SIZE = 96
SCENES = [draw_scene(11, number, size_px=SIZE) for number in range(12)]


def vectors(*parts):
    return tuple(np.array([[part]], np.float32) for part in parts)


@pytest.mark.parametrize("shape", SHAPE_NAMES)
def test_a_ray_from_above_meets_every_shape_where_it_stands(shape):
    half = vectors(1, 2, 1) if shape != "sphere" else vectors(1, 1, 1)
    with np.errstate(all="ignore"):
        down = SHAPES[shape](vectors(0.01, 9, 0.01), vectors(0, -1, 1e-6), half)
        past = SHAPES[shape](vectors(3, 9, 0), vectors(0, -1, 1e-6), half)
        behind = SHAPES[shape](vectors(0, 9, 0), vectors(0, 1, 1e-6), half)
    height = 8 if shape == "sphere" else 7
    assert down.distance.item() == pytest.approx(height, abs=0.1)
    assert down.normal[1].item() > 0
    assert math.isinf(past.distance.item()) and math.isinf(behind.distance.item())


@pytest.mark.parametrize("shape", SHAPE_NAMES)
def test_a_ray_from_the_side_meets_every_shape_at_its_face(shape):
    with np.errstate(all="ignore"):
        hit = SHAPES[shape](vectors(0, 0, -5), vectors(1e-6, 1e-6, 1), vectors(1, 1, 1))
    assert hit.distance.item() == pytest.approx(4.5 if shape == "cone" else 4, abs=1e-3)
    assert hit.normal[2].item() < 0


def test_the_same_numbers_give_the_same_scene():
    one, same = draw_scene(5, 1, size_px=SIZE), draw_scene(5, 1, size_px=SIZE)
    assert one.image.tobytes() == same.image.tobytes() and one.objects == same.objects
    assert np.array_equal(one.depth, same.depth)


@pytest.mark.parametrize("other", [(6, 1, "train"), (5, 2, "train"), (5, 1, "heldout")])
def test_seed_number_and_split_each_give_other_scenes(other):
    one = draw_scene(5, 1, "train", SIZE)
    assert draw_scene(*other, SIZE).image.tobytes() != one.image.tobytes()


@pytest.mark.parametrize("scene", SCENES)
def test_a_depth_map_spans_0_to_1(scene):
    assert scene.depth.shape == (SIZE, SIZE) and scene.depth.dtype == np.float32
    assert scene.depth.min() == 0 and scene.depth.max() == 1
    assert np.isfinite(scene.depth).all()
    assert scene.image.size == (SIZE, SIZE) and scene.image.mode == "RGB"


@pytest.mark.parametrize("scene", SCENES)
def test_objects_are_told_apart_and_told_truly(scene):
    objects = scene.objects
    assert NUM_THINGS[0] <= len(objects) <= NUM_THINGS[1]
    assert len({(item.shape, item.color) for item in objects}) == len(objects)
    assert [o.distance_m for o in objects] == sorted(o.distance_m for o in objects)
    assert [o.nearness for o in objects] == sorted((o.nearness for o in objects), reverse=True)
    for item in objects:
        (x0, y0, x1, y1), (x, y) = item.box, item.point
        assert 0 <= x0 <= x < x1 <= SIZE and 0 <= y0 <= y < y1 <= SIZE
        assert 0.5 <= item.visible <= 1
        assert scene.depth[y, x] == pytest.approx(item.nearness, abs=0.1)
        assert item.color in COLORS and item.shape in SHAPE_NAMES


def test_coloured_objects_show_their_colour_at_their_point():
    right = total = 0
    pairs = [(scene, item) for scene in SCENES for item in scene.objects]
    for scene, item in pairs:
        seen = np.array(scene.image.getpixel(item.point), float)
        if item.color not in ("white", "black"):
            hue = {name: np.array(rgb) / max(rgb) for name, rgb in COLORS.items()}
            distances = {n: np.abs(seen / seen.max() - h).sum() for n, h in hue.items()}
            right += min(distances, key=distances.get) == item.color
            total += 1
    assert total > 20 and right / total > 0.85


def test_patterns_are_bright_and_dark():
    u, v = np.meshgrid(np.linspace(-3, 3, 50, dtype="f4"), np.linspace(0, 6, 50, dtype="f4"))
    for pattern in PATTERNS.values():
        values = pattern(u, v)
        assert values.shape == u.shape and values.std() > 0.3 and np.abs(values).max() < 6


def test_scenes_in_files_are_those_that_were_drawn(tmp_path):
    assert list(write_scenes(tmp_path, "train", 3, 7, SIZE)) == [0, 1, 2]
    lines = (tmp_path / "objects.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for number, line in enumerate(map(json.loads, lines)):
        scene = draw_scene(7, number, "train", SIZE)
        assert np.abs(read_map(tmp_path / line["depth"]) - scene.depth).max() < 1e-4
        with Image.open(tmp_path / line["image"]) as image:
            assert image.size == (SIZE, SIZE)
        assert line["objects"][0]["color"] == scene.objects[0].color
        assert line["objects"][0]["box"] == list(scene.objects[0].box)


def test_many_processes_write_what_one_does(tmp_path):
    for name, num_workers in (("one", 1), ("two", 2)):
        assert list(write_scenes(tmp_path / name, "train", 40, 7, 64, num_workers)) == [*range(40)]
    one, two = (sorted((tmp_path / name).rglob("*.*")) for name in ("one", "two"))
    assert len(one) == 82
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_a_run_that_was_stopped_goes_on(tmp_path):
    next(scenes := write_scenes(tmp_path, "train", 3, 7, SIZE))
    scenes.close()
    kept = tmp_path / "images" / "000000.jpg"
    before = kept.stat().st_mtime_ns
    list(write_scenes(tmp_path, "train", 3, 7, SIZE))
    assert kept.stat().st_mtime_ns == before
    assert len(list((tmp_path / "depth").iterdir())) == 3


def test_scenes_are_made_in_two_splits(tmp_path, capsys):
    words = ["make-scenes", "--out", str(tmp_path), "--num", "2", "--heldout", "1", "--size", "64"]
    assert main(words) == 0
    err = capsys.readouterr().err
    assert "2 scenes in" in err and "1 scene in" in err
    for split, number in (("train", 2), ("heldout", 1)):
        folder = tmp_path / split
        assert len(list((folder / "images").glob("*.jpg"))) == number
        assert len(list((folder / "depth").glob("*.png"))) == number
        assert len((folder / "objects.jsonl").read_text().splitlines()) == number
    assert main([*words, "--seed", "3"]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_a_file_in_the_way_of_scenes_is_told(tmp_path, capsys):
    (tmp_path / "a").touch()
    assert main(["make-scenes", "--out", str(tmp_path / "a" / "b"), "--num", "1"]) == 2
    assert "is a file; expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "o", "--size", "8"], "expected at least 64, got 8"),
    ],
)
def test_wrong_usage_is_reported(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["make-scenes", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("usage: python -m recipes make-scenes")
    assert not list(tmp_path.iterdir())
