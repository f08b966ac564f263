"""Rows about depth say what their maps show, and are the same whenever they are made."""

import json
from dataclasses import replace

import numpy as np
import pytest
from aurora_samples import GreyTokenizer, blocks, write_photos
from PIL import Image

from vpt.data import making
from vpt.data.check import RowChecker, check_rows
from vpt.data.checks import image_paths
from vpt.data.content_rows import (
    NOTE,
    leader_of,
    level,
    map_row,
    point_rows,
    read_levels,
    read_note,
    with_note,
)
from vpt.data.depth_rows import (
    DepthRecipe,
    describe,
    make_depth_rows,
    open_source,
    photo_sources,
    scene_sources,
)
from vpt.data.points import Point, PointRule
from vpt.data.rows import measure_images, read_entries
from vpt.depth.maps import answer_from_map, read_map
from vpt.errors import DataError, ImageError, PromptError
from vpt.protocol.calls import parse_depth

FILES = ("depth_maps", "depth_steps", "depth_direct")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("scenes") / "train", 12)


def make(scenes, folder, **recipe):
    recipe = DepthRecipe(**{"num_points": (2, 3), "skip_bad": True, **recipe})
    making = make_depth_rows(scene_sources(scenes), GreyTokenizer(), recipe, folder)
    assert sum(making.run()) == len(making.sources)
    return making.finish()


