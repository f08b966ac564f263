"""Training: learns, keeps its codebook alive, and goes on exactly where it was stopped."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vpt.depth import training
from vpt.depth.maps import find_maps, read_map, write_map
from vpt.depth.measures import draw_reconstructions, measure, measured_words, spread
from vpt.depth.tokenizer import DepthTokenizerConfig
from vpt.depth.training import STATE, Trainer, TrainingSettings
from vpt.errors import DataError, NonFiniteError, PromptError

CONFIG = DepthTokenizerConfig(
    size_px=32, num_codes=8, code_dim=8, hidden_dim=4, num_downsamplings=3, num_residual_blocks=1
)
SHORT = TrainingSettings(steps=24, batch_size=4, crop_cells=2, warmup=0.25)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Maps with a near half that lies left, right, above or below."""
    folder = tmp_path_factory.mktemp("maps")
    rng = np.random.default_rng(0)
    for number in range(24):
        depth = np.full((32, 32), rng.uniform(0, 0.3), np.float32)
        edge = rng.integers(8, 24)
        depth[:, :edge] = rng.uniform(0.6, 1)
        write_map(np.rot90(depth, number % 4), folder / f"{number:02d}.png")
    return find_maps(folder)


def state_of(trainer):
    return trainer.tokenizer.network.state_dict()


def test_training_learns_and_uses_the_codebook(files):
    fast = TrainingSettings(steps=120, batch_size=4, crop_cells=4, learning_rate=1e-2)
    trainer = Trainer(files, fast, CONFIG)
    before = measure(trainer.tokenizer, map(read_map, files))
    assert list(trainer.run()) == list(range(1, 121))
    after = measure(trainer.tokenizer, map(read_map, files))
    assert after.mse < 0.5 * after.mse_flat < before.mse
    assert after.codes_used >= 6 and after.perplexity > 3
    assert after.pair_order > 0.85
    assert [line["step"] for line in trainer.history] == [25, 50, 75, 100, 120]
    assert trainer.history[-1]["perplexity"] > 3


@pytest.mark.parametrize("stop", [3, 6, 15])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(files, tmp_path, stop):
    whole = Trainer(files, SHORT, CONFIG)
    list(whole.run())
    first = Trainer(files, SHORT, CONFIG)
    for step in first.run():
        if step == stop:
            first.save_state(tmp_path)
            break
    torch.manual_seed(stop)  # what others do to torch's random state does not matter
    rest = Trainer(files, SHORT, CONFIG)
    assert rest.load_state(tmp_path) and rest.step == stop
    list(rest.run())
    assert all(torch.equal(v, state_of(whole)[n]) for n, v in state_of(rest).items())
    assert rest.history == whole.history


def test_another_seed_gives_another_tokenizer(files):
    one, other = (
        Trainer(files, TrainingSettings(steps=2, batch_size=2, crop_cells=2, seed=seed), CONFIG)
        for seed in (0, 1)
    )
    for trainer in (one, other):
        list(trainer.run())
    name = "decoder.0.weight"
    assert not torch.equal(state_of(one)[name], state_of(other)[name])


def test_there_is_nothing_to_go_on_with_in_an_empty_folder(files, tmp_path):
    assert not Trainer(files, SHORT, CONFIG).load_state(tmp_path)


def test_another_run_in_the_folder_is_told(files, tmp_path):
    Trainer(files, SHORT, CONFIG).save_state(tmp_path)
    with pytest.raises(PromptError, match="holds a run with steps 24, not 30; repeat its options"):
        Trainer(files, replace(SHORT, steps=30), CONFIG).load_state(tmp_path)
    with pytest.raises(PromptError, match="holds a run with num_maps 24, not 23"):
        Trainer(files[1:], SHORT, CONFIG).load_state(tmp_path)


def test_maps_of_distances_are_trained_on_as_such(files, tmp_path):
    far = [tmp_path / f"{file.stem}.npy" for file in files]
    for file, target in zip(files, far, strict=True):
        np.save(target, 1 / (read_map(file) + 0.1))
    trainer = Trainer(far, SHORT, CONFIG, distances=True)
    assert set(np.unique(trainer._read(0))) == {0, 1}  # near half, far half, stretched
    plain = Trainer(files, SHORT, CONFIG).identity
    assert (trainer.identity["distances"], plain["distances"]) == (True, None)


def test_a_damaged_state_is_told(files, tmp_path):
    (tmp_path / STATE).write_bytes(b"nothing")
    with pytest.raises(PromptError, match=r"cannot read .*; delete it to start again"):
        Trainer(files, SHORT, CONFIG).load_state(tmp_path)


