"""Pieces of a prompt are what the chat template and the released rows make of the same words."""

import pytest
import torch
from golden_data import GOLDENS, VARIANTS
from PIL import Image
from tiny_model import tiny_model

import vpt
from vpt.errors import CheckpointError, PromptError
from vpt.images import load_image
from vpt.model.config import load_config
from vpt.model.encoding import RowEncoder, open_row_image
from vpt.model.processing import (
    FeaturePiece,
    ImagePiece,
    TokenPiece,
    VPTProcessor,
    build_image_processor,
)
from vpt.protocol.tokens import BRANCH_TOKENS, IMAGE_PAD, TURN_END


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
    image = open_row_image("images/a_tall.png", GOLDENS)
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
    encoder = RowEncoder(config, processor, lambda path: open_row_image(path, GOLDENS))
    expected = encoder.encode(row, predict=True).input_ids
    image = open_row_image(name, GOLDENS)
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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patch_size": 0}, "patch_size: expected a whole number from 1 to 256, got 0"),
        ({"merge_size": 10**9}, "merge_size: expected a whole number"),
        ({"size": {"shortest_edge": 10**9, "longest_edge": 10**9}}, "size: expected sides"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "size: expected sides .*, the least first"),
        ({"max_pixels": "many", "min_pixels": 1}, "size: expected sides of 1 to 8192"),
        ({"image_std": [1, 1, 0]}, "image_std: expected three numbers above 0"),
        ({"image_mean": [1, 1]}, "image_mean: expected three numbers"),
        ({"rescale_factor": float("nan")}, "rescale_factor: expected a number above 0, got nan"),
        ({"resample": 9}, "resample: expected a whole number from 0 to 5, got 9"),
        ({"do_resize": "no"}, "do_resize: expected true or false, got no"),
    ],
)
def test_settings_that_no_image_fits_are_refused(settings, words):
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json\): .*{words}"):
        build_image_processor(settings)


def test_a_size_that_is_none_is_refused():
    with pytest.raises(
        CheckpointError, match=r"size in preproc\w+\.json must be an object, not -1"
    ):
        build_image_processor({"size": -1})


def test_options_of_loading_are_applied():
    folder = GOLDENS / "checkpoints" / "dino"
    assert VPTProcessor.from_pretrained(folder).tokenizer.padding_side == "left"
    processor = VPTProcessor.from_pretrained(folder, max_pixels=6272, padding_side="right")
    assert processor.image_processor.size == {"shortest_edge": 3136, "longest_edge": 6272}
    assert processor.tokenizer.padding_side == "right"
    size = {"shortest_edge": 784, "longest_edge": 7840}
    assert VPTProcessor.from_pretrained(folder, size=size).image_processor.size == size
    inside = VPTProcessor.from_pretrained(folder.parent, subfolder="dino")
    assert inside.prompt("Where?", []) == processor.prompt("Where?", [])
    assert load_config(**inside.source).branches == ("dino",)


def test_a_mistyped_option_of_loading_is_named():
    folder = str(GOLDENS / "checkpoints" / "dino")
    with pytest.raises(PromptError, match="unknown option 'max_pixel' of the processor; available"):
        VPTProcessor.from_pretrained(folder, max_pixel=3)
    with pytest.raises(
        PromptError,
        match="unknown option 'max_pixel'; available: allowed_media_domains, base, cache_dir",
    ):
        vpt.load(folder, max_pixel=3)
    with pytest.raises(CheckpointError, match="unexpected keyword argument 'max_pixel'"):
        vpt.VPTForConditionalGeneration.from_pretrained(folder, max_pixel=3)
    with pytest.raises(
        PromptError, match="save_pretrained of the processor takes no option 'safe'"
    ):
        tiny_model(())[1].save_pretrained("nowhere", safe=True)


def test_a_model_in_a_subfolder_is_loaded_whole():
    folder = GOLDENS / "checkpoints"
    runtime = vpt.load(str(folder), subfolder="dino", device="cpu")
    assert runtime.model.name_or_path == str(folder / "dino")


def test_remembered_texts_are_bounded():
    processor = tiny_model(())[1]
    first = processor.encode_text("text 0")
    for number in range(3000):
        processor.encode_text(f"text {number}")
    assert len(processor._text_cache) <= 1024
    assert processor.encode_text("text 0") == first


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
