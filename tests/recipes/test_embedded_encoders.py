"""The model that stage 3 starts from, made of a trained one."""

import sys

import pytest
import torch

from recipes.embedded import encoders
from recipes.embedded.shape import fresh_model
from vpt.model.modeling import load_model


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["encoders", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        encoders.main()
    return ended.value.code


def test_encoders_get_a_fresh_language_model(tmp_path, monkeypatch):
    trained, processor = fresh_model(5)
    trained.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    assert run(monkeypatch, tmp_path / "trained", tmp_path / "start") == 0
    made = load_model(str(tmp_path / "start"), device="cpu", dtype=torch.float32)
    fresh, _ = fresh_model(1)
    for name, tensor in made.state_dict().items():
        is_language = name.startswith(("model.language_model.", "lm_head."))
        wanted = (fresh if is_language else trained).state_dict()[name]
        assert torch.equal(tensor, wanted), name


def test_a_model_with_other_encoders_is_refused(tmp_path, monkeypatch, capsys, random_model):
    assert run(monkeypatch, random_model, tmp_path / "out") == 2
    assert "does not have the encoders of the embedded model" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path / "none", tmp_path / "out") == 2
    assert "there is no model" in capsys.readouterr().err and not (tmp_path / "out").exists()