def test_training_that_leaves_the_numbers_ends(files):
    with pytest.raises(NonFiniteError, match=r"error of step 24 is nan; .* smaller learning rate"):
        list(Trainer(files, replace(SHORT, learning_rate=1e30), CONFIG).run())


def test_revival_is_asked_for_while_training(files, monkeypatch):
    monkeypatch.setattr(training, "_REVIVE_EVERY", 1)
    monkeypatch.setattr(training, "_LEAST_SHARE", 100.0)  # every code counts as dead
    trainer = Trainer(files, SHORT, CONFIG)
    revived = []
    book = trainer.tokenizer.network.codebook
    monkeypatch.setattr(type(book), "revive", lambda *args: revived.append(args) or 0)
    list(trainer.run())
    assert len(revived) == math.ceil(0.8 * SHORT.steps) - SHORT.first_coded


def test_the_last_steps_see_whole_maps(files):
    trainer = Trainer(files, SHORT, CONFIG)
    assert [tuple(trainer._batch(step).shape) for step in (0, 18, 19, 23)] == [
        (4, 1, 16, 16),
        (4, 1, 16, 16),
        (1, 1, 32, 32),
        (1, 1, 32, 32),
    ]


@pytest.mark.parametrize("round_number", [0, 1])
def test_each_round_sees_each_map_once(files, round_number):
    trainer = Trainer(files, SHORT, CONFIG)
    start = round_number * len(files)
    seen = [trainer._read(position).tobytes() for position in range(start, start + len(files))]
    assert len(set(seen)) == len(files)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"crop_cells": 0}]
)
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(PromptError, match="expected steps, batch, crop and rate above 0"):
        TrainingSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"warmup": 1.0}, {"whole": 1.5}])
def test_impossible_shares_are_refused(wrong):
    with pytest.raises(PromptError, match="expected shares of the steps of 0 to 1"):
        TrainingSettings(**wrong)


def test_maps_that_cannot_be_trained_on_are_told(files, tmp_path):
    with pytest.raises(DataError, match="there are no depth maps to train on"):
        Trainer([], SHORT, CONFIG)
    with pytest.raises(PromptError, match="crops of 5 codes a side do not fit maps of 4"):
        Trainer(files, TrainingSettings(crop_cells=5), CONFIG)
    write_map(np.full((32, 32), 0.5, np.float32), tmp_path / "a.png")
    with pytest.raises(DataError, match="all depth maps have one and the same value"):
        Trainer([tmp_path / "a.png"], SHORT, CONFIG)


# --- measures and pictures --------------------------------------------------------------------


class Exact:
    """A tokenizer that gives back what it got."""

    config = CONFIG

    def encode(self, depth):
        self.last = depth
        return tuple(range(8)) * 2

    def decode(self, codes):
        return self.last


def test_a_tokenizer_that_loses_nothing_has_no_error(files):
    class OfTen(Exact):
        config = replace(CONFIG, num_codes=10)

    measured = measure(OfTen(), map(read_map, files))
    assert (measured.mse, measured.mae, measured.pair_order) == (0, 0, 1)
    assert (measured.codes_used, measured.num_codes, measured.num_maps) == (8, 10, 24)
    assert measured.perplexity == 8
    assert 0 < measured.mse_blocks < measured.mse_flat
    assert "codes used     8 of 10" in measured_words(measured)


def test_a_flat_map_has_no_point_pairs():
    measured = measure(Exact(), [np.full((32, 32), 0.5, np.float32)])
    assert measured.pair_order is None and "pair order" not in measured_words(measured)


def test_there_must_be_something_to_measure_and_to_draw():
    with pytest.raises(DataError, match="no depth maps to measure on"):
        measure(Exact(), [])
    with pytest.raises(DataError, match="no depth maps to draw"):
        draw_reconstructions(Exact(), [])


def test_the_picture_shows_true_decoded_and_difference():
    class Dark(Exact):
        def decode(self, codes):
            return self.last * 0

    depth = np.ones((32, 32), np.float32)
    picture = draw_reconstructions(Dark(), [depth, depth], side_px=20)
    colours = [picture.getpixel((picture.width - 10, 24 * row + 10)) for row in range(3)]
    assert colours == [(255, 255, 255), (0, 0, 0), (0, 0, 255)]  # too far is blue
    assert picture.height == 3 * 24


def test_a_few_files_are_spread_over_all():
    assert spread(list(range(100))) == [0, 12, 24, 36, 48, 60, 72, 84]
    assert spread(list(range(3))) == [0, 1, 2]
