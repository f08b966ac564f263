"""What all tests share: one thread, no network, the goldens' folder."""

import os
from pathlib import Path

import pytest
import torch
from golden_data import GOLDENS

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """Folder of a tiny model with random weights, which writes on and on."""
    from tiny_model import tiny_model

    folder = tmp_path_factory.mktemp("random")
    model, processor = tiny_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys):
    """Run ``vpt`` as a person types it; returns code, stdout and stderr."""
    from vpt import cli

    def command(*words):
        code = cli.main(list(map(str, words)))
        return code, *capsys.readouterr()

    return command
