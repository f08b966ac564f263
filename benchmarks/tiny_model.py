"""A tiny VPT model with random weights, for tests and as the smallest size of benchmarks."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vpt.model.building import CHAT_TEMPLATE, add_perception_tokens, vpt_config
from vpt.model.config import BASE_CONFIGS
from vpt.model.hub import stored_weights
from vpt.model.modeling import MODELS, VPTForConditionalGeneration
from vpt.model.processing import VPTProcessor, build_image_processor
from vpt.protocol.tokens import (
    IMAGE_PAD,
    NO_CONTENT,
    RELEASED_GRID_SIZE,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    ContentTokens,
    branches_named,
)

_BASE_TOKENS = ["<|endoftext|>", TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD]
_BASE_TOKENS += ["<|video_pad|>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that writes bytes: Qwen2's rules with no merges, and its control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=TURN_END, pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(_BASE_TOKENS, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


TINY_DINO = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 112,
    "patch_size": 14,
}
TINY_SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_dim": 64,
    "image_size": 256,
    "patch_size": 16,
    "window_size": 7,
    "global_attn_indexes": [1],
    "output_channels": 64,
    "num_pos_feats": 32,
}
TINY_VISION: dict[str, Callable[[int], dict[str, Any]]] = {
    "qwen2_vl": lambda width: {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "hidden_size": width,
    },
    "qwen2_5_vl": lambda width: {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": width,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": lambda width: {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": width,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1],
    },
}
"""Settings of the tower by the backbone's ``model_type``, from the LLM's width."""

TINY_TEXT = {"qwen3_vl": {"head_dim": 32}}  # wider than hidden_size / num_attention_heads

TINY_PREPROCESS = {
    "dino": {"size": {"shortest_edge": 128}, "crop_size": {"height": 112, "width": 112}},
    "sam": {"size": {"longest_edge": 256}, "pad_size": {"height": 256, "width": 256}},
}


def tiny_model(
    branches: Iterable[str] = ("clip", "dino", "sam"),
    *,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    max_tokens: int = 256,
    tie_word_embeddings: bool = False,
    content: ContentTokens = NO_CONTENT,
    grounding: bool = False,
    backbone: str = "qwen2_vl",
    **text_settings: Any,
) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """A small model with random weights, the same for the same arguments.

    Args:
        branches: names of branches, as for ``build_from_base``.
        seed: of the weights.
        hidden_size: LLM width, a multiple of 32.
        num_layers: of the LLM.
        max_tokens: of an image under the tower.
        tie_word_embeddings: whether the head is the embedding table.
        content: what it writes by itself.
        grounding: whether it can call for phrases.
        backbone: ``model_type`` of the base.
        **text_settings: other fields of the LLM's configuration.
    """
    wanted = branches_named(branches)
    tokenizer = byte_tokenizer()
    add_perception_tokens(tokenizer, wanted, RELEASED_GRID_SIZE, content, grounding)
    ids = tokenizer.get_vocab()
    head_dim = TINY_TEXT.get(backbone, {}).get("head_dim", hidden_size // 4)
    times, rows = head_dim // 8, 3 * head_dim // 16
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 3 // 2,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [times, rows, head_dim // 2 - times - rows],
        },
        "bos_token_id": None,
        "eos_token_id": ids[TURN_END],
        **TINY_TEXT.get(backbone, {}),
        **text_settings,
    }
    base = BASE_CONFIGS[backbone](
        text_config=text,
        vision_config=TINY_VISION[backbone](hidden_size),
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=tie_word_embeddings,
    )
    config = vpt_config(base, tokenizer, wanted, content=content)
    for name, encoder in (("dino", TINY_DINO), ("sam", TINY_SAM)):
        settings = {"encoder": encoder, "preprocess": TINY_PREPROCESS[name]}
        config.branch_configs[name] = copy.deepcopy(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[config.model_type](config).eval()
    _spread_weights(model, seed)
    patch_size = config.vision_config.patch_size
    token = (2 * patch_size) ** 2  # pixels
    size = {"shortest_edge": 4 * token, "longest_edge": max_tokens * token}
    image_processor = build_image_processor({"size": size, "patch_size": patch_size})
    processor = VPTProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
    return model, processor


def _spread_weights(model: VPTForConditionalGeneration, seed: int) -> None:
    """Draw matrices anew, so large that answers depend on what is asked and seen.

    Each has a generator of its own, seeded by the name that folders give it, so that neither the
    order of parameters nor the release of transformers matters.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        (stored,) = stored_weights({name: parameter})
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {stored}".encode()))
        scale = parameter[0].numel() ** -0.5
        parameter.data.normal_(0, 0.5 if "embed_tokens" in name else scale, generator=generator)
