"""Models with random weights, from tiny to full size, on each backbone, and a picture for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tiny_model import TINY_DINO, TINY_PREPROCESS, TINY_SAM, byte_tokenizer

from vpt.images import LoadedImage, load_image
from vpt.model.building import CHAT_TEMPLATE, add_perception_tokens, vpt_config
from vpt.model.config import BASE_CONFIGS
from vpt.model.folder import BACKBONES
from vpt.model.modeling import BASE_MODELS, MODELS, VPTForConditionalGeneration
from vpt.model.processing import VPTProcessor, build_image_processor
from vpt.protocol.tokens import (
    IMAGE_PAD,
    RELEASED_GRID_SIZE,
    TURN_END,
    VISION_END,
    VISION_START,
)

BRANCHES = ("reencode", "dino", "sam")


@dataclass(frozen=True)
class Size:
    """Shapes of one model and its picture.

    Attributes:
        text: fields of the LLM's configuration.
        vision: fields of ``Qwen2VLVisionConfig``; other towers are of the same shape.
        image_wh: of the picture, in pixels.
        tie: whether the head shares its weights with the embedding.
        encoders: branch -> its ``branch_configs`` entry; empty for the released encoders.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    image_wh: tuple[int, int]
    tie: bool = True
    encoders: dict[str, Any] = field(default_factory=dict)


def _text(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int) -> dict:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
    }


def _vision(depth: int, embed_dim: int, num_heads: int) -> dict[str, Any]:
    return {"depth": depth, "embed_dim": embed_dim, "num_heads": num_heads, "mlp_ratio": 4}


_TINY_DINO = {"encoder": TINY_DINO, "preprocess": TINY_PREPROCESS["dino"]}
_TINY_SAM = {"encoder": TINY_SAM, "preprocess": TINY_PREPROCESS["sam"]}
_SMALL_DINO = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}

# SAM is not measured, so its encoder may stay tiny where the rest is.
SIZES = {
    "tiny": Size(
        _text(192, 4, 4, 2, 512, 512),
        _vision(2, 64, 2),
        (224, 224),
        encoders={"dino": _TINY_DINO, "sam": _TINY_SAM},
    ),
    "small": Size(
        _text(512, 8, 8, 2, 2752, 4096),
        _vision(8, 256, 4),
        (448, 448),
        encoders={"dino": {"encoder": {**_SMALL_DINO, "patch_size": 14}}, "sam": _TINY_SAM},
    ),
    "2b": Size(_text(1536, 28, 12, 2, 8960, 151936), _vision(32, 1280, 16), (896, 672)),
    "7b": Size(_text(3584, 28, 28, 4, 18944, 152064), _vision(32, 1280, 16), (896, 672), tie=False),
}


def _tower(size: Size, backbone: str) -> dict[str, Any]:
    """Settings of a backbone's tower, whose parts stand in the same proportion as at full size."""
    out, vision = size.text["hidden_size"], size.vision
    if backbone == "qwen2_vl":
        return {**vision, "hidden_size": out}
    width, quarters = vision["embed_dim"], [vision["depth"] * n // 4 for n in (1, 2, 3, 4)]
    parts = {"depth": vision["depth"], "num_heads": vision["num_heads"], "hidden_size": width}
    parts |= {"intermediate_size": width * vision["mlp_ratio"], "out_hidden_size": out}
    if backbone == "qwen2_5_vl":
        return {**parts, "fullatt_block_indexes": sorted({max(n - 1, 0) for n in quarters})}
    return {**parts, "deepstack_visual_indexes": sorted({*quarters[:3]})}


def build(
    size: Size, device: torch.device, dtype: torch.dtype, backbone: str = "qwen2_vl"
) -> tuple[Any, VPTProcessor]:
    """Make a model with random weights on its device, and its processor."""
    tokenizer = byte_tokenizer()
    num_bytes = len(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))
    add_perception_tokens(tokenizer, BRANCHES, RELEASED_GRID_SIZE)
    ids = tokenizer.get_vocab()
    head_dim = size.text["hidden_size"] // size.text["num_attention_heads"]
    sections = [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]  # as in Qwen2-VL
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    base = BASE_CONFIGS[backbone](
        text_config={
            **size.text,
            "rope_parameters": rope,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": ids[TURN_END],
            **({"head_dim": head_dim} if backbone == "qwen3_vl" else {}),
        },
        vision_config=_tower(size, backbone),
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=size.tie,
    )
    config = vpt_config(base, tokenizer, BRANCHES)
    config.branch_configs.update(copy.deepcopy(size.encoders))
    config.image_resolution = None
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS[config.model_type]._from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.startswith("projectors"):
            std = parameter[0].numel() ** -0.5
            is_sharp = name.endswith(("q_proj.weight", "k_proj.weight"))  # varied answers
            parameter.data.normal_(0, 2 * std if is_sharp else std)
    for table in {model.get_input_embeddings().weight, model.lm_head.weight}:
        table.data[num_bytes:] *= 0.1  # control tokens are never the likeliest
    patch_size = config.vision_config.patch_size
    limits = {"shortest_edge": (4 * patch_size) ** 2}
    limits["longest_edge"] = size.image_wh[0] * size.image_wh[1]
    image_processor = build_image_processor({"size": limits, "patch_size": patch_size})
    return model, VPTProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def plain_model(model: VPTForConditionalGeneration) -> Any:
    """A stock model of the backbone that shares the weights of a VPT model."""
    settings = model.config.to_dict()
    (base,) = [name for name, types in BACKBONES.items() if settings["model_type"] in types]
    skipped = ("model_type", "architectures", "transformers_version", "dtype")
    known = BASE_CONFIGS[base]().to_dict()
    given = {k: v for k, v in settings.items() if k in known and k not in skipped}
    with torch.device(model.device):
        plain = BASE_MODELS[base]._from_config(
            BASE_CONFIGS[base](**given), dtype=model.dtype, attn_implementation="sdpa"
        )
    weights = model.state_dict()
    wanted = plain.state_dict().keys()
    plain.load_state_dict({key: weights[key] for key in wanted}, assign=True)
    plain.tie_weights()
    return plain.eval()


def picture(size_wh: tuple[int, int], seed: int = 0) -> LoadedImage:
    """A picture with gradients, bright spots and grain, the same for the same seed."""
    rng = np.random.default_rng(seed)
    width, height = size_wh
    y, x = np.mgrid[0:height, 0:width] / max(size_wh)
    slopes = rng.uniform(-120, 120, (3, 2))
    pixels = 128 + slopes[:, 0, None, None] * (x - 0.5) + slopes[:, 1, None, None] * (y - 0.5)
    for _ in range(12):
        (cx, cy), radius = rng.uniform(0, 1, 2), rng.uniform(0.03, 0.2)
        spot = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / radius**2)
        pixels += rng.uniform(-90, 90, (3, 1, 1)) * spot
    pixels += rng.normal(0, 8, pixels.shape)
    return load_image(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
