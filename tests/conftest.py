"""What all tests share: one thread, no network, the goldens' folder."""

import os
from pathlib import Path

import pytest
import torch
from bases import EACH_BACKBONE
from golden_data import GOLDENS

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


def save_tiny(folder: Path, backbone: str = "qwen2_vl") -> Path:
    from tiny_model import tiny_model

    for part in tiny_model(backbone=backbone):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """Folder of a tiny model with random weights, which writes on and on."""
    return save_tiny(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="session", params=EACH_BACKBONE)
def each_model(request, tmp_path_factory) -> Path:
    """The same on each backbone."""
    return save_tiny(tmp_path_factory.mktemp("random"), request.param)


@pytest.fixture
def run(capsys):
    """Run ``vpt`` as a person types it; returns code, stdout and stderr."""
    from vpt import cli

    def command(*words):
        code = cli.main(list(map(str, words)))
        return code, *capsys.readouterr()

    return command
