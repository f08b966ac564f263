"""The backbones that tests run on, and folders of plain ones, of which VPT models are made."""

import pytest
import torch
from tiny_model import byte_tokenizer, tiny_model

from vpt.model.config import BASE_CONFIGS
from vpt.model.folder import BACKBONES
from vpt.model.modeling import BASE_MODELS
from vpt.model.processing import build_image_processor

EACH_BACKBONE = [
    name if name == "qwen2_vl" else pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES
]
"""Parameters of fixtures; all but the first are slow, for tests/model/test_backbones.py is not."""


def save_base(folder, *, num_rows=320, tied=False, backbone="qwen2_vl"):
    """A tiny plain backbone with a tokenizer that knows no perception tokens."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.get_vocab()
    tiny = tiny_model((), backbone=backbone)[0].config
    text = {**tiny.text_config.to_dict(), "vocab_size": num_rows}
    config = BASE_CONFIGS[backbone](
        text_config=text,
        vision_config=tiny.vision_config.to_dict(),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(11)
    model = BASE_MODELS[backbone](config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    patch_size = config.vision_config.patch_size
    size = {"shortest_edge": (4 * patch_size) ** 2, "longest_edge": (16 * patch_size) ** 2}
    build_image_processor({"size": size, "patch_size": patch_size}).save_pretrained(folder)
    return model
