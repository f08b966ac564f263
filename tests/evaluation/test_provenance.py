"""A model's hash names its weights and settings, not the release of a library."""

import torch
from golden_data import GOLDENS
from tiny_model import tiny_model

from vpt.evaluation.provenance import hash_model
from vpt.model.modeling import load_model


def test_the_hash_of_a_model_is_the_same_with_every_transformers():
    model = load_model(str(GOLDENS / "checkpoints" / "dino"), device="cpu")
    assert hash_model(model) == "275fbd3bc67a4b6e"


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