def content_of(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_the_nearest_point_on_the_drawn_map_is_the_answer(scenes, tmp_path):
    make(scenes, tmp_path / "rows")
    rows = read_entries(tmp_path / "rows/depth_steps.jsonl")
    assert len(rows) >= 8
    for row in rows:
        note, answer = read_note(row), row["messages"][1]["content"]
        codes = parse_depth(answer[answer.index("<DEPTH_START>") : answer.index(" Nearness")])
        places = {point["letter"]: (point["x"], point["y"]) for point in note["points"]}
        drawn = answer_from_map(GreyTokenizer().decode(codes), places)
        true = answer_from_map(read_map(tmp_path / "rows" / note["map"]), places)
        assert drawn.nearest == true.nearest == note["answer"]
        assert answer.endswith(f"The answer is ({note['answer']}).")
        assert read_levels(answer) == {k: level(value) for k, value in drawn.depths.items()}
        for point in note["points"]:
            assert point["depth"] == pytest.approx(true.depths[point["letter"]], abs=1e-3)


def test_every_row_passes_the_check(scenes, tmp_path):
    folder = tmp_path / "rows"
    made = make(scenes, folder)
    for name in FILES:
        rows = read_entries(folder / f"{name}.jsonl")
        facts = dict(measure_images((p for row in rows for p in image_paths(row)), folder))
        report = check_rows(rows, RowChecker(facts))
        assert report.findings == {}
        assert len(report.row_kinds) == 1 and report.num_rows == len(made.lines[name])
    assert set(json.loads((folder / "dataset_info.json").read_text())) == set(FILES)


def test_steps_and_direct_answers_are_to_the_same_questions(scenes, tmp_path):
    folder = tmp_path / "rows"
    make(scenes, folder)
    steps, direct, asked, answers = (
        read_entries(folder / f"{name}.jsonl") for name in (*FILES[1:], "questions", "answers")
    )
    for one, other, question, answer in zip(steps, direct, asked, answers, strict=True):
        assert one["images"] == other["images"] == [question["image"]]
        assert other["messages"][0]["content"] == f"<image>\n{question['text']}"
        assert other["messages"][1]["content"] == answer["text"]
        assert question["question_id"] == answer["question_id"]
        assert read_note(one)["points"] == question["points"]


def test_the_same_seed_gives_the_same_bytes(scenes, tmp_path):
    for name in ("one", "two"):
        make(scenes, tmp_path / name, seed=5)
    make(scenes, tmp_path / "other", seed=6)
    one, two, other = (content_of(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one["depth_direct.jsonl"] != other["depth_direct.jsonl"]


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "_PART_SIZE", 5)
    make(scenes, tmp_path / "whole")
    recipe = DepthRecipe(num_points=(2, 3), skip_bad=True)
    sources = scene_sources(scenes)
    running = make_depth_rows(sources, GreyTokenizer(), recipe, tmp_path / "stopped").run()
    for _ in range(7):
        next(running)
    running.close()
    assert not (tmp_path / "stopped/depth_maps.jsonl").exists()
    encoded = []
    monkeypatch.setattr(
        GreyTokenizer,
        "encode",
        lambda s, d, f=GreyTokenizer.encode: (encoded.append(1), f(s, d))[1],
    )
    make(scenes, tmp_path / "stopped")
    assert len(encoded) == 7  # 12 but for the 5 of the part that was whole
    assert content_of(tmp_path / "whole") == content_of(tmp_path / "stopped")


def test_a_folder_with_other_data_is_left_alone(scenes, tmp_path):
    make(scenes, tmp_path / "rows", seed=1)
    with pytest.raises(PromptError, match="choose another folder"):
        make(scenes, tmp_path / "rows", seed=2)


def test_a_photo_without_possible_points_stops_the_work_or_is_left_out(tmp_path):
    scenes = write_photos(tmp_path / "scenes", 3)
    Image.new("I;16", (80, 80), 30000).save(scenes / "depth/000001.png")
    with pytest.raises(DataError, match=r"000001\.jpg: too few possible points.*--skip-bad"):
        make(scenes, tmp_path / "strict", skip_bad=False)
    assert not list((tmp_path / "strict").glob("*.jsonl"))
    made = make(scenes, tmp_path / "lenient")
    assert [(which[-10:], why[:7]) for which, why in made.problems] == [("000001.jpg", "too few")]
    assert len(made.lines["depth_maps"]) == 2
    for file in (scenes / "depth").iterdir():
        Image.new("I;16", (80, 80), 30000).save(file)
    with pytest.raises(DataError, match="no photo could be used; the first"):
        make(scenes, tmp_path / "none")


def test_maps_of_distances_are_read_as_such(tmp_path):
    scenes = write_photos(tmp_path / "scenes", 1)
    file = scenes / "depth/000000.png"
    far = np.rint(400 / (read_map(file) + 0.1)).astype(np.uint16)
    Image.fromarray(far).save(file)
    photos = [scenes / "images/000000.jpg"]
    with pytest.raises(DataError, match="has 16-bit values up to 3894, as dist"):
        open_source(photo_sources(photos, scenes / "images", scenes / "depth")[0])
    [source] = photo_sources(photos, scenes / "images", scenes / "depth", distances=True)
    assert np.array_equal(open_source(source)[1], read_map(file, distances=True))
    assert describe([source]) != describe([replace(source, distances=False)])


def test_faults_of_photos_and_maps_are_named(tmp_path):
    scenes = write_photos(tmp_path / "scenes", 3)
    Image.new("L", (80, 60)).save(scenes / "depth/000000.png")
    (scenes / "depth/000001.png").unlink()
    (scenes / "images/000002.jpg").write_bytes(b"no picture")
    sources = scene_sources(scenes)
    with pytest.raises(DataError, match=r"80x60 px, .* has 80x80; expected the same shape"):
        open_source(sources[0])
    with pytest.raises(DataError, match="does not exist"):
        open_source(sources[1])
    with pytest.raises(ImageError):
        open_source(sources[2])
    with pytest.raises(DataError, match=r"holds no objects\.jsonl"):
        scene_sources(tmp_path)
    (scenes / "objects.jsonl").write_text('{"image": "a.jpg"}\n')
    with pytest.raises(DataError, match="lines without 'image' and 'depth'"):
        scene_sources(scenes)
    (scenes / "objects.jsonl").write_text("")
    with pytest.raises(DataError, match="names no scenes"):
        scene_sources(scenes)


def test_maps_of_photos_are_found_by_name(tmp_path):
    scenes = write_photos(tmp_path / "scenes", 3)
    photos = sorted((scenes / "images").iterdir())
    (scenes / "depth/000001.png").rename(scenes / "depth/000001.jpg.png")
    np.save(scenes / "depth/000002.npy", blocks(2))
    (scenes / "depth/000002.png").unlink()
    found = photo_sources(photos, scenes / "images", scenes / "depth")
    assert [s.depth.name for s in found] == ["000000.png", "000001.jpg.png", "000002.npy"]
    (scenes / "depth/000000.png").unlink()
    with pytest.raises(DataError, match=r"there is no depth map of .*000000\.jpg; expected"):
        photo_sources(photos, scenes / "images", scenes / "depth")


def test_a_tokenizer_of_another_shape_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(GreyTokenizer.config, "num_codes", 64)
    with pytest.raises(DataError, match="makes 100 codes out of 64; expected 100 out of 128"):
        make_depth_rows([], GreyTokenizer(), DepthRecipe(), tmp_path)


def test_rows_that_would_contradict_themselves_are_refused():
    points = (Point("A", 50, 50, 0.9), Point("B", 250, 250, 0.1))
    drawn = np.zeros((80, 80), np.float32)
    drawn[40:] = 1
    with pytest.raises(DataError, match="does not show which point is nearest"):
        point_rows("a.jpg", points, [0] * 100, drawn, {})
    with pytest.raises(DataError, match="expected a depth map of 100 codes, got 99"):
        map_row("a.jpg", [0] * 99, {})


def test_levels_lead_where_one_is_greatest():
    assert leader_of({"A": 3, "B": 7}) == "B"
    assert leader_of({"A": 7, "B": 7}) is None
    assert leader_of({}) is None
    assert (level(0.0), level(0.5), level(1.0)) == (0, 50, 99)


def test_notes_are_read_and_changed(scenes, tmp_path):
    row = make(scenes, tmp_path / "rows").lines["depth_direct"][0]
    assert read_note(with_note(row, epoch=3)) == {**read_note(row), "epoch": 3}
    assert read_note({"messages": [], NOTE: "see page 3"}) == {}
    with pytest.raises(DataError, match="the row has no note"):
        with_note({"messages": []}, epoch=1)
    with pytest.raises(DataError, match="unknown task 'sing'"):
        read_note({NOTE: '{"task": "sing"}'})
    with pytest.raises(DataError, match="no JSON"):
        read_note({NOTE: '{"task": '})


def test_the_centre_layout_is_named_in_the_questions(scenes, tmp_path):
    make(scenes, tmp_path / "rows", rule=PointRule("centre"), num_points=(2, 2))
    asked = read_entries(tmp_path / "rows" / f"{making.QUESTIONS}.jsonl")
    assert {entry["category"] for entry in asked} == {"centre, 2 points"}


def test_circles_that_could_cover_each_other_are_refused():
    assert DepthRecipe(scale=1.5).scale == 1.5
    with pytest.raises(DataError, match=r"could cover each other at a distance of 0\.12; ask"):
        DepthRecipe(scale=2)
