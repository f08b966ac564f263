"""Encoders kept in a file, and models made of them."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from recipes.embedded import encoders
from recipes.embedded.shape import fresh_model
from vpt.model.modeling import load_model


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["encoders", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        encoders.main()
    return ended.value.code


def test_encoders_are_kept_and_come_back_with_a_fresh_language_model(tmp_path, monkeypatch, capsys):
    trained, processor = fresh_model(5)
    trained.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    file = tmp_path / "encoders.safetensors"
    assert run(monkeypatch, tmp_path / "trained", file) == 0
    assert file.stat().st_size < 3e6
    assert run(monkeypatch, tmp_path / "trained", tmp_path / "none" / "file") == 2
    assert "cannot write" in capsys.readouterr().err
    assert run(monkeypatch, file, tmp_path / "again") == 0
    again = load_model(str(tmp_path / "again"), device="cpu", dtype=torch.float32)
    fresh, _ = fresh_model(1)
    for name, tensor in again.state_dict().items():
        is_language = name.startswith(("model.language_model.", "lm_head."))
        wanted = fresh.state_dict()[name] if is_language else trained.state_dict()[name].half()
        assert torch.equal(tensor, wanted.float()), name


def test_a_file_of_something_else_is_refused(tmp_path, monkeypatch, capsys):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert run(monkeypatch, tmp_path / "other.safetensors", tmp_path / "out") == 2
    assert "does not have the encoders of the embedded model" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path / "none.safetensors", tmp_path / "out") == 2
    assert "cannot read" in capsys.readouterr().err and not (tmp_path / "out").exists()
