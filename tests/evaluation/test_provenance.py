"""A model's hash names its weights and settings, not the release of a library."""

import pytest
import torch
from golden_data import GOLDENS
from tiny_model import tiny_model

from vpt.evaluation.provenance import command_line, describe_hardware, hash_model
from vpt.model.modeling import load_model


@pytest.mark.parametrize(
    ("name", "expected"),
    [("clip", "d8bcea2e53ca1b67"), ("dino", "275fbd3bc67a4b6e"), ("sam", "7e024ec3ebb42d5f")],
)
def test_the_hash_of_a_model_is_the_same_with_every_release(name, expected, tmp_path):
    model = load_model(str(GOLDENS / "checkpoints" / name), device="cpu")
    assert hash_model(model) == expected
    model.save_pretrained(tmp_path)  # with what this release writes into config.json
    assert hash_model(load_model(str(tmp_path), device="cpu")) == expected


def test_the_hash_follows_weights_and_settings():
    model, _ = tiny_model(("dino",))
    hashes = [hash_model(model)]
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    hashes.append(hash_model(model))
    model.config.image_resolution = 448
    hashes.append(hash_model(model))
    model.config.text_config.rms_norm_eps = 1e-3
    hashes.append(hash_model(model))
    model.config.branch_configs["dino"]["preprocess"]["size"] = {"shortest_edge": 112}
    hashes.append(hash_model(model))
    assert len(set(hashes)) == len(hashes)


def test_a_published_command_has_no_key_and_no_folder_of_the_machine():
    words = ["/opt/x/evaluation.py", "--splits", "/srv/jane doe/x.jsonl,b.json,plain:/u/c.json"]
    words += ["--images", "images=/data/images", "--out", "~/me/r", "--max-new-tokens", "5"]
    words += ["--api-key", "sk-1", "--hub-token=sk-2", "--judge-url", "http://u:sk-3@h:1/v1"]
    assert command_line(words) == (
        "evaluation.py --splits x.jsonl,b.json,plain:c.json --images images=images --out r "
        "--max-new-tokens 5 --api-key REMOVED --hub-token=REMOVED --judge-url http://h:1/v1"
    )


def test_the_hardware_has_a_name():
    hardware = describe_hardware()
    assert hardware["cpu"] and hardware["threads"] == torch.get_num_threads()
