"""What all tests share: one thread, no network, the goldens' folder."""

import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

GOLDENS = Path(__file__).parent / "goldens"
VARIANTS = {"clip": "reencode", "dino": "dino", "sam": "sam"}


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS
