"""Plain Qwen2-VL folders, of which tests make VPT models."""

import torch
from tiny_model import byte_tokenizer, tiny_model
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vpt.model.processing import build_image_processor


def save_base(folder, *, num_rows=320, tied=False):
    """A tiny plain Qwen2-VL with a tokenizer that knows no perception tokens."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.get_vocab()
    tiny = tiny_model(())[0].config
    text = {**tiny.text_config.to_dict(), "vocab_size": num_rows}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=tiny.vision_config.to_dict(),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(11)
    model = Qwen2VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}
    build_image_processor({"size": size}).save_pretrained(folder)
    return model
