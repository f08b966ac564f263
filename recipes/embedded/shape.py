"""The embedded model before training: every number of its shape, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

from recipes.embedded.questions import all_texts
from vpt.model.building import CHAT_TEMPLATE, add_perception_tokens, vpt_config
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.processing import VPTProcessor, build_image_processor
from vpt.protocol.tokens import (
    DEFAULT_SYSTEM,
    IMAGE_PAD,
    RELEASED_GRID_SIZE,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    branches_named,
)

BRANCHES = ("clip", "dino", "sam")
FIRST_LOOK_PX = 112
"""Side of a square picture at the first look and of a crop: 16 tokens."""

TOWER_DEPTH = 3

_HIDDEN_SIZE = 128
_VOCAB_SIZE = 768
_CONTROL_TOKENS = ["<|endoftext|>", TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD]
_CONTROL_TOKENS += ["<|video_pad|>"]

_TEXT = {
    "hidden_size": _HIDDEN_SIZE,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # As Qwen2-VL. The slow channels compare contents at any distance; with a base of 10 none does.
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1_000_000.0,
        "mrope_section": [4, 6, 6],
    },
    "bos_token_id": None,
}
_VISION = {
    "embed_dim": 96,
    "num_heads": 4,
    "mlp_ratio": 4,
    "hidden_size": _HIDDEN_SIZE,
}
_DINO = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 3,
    "image_size": 256,
    "patch_size": 16,
}
_SAM = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_dim": 192,
    "image_size": 256,
    "patch_size": 16,
    "window_size": 8,
    "global_attn_indexes": [1],
    "output_channels": 64,
    "num_pos_feats": 32,
}
_PREPROCESS = {
    "dino": {
        "size": {"height": 256, "width": 256},
        "do_center_crop": False,
    },
    "sam": {"size": {"longest_edge": 256}, "pad_size": {"height": 256, "width": 256}},
}


def fresh_model(
    seed: int, tower_depth: int = TOWER_DEPTH
) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """The embedded model with random weights, and its processor.

    Args:
        seed: of the weights.
        tower_depth: blocks of the vision tower.
    """
    tokenizer = train_tokenizer(all_texts())
    ids = tokenizer.get_vocab()
    base = Qwen2VLConfig(
        text_config={**_TEXT, "vocab_size": _VOCAB_SIZE, "eos_token_id": ids[TURN_END]},
        vision_config={**_VISION, "depth": tower_depth},
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )
    config = vpt_config(base, tokenizer, branches_named(BRANCHES))
    # Pictures are shrunk by the image processor alone, smoothly; the released limit works by
    # nearest neighbour, which turns fine lines into coarse ones.
    config.image_resolution = config.seg_image_resolution = None
    config.para_mask_id, config.para_mask_ratio = 1, 0.5
    # Stage 1 aligns the stems; the large steps of the later stages would undo that.
    config.freeze_stems = True
    for name, encoder in (("dino", _DINO), ("sam", _SAM)):
        config.branch_configs[name] = {"encoder": encoder, "preprocess": _PREPROCESS[name]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VPTForConditionalGeneration(config)
        _spread(model)
    pixels = FIRST_LOOK_PX**2
    image_processor = build_image_processor(
        {"size": {"shortest_edge": pixels // 4, "longest_edge": pixels}}
    )
    return model, VPTProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a token for each word of the texts, and any other spelled out.

    Args:
        texts: what it should write in few tokens.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=_single_digits(), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE - 64,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([DEFAULT_SYSTEM, "system\n", "user\n", "assistant\n", *texts], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=TURN_END, pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(_CONTROL_TOKENS, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    add_perception_tokens(tokenizer, branches_named(BRANCHES), RELEASED_GRID_SIZE)
    if len(tokenizer) > _VOCAB_SIZE:
        raise ValueError(f"{len(tokenizer)} tokens do not fit a vocabulary of {_VOCAB_SIZE}")
    return tokenizer


def _single_digits() -> object:
    from tokenizers import Regex

    return Regex(r"\d")


def _spread(model: VPTForConditionalGeneration) -> None:
    """Scale matrices by their width: the usual small init is too small here.

    The encoders' deep matrices are scaled down. The language model's are not, and its embeddings
    are as long as what a layer adds: so it finds sooner what a word names
    (docs/perception-log.md).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            scale = module.in_features**-0.5
            if name.endswith(("attn.proj", "mlp.fc2", "lin2")):
                scale /= 8**0.5
            if name.endswith("linear_condition"):
                # f + (f . c) c: with |c|^2 = D the second term would drown what f says of a place.
                scale *= 0.1
            nn.init.normal_(module.weight, 0, scale)
    nn.init.normal_(model.get_input_embeddings().weight, 0, 0.13)
