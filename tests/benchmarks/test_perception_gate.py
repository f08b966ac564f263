"""The gate of perception counts as it says, and prints its table from a checkpoint."""

import sys

import numpy as np
import perception_gate
import pytest
import torch

pytest.importorskip("sklearn")

from recipes.counting.files import write_counting_scenes
from recipes.embedded.perception import Found, SceneHeads, Thing
from recipes.embedded.shape import fresh_model
from recipes.embedded.views import TowerView
from recipes.scenes.files import write_scenes
from vpt.depth.tokenizer import DepthTokenizer, DepthTokenizerConfig


def test_centres_match_once_within_half_a_cell_and_by_kind():
    things = [Thing("star", "red", (1, 1, 2, 2)), Thing("cross", "red", (5, 5, 6, 6))]
    matches = perception_gate.Matches()
    found = [
        Found("star", (1.9, 1.5), 0.9),  # 0.4 away
        Found("star", (1.5, 1.5), 0.8),  # there, but that star is found
        Found("star", (5.5, 5.5), 0.7),  # a cross is there
    ]
    matches.add(found, things)
    assert matches.rows == [(1, 2, 1)]
    matches.add([], [])
    assert matches.say().startswith("0.400 [")
    assert matches.say().endswith("precision 0.333, recall 0.500")
    far = perception_gate.Matches()
    far.add([Found("star", (2.1, 1.5), 0.9)], things[:1])
    assert far.rows == [(0, 1, 1)]


def test_shares_have_their_number():
    assert perception_gate.share([True, False, True, True]).startswith("0.750 [0.301, 0.954] | 4")


def test_the_gate_prints_what_a_checkpoint_reads(tmp_path, monkeypatch, capsys):
    shape = DepthTokenizerConfig(code_dim=8, hidden_dim=2, num_residual_blocks=0)
    DepthTokenizer(shape.build(), shape).save(tmp_path / "tokenizer")
    for name, write in (("rooms", write_scenes), ("counting", write_counting_scenes)):
        list(write(tmp_path / name, "heldout", 3, 0, 128))
    trained = torch.nn.ModuleDict(
        {"view": TowerView(*fresh_model(1)), "scene_heads": SceneHeads(128)}
    )
    torch.save({"step": 7, "trained": trained.state_dict()}, tmp_path / "tower.pt")
    (tmp_path / "a.yaml").write_text("output_dir: .\ndepth_tokenizer: tokenizer\n")
    monkeypatch.chdir(tmp_path)
    words = ["gate", "a.yaml", "--rooms", "rooms", "--counting", "counting"]
    monkeypatch.setattr(sys, "argv", words)
    perception_gate.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| step 7 | value [95 %] | n |"
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[2:]}
    assert rows["depth codes, top-1 (gate 0.7)"][2] == "300 |"
    truth = rows["the same on the map of the true codes"][1]
    assert 0 <= float(truth.split()[0]) <= 1
    assert np.isfinite(float(rows["centres of the kind asked about, F1 (gate 0.9)"][1].split()[0]))


def test_a_gate_without_a_checkpoint_ends_with_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.yaml").write_text("output_dir: .\ndepth_tokenizer: missing\n")
    monkeypatch.chdir(tmp_path)
    words = ["gate", "a.yaml", "--rooms", "rooms", "--counting", "counting"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        perception_gate.main()
    assert ended.value.code == 2
    assert "missing" in capsys.readouterr().err
