"""What the tower learns of rooms and counting scenes, and how it is read."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from recipes.counting.files import write_counting_scenes
from recipes.embedded import codes
from recipes.embedded.labels import IGNORE
from recipes.embedded.perception import (
    CLASSES,
    GRID,
    KINDS,
    LETTERS,
    NUMBERS,
    SceneBatches,
    SceneHeads,
    Thing,
    View,
    check_tokenizer,
    counting_sources,
    crowded_view,
    find_centers,
    find_letters,
    label_tokens,
    make_view,
    place_in_cells,
    room_sources,
    stack_views,
)
from recipes.embedded.vision import Settings, train_encoder
from recipes.scenes.files import write_scenes
from vpt.data.points import Point
from vpt.depth.maps import fit_map
from vpt.depth.tokenizer import DepthTokenizer, DepthTokenizerConfig, load_depth_tokenizer
from vpt.errors import PromptError

SMALL = DepthTokenizerConfig(code_dim=8, hidden_dim=2, num_residual_blocks=0)


@pytest.fixture(scope="module")
def tokenizer():
    return DepthTokenizer(SMALL.build(3), SMALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("perception")
    tokenizer.save(folder / "tokenizer")
    for name, write in (("rooms", write_scenes), ("counting", write_counting_scenes)):
        assert list(write(folder / name, "train", 4, 0, 128)) == [0, 1, 2, 3]
    return folder


def settings(data, folder, **changes):
    given = {"steps": {"tower": 2}, "batch_size": {"tower": 2}, "scene_batch_size": 2, **changes}
    return Settings(
        output_dir=str(folder),
        num_workers=0,
        save_steps=1,
        rooms=str(data / "rooms"),
        counting=str(data / "counting"),
        depth_tokenizer=str(data / "tokenizer"),
        **given,
    )


def as_logits(labels, num_classes):
    return 20.0 * torch.nn.functional.one_hot(torch.as_tensor(labels), num_classes)


def test_objects_of_both_kinds_of_scenes_lie_in_the_grid(data):
    rooms, counting = room_sources(data / "rooms"), counting_sources(data / "counting")
    assert [len(rooms), len(counting)] == [4, 4]
    entry = json.loads((data / "rooms" / "objects.jsonl").read_text().splitlines()[0])
    first = entry["objects"][0]
    expected = Thing(first["shape"], first["color"], tuple(v * GRID / 128 for v in first["box"]))
    assert rooms[0].things[0] == expected
    for source in (*rooms, *counting):
        assert all(0 <= side <= GRID for thing in source.things for side in thing.box)


def test_a_mirrored_view_has_mirrored_labels_and_codes(data, tokenizer):
    source = room_sources(data / "rooms")[0]
    straight = make_view(source, np.random.default_rng(0), num_points=0)
    views = [make_view(source, np.random.default_rng(seed)) for seed in range(9)]
    mirrored = next(view for view in views if view.things != straight.things)
    assert np.array_equal(mirrored.depth, straight.depth[:, ::-1])
    for one, other in zip(straight.things, mirrored.things, strict=True):
        assert one.center[0] + other.center[0] == pytest.approx(GRID)
    codes = stack_views([straight, mirrored], tokenizer)["code"].flatten(1)
    assert codes[0].tolist() == list(tokenizer.encode(fit_map(straight.depth, 320)))
    assert codes[1].tolist() == list(tokenizer.encode(fit_map(mirrored.depth, 320)))


def test_marked_points_lie_under_their_letters(data):
    view = make_view(room_sources(data / "rooms")[1], np.random.default_rng(1), num_points=3)
    assert [point.letter for point in view.points] == ["A", "B", "C"]
    labels = label_tokens(view)
    for point in view.points:
        x, y = place_in_cells(point)
        assert labels["letter"][int(y), int(x)] == LETTERS.index(point.letter)
        column, row = int(x), int(y)
        place = labels["point"][row, column] + (column + 0.5, row + 0.5)
        assert place == pytest.approx((x, y), abs=1e-5)
    assert (labels["letter"] == len(LETTERS)).sum() == GRID**2 - 3


def test_a_scene_without_a_map_has_no_codes(data, tokenizer):
    view = make_view(counting_sources(data / "counting")[0], np.random.default_rng(0))
    batch = stack_views([view], tokenizer)
    assert (batch["code"] == IGNORE).all()
    assert batch["depth"].isnan().all()
    assert (batch["kind"] != len(KINDS)).sum() == len(view.things)
    loss, shown = SceneHeads(8).loss(torch.randn(1, GRID**2, 8), batch)
    assert loss.isfinite()
    assert {"kind", "color", "box"} <= set(shown)
    assert not {"code", "depth", "point", "letter"} & set(shown)


def test_what_is_labelled_is_found(data):
    for source in counting_sources(data / "counting"):
        view = make_view(source, np.random.default_rng(0), num_points=0)
        labels = label_tokens(view)
        boxes = torch.from_numpy(labels["box"]).nan_to_num(5.0)
        found = find_centers(as_logits(labels["kind"], len(KINDS) + 1), boxes)
        assert len(found) == len(view.things)
        for thing in view.things:
            hits = [f for f in found if np.hypot(*np.subtract(f.place, thing.center)) < 0.01]
            assert [f.kind for f in hits] == [thing.kind]


def test_a_centre_between_two_cells_is_found_once():
    thing = Thing("star", "red", (2.5, 3.0, 3.5, 4.0))  # its middle is on the border of two cells
    labels = label_tokens(View(np.zeros((280, 280, 3), np.uint8), None, (thing,)))
    chances = torch.full((GRID, GRID, len(KINDS) + 1), 1e-9)
    chances[..., -1] = 1.0
    for column in (2, 3):
        chances[3, column, KINDS.index("star")] = 0.45
        chances[3, column, -1] = 0.55
    boxes = torch.from_numpy(labels["box"]).nan_to_num(5.0)
    (found,) = find_centers(chances.log(), boxes)
    assert found.place == pytest.approx((3.0, 3.5))
    assert found.votes == pytest.approx(0.9, abs=1e-3)


def test_letters_are_found_where_they_are():
    points = (Point("A", 100, 50, 0.3), Point("B", 200, 300, 0.6))
    view = View(np.zeros((280, 280, 3), np.uint8), None, (), points)
    labels = label_tokens(view)
    found = find_letters(
        as_logits(labels["letter"], len(LETTERS) + 1),
        torch.from_numpy(labels["point"]).nan_to_num(5.0),
        ["A", "B"],
    )
    for point in points:
        assert found[point.letter] == pytest.approx(place_in_cells(point), abs=1e-4)


def test_crowded_scenes_have_more_things_and_repeated_letters(data):
    view = crowded_view(np.random.default_rng(0))
    assert view.pixels.shape == (280, 280, 3)
    assert len(view.things) > 6
    assert all(0 <= side <= GRID for thing in view.things for side in thing.box)
    source = room_sources(data / "rooms")[0]
    marked = [make_view(source, np.random.default_rng(seed)).points for seed in range(12)]
    assert max(map(len, marked)) > 5
    for points in marked:
        cells = {(int(x), int(y)) for x, y in map(place_in_cells, points)}
        assert len(cells) >= len(points) - 1


def test_batches_are_seeded_by_their_number(data, tokenizer):
    rooms, counting = room_sources(data / "rooms"), counting_sources(data / "counting")
    batches = SceneBatches(rooms, counting, tokenizer, 4, 5, 0)
    one, same, other = batches[1], batches[1], batches[2]
    assert set(one) == {"pixels", *CLASSES, *NUMBERS}
    assert all(torch.equal(one[name].nan_to_num(), same[name].nan_to_num()) for name in one)
    assert not torch.equal(one["pixels"], other["pixels"])
    assert (one["code"] != IGNORE).flatten(1).any(1).tolist() == [True, True, False, False]


def test_a_stopped_run_with_two_optimizers_ends_with_the_same_weights(data, tmp_path, monkeypatch):
    import recipes.embedded.vision as vision

    chosen = settings(data, tmp_path / "whole", muon_learning_rate=0.02)
    train_encoder("tower", chosen)
    broken = dataclasses.replace(chosen, output_dir=str(tmp_path / "broken"))
    real = vision._save

    def save_and_stop(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(vision, "_save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_encoder("tower", broken)
    monkeypatch.undo()
    train_encoder("tower", broken)
    one, other = (
        torch.load(Path(run.output_dir) / "tower.pt", weights_only=True) for run in (chosen, broken)
    )
    assert all(torch.equal(one["trained"][name], other["trained"][name]) for name in one["trained"])
    assert one["step"] == other["step"] == 2
    assert {"color", "scene_kind", "scene_code", "scene_box"} <= set(one["accuracies"])


def test_missing_scenes_are_named_with_their_command(tmp_path):
    with pytest.raises(PromptError, match=r"no .*objects.jsonl; make it with .*make-scenes`"):
        room_sources(tmp_path)
    with pytest.raises(PromptError, match=r"annotations.json; make it with .*counting-scenes`"):
        counting_sources(tmp_path)


def test_a_tokenizer_of_another_grid_is_refused():
    config = dataclasses.replace(SMALL, size_px=160)
    with pytest.raises(PromptError, match=r"expected .* 10 x 10 cells and 128 codes, got 5 x 5 ce"):
        check_tokenizer(DepthTokenizer(config.build(), config))


def test_codes_that_look_alike_are_merged_first():
    vectors = torch.tensor([[0.0], [1.0], [1.2], [5.0]])
    merged = codes.merge_codes(vectors, torch.tensor([1.0, 3.0, 1.0, 1.0]), 3)
    assert merged[:, 0].tolist() == pytest.approx([0.0, 1.05, 1.05, 5.0], abs=1e-5)
    rare = codes.merge_codes(vectors, torch.tensor([1e-4, 9.0, 9.0, 1.0]), 3)
    assert rare[:, 0].tolist() == pytest.approx([1.0, 1.0, 1.2, 5.0], abs=1e-3)


def test_merged_codes_make_a_tokenizer(data, tmp_path, monkeypatch):
    words = ["codes", str(data / "tokenizer"), str(tmp_path / "few"), "--keep", "5"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        codes.main()
    assert ended.value.code == 0
    few = load_depth_tokenizer(tmp_path / "few")
    assert few.config == SMALL
    assert len(few.network.codebook.vectors.unique(dim=0)) == 5


@pytest.mark.parametrize(
    ("words", "said"),
    [(["missing", "out"], "missing"), (["tokenizer", "out", "--keep", "200"], "fewer than 200")],
)
def test_codes_that_cannot_be_merged_end_with_a_line(data, monkeypatch, capsys, words, said):
    monkeypatch.chdir(data)
    monkeypatch.setattr(sys, "argv", ["codes", *words])
    with pytest.raises(SystemExit) as ended:
        codes.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
