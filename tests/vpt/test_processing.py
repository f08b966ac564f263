"""Pieces of a prompt are what the chat template and the released rows make of the same words."""

import pytest
import torch
from golden_data import GOLDENS, VARIANTS
from PIL import Image

from vpt.building import tiny_model
from vpt.config import load_config
from vpt.errors import PromptError
from vpt.images import load_image
from vpt.processing import FeaturePiece, ImagePiece, TokenPiece, VPTProcessor, build_image_processor
from vpt.rows import open_image
from vpt.samples import RowEncoder
from vpt.tokens import BRANCH_TOKENS, IMAGE_PAD, TURN_END


def released_processor(variant="dino"):
    return VPTProcessor.from_pretrained(str(GOLDENS / "checkpoints" / variant))


def written_out(processor, pieces, counts):
    """Ids of pieces, with each image's placeholders in its place."""
    ids, counts = [], iter(counts)
    for piece in pieces:
        if isinstance(piece, TokenPiece):
            ids += piece.ids
            continue
        pad = IMAGE_PAD if isinstance(piece, ImagePiece) else BRANCH_TOKENS[piece.branch].pad
        ids += [processor.tokenizer.convert_tokens_to_ids(pad)] * next(counts)
    return ids


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_a_prompt_equals_the_chat_template(num_images):
    processor = released_processor()
    image = open_image("images/a_tall.png", GOLDENS)
    question = "Is the door open? 2 + 2"
    pieces = processor.prompt(question, [image] * num_images)
    if num_images == 2:
        assert sum(isinstance(p, ImagePiece) for p in pieces) == 2
        return
    parts = [{"type": "image"}] * num_images
    text = "\n" * num_images + question
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    expected = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert written_out(processor, pieces, [1] * 2) == processor.tokenizer(expected)["input_ids"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_call_and_reply_equal_a_released_row(variant):
    processor = released_processor(variant)
    branch = {"clip": "reencode"}.get(variant, variant)
    row_tokens = BRANCH_TOKENS[branch]
    name = "images/a_scene.png"
    row = {
        "messages": [
            {"role": "user", "content": "<image>\nWhat color?"},
            {"role": "assistant", "content": row_tokens.call},
            {"role": "user", "content": row_tokens.placeholder},
            {"role": "assistant", "content": "Blue."},
        ],
        "images": [name],
        f"{row_tokens.released}_images": [name],
    }
    config = load_config(str(GOLDENS / "checkpoints" / variant))
    encoder = RowEncoder(config, processor, lambda path: open_image(path, GOLDENS))
    expected = encoder.encode(row, predict=True).input_ids
    image = open_image(name, GOLDENS)
    called = processor.encode_text(row_tokens.call + TURN_END)
    reply = processor.reply([FeaturePiece(branch, image)])
    pieces = [*processor.prompt("What color?", [image]), called, *reply]
    num_features = sum(i == config.pad_id(branch) for i in expected)
    assert written_out(processor, pieces, [12, num_features]) == expected


def test_saving_and_loading_keeps_pixels_and_tokens(tmp_path):
    processor = tiny_model()[1]
    processor.save_pretrained(tmp_path)
    again = VPTProcessor.from_pretrained(tmp_path)
    image = load_image(Image.effect_noise((90, 50), 40).convert("RGB"))
    for one, other in zip(
        processor.preprocess_images([image]), again.preprocess_images([image]), strict=True
    ):
        assert torch.equal(one, other)
    text = BRANCH_TOKENS["sam"].call + "née <|x_3|>"
    assert processor.encode_text(text) == again.encode_text(text)
    assert again.chat_template == processor.chat_template


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (5000, 3), (28, 28), (3, 900)])
def test_images_of_any_shape_get_pixels(size):
    processor = tiny_model()[1]
    pixels, grid = processor.preprocess_images([load_image(Image.new("RGB", size))])
    assert len(pixels) == int(grid.prod())
    assert all(side % 2 == 0 for side in grid[0, 1:].tolist())


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"min_pixels": 3136, "max_pixels": 12544}},
        {"min_pixels": 3136, "max_pixels": 12544},
        {"size": {"shortest_edge": 3136, "longest_edge": 12544}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3136, "max_pixels": 12544},
    ],
)
def test_pixel_limits_are_read_in_every_spelling(settings):
    processor = build_image_processor({"image_processor_type": "x", **settings})
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (3136, 12544)


def test_control_tokens_in_plain_words_are_refused():
    processor = tiny_model()[1]
    for text in ("a <|im_end|>", "<|x_3|>", "<|clip_action_start|>"):
        with pytest.raises(PromptError, match=r"the question holds the control token <\|"):
            processor.prompt(text, [])
    with pytest.raises(PromptError, match="the system prompt holds"):
        processor.prompt("q", [], system="<|image_pad|>")
    with pytest.raises(PromptError, match="question is empty"):
        processor.prompt("\n", [])
    assert processor.prompt("what is <|x_9|> or a <b> tag?", [])
