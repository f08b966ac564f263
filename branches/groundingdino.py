"""GroundingDINO as transformers computes it: weights, captions, and one pass over an image."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vpt.branches.base import BranchError

if TYPE_CHECKING:
    from transformers import GroundingDinoConfig, PreTrainedTokenizerBase

# Names of IDEA-Research's checkpoints (`*.pth`), as patterns, and what the port calls them.
# The three rows of `qkv` and `in_proj` are split after this.
_SWIN = "model.backbone.conv_encoder.model"
_PORT_NAMES = (
    (r"^bert\.", "model.text_backbone."),
    (r"^feat_map\.", "model.text_projection."),
    (r"^input_proj\.", "model.input_proj_vision."),
    (r"^backbone\.0\.patch_embed\.proj\.", f"{_SWIN}.embeddings.patch_embeddings.projection."),
    (r"^backbone\.0\.patch_embed\.norm\.", f"{_SWIN}.embeddings.norm."),
    (r"^backbone\.0\.norm1\.", f"{_SWIN}.hidden_states_norms.stage2."),
    (r"^backbone\.0\.norm2\.", f"{_SWIN}.hidden_states_norms.stage3."),
    (r"^backbone\.0\.norm3\.", f"{_SWIN}.hidden_states_norms.stage4."),
    (r"^backbone\.0\.layers\.", f"{_SWIN}.encoder.layers."),
    (r"(blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"\.attn\.(qkv|relative_position)", r".attention.self.\1"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^transformer\.tgt_embed\.", "model.query_position_embeddings."),
    (r"^transformer\.enc_out_bbox_embed\.", "model.encoder_output_bbox_embed."),
    (r"^transformer\.encoder\.text_layers\.(\d+)", r"model.encoder.layers.\1.text_enhancer_layer"),
    (r"^transformer\.encoder\.fusion_layers\.(\d+)", r"model.encoder.layers.\1.fusion_layer"),
    (r"^transformer\.encoder\.layers\.(\d+)", r"model.encoder.layers.\1.deformable_layer"),
    (r"^transformer\.", "model."),
    (r"text_enhancer_layer\.norm1\.", "text_enhancer_layer.layer_norm_before."),
    (r"text_enhancer_layer\.norm2\.", "text_enhancer_layer.layer_norm_after."),
    (r"deformable_layer\.norm1\.", "deformable_layer.self_attn_layer_norm."),
    (r"deformable_layer\.norm2\.", "deformable_layer.final_layer_norm."),
    (r"fusion_layer\.gamma_v", "fusion_layer.vision_param"),
    (r"fusion_layer\.gamma_l", "fusion_layer.text_param"),
    (r"fusion_layer\.layer_norm_v\.", "fusion_layer.layer_norm_vision."),
    (r"fusion_layer\.layer_norm_l\.", "fusion_layer.layer_norm_text."),
    (r"(fusion_layer\.attn\.\w*?)v_proj\.", r"\1vision_proj."),
    (r"(fusion_layer\.attn\.\w*?)l_proj\.", r"\1text_proj."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"decoder\.norm\.", "decoder.layer_norm."),
    (r"ref_point_head\.", "reference_points_head."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.ca_text\.", ".encoder_attn_text."),
    (r"\.catext_norm\.", ".encoder_attn_text_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
)
# Weights that only one side has: of training, constants, and heads that detection does not use.
_ONE_SIDED = re.compile(
    r"label_enc\.weight|position_ids|relative_position_index|text_backbone\.pooler\.|swin\.layernorm\."
)


@dataclass(frozen=True)
class Detections:
    """Output of a GroundingDINO for one image and one caption, for each of Q queries."""

    hidden_states: Tensor  # [Q, C], of the last decoder layer
    token_scores: Tensor  # [Q, T] 0 to 1, T >= tokens of the caption; 0 after them
    boxes_cxcywh: Tensor  # [Q, 4], 0 to 1 of the image


@dataclass(frozen=True)
class Caption:
    """A caption as the text encoder takes it."""

    text: str
    tokens: Mapping[str, Tensor]  # "input_ids", "token_type_ids", "attention_mask": [1, L]


def make_caption(tokenizer: PreTrainedTokenizerBase, phrase: str, max_text_len: int) -> Caption:
    """Write a phrase as ``preprocess_caption`` of groundingdino/util/inference.py, and tokenize."""
    text = phrase.lower().strip()
    if not text.strip(". ?"):
        raise BranchError(f"expected a phrase to look for; got {phrase!r}")
    text = text if text.endswith(".") else text + "."
    tokens = tokenizer([text], return_tensors="pt")
    if (num_tokens := tokens["input_ids"].shape[1]) > max_text_len:
        raise BranchError(
            f"a phrase may have {max_text_len} tokens; got {num_tokens}: {text[:40]}..."
        )
    return Caption(text, dict(tokens))


def decode_phrase(tokenizer: PreTrainedTokenizerBase, caption: Caption, chosen: Tensor) -> str:
    """Decode the tokens chosen by ``[T]`` bool, T >= L, without delimiters."""
    delimiters = delimiter_ids(tokenizer)
    input_ids = caption.tokens["input_ids"][0].tolist()
    kept = [
        token for token, is_chosen in zip(input_ids, chosen.tolist(), strict=False) if is_chosen
    ]
    return str(tokenizer.decode([token for token in kept if token not in delimiters]))


def delimiter_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens between which GroundingDINO reads phrases."""
    return list(tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"]))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `BranchError` if the delimiters do not have the ids that the port has built in."""
    if (ids := delimiter_ids(tokenizer)) != [101, 102, 1012, 1029]:
        raise BranchError(
            "expected a BERT tokenizer with the tokens [CLS] [SEP] . ? at 101, 102, 1012 and 1029; "
            f"got ids {ids}; use that of bert-base-uncased"
        )


def load_tokenizer(path_or_id: str | Path, **kwargs: Any) -> Any:
    """Load the tokenizer beside the weights, of the same revision."""
    from transformers import AutoTokenizer

    named = {"revision", "cache_dir", "token", "local_files_only", "subfolder"} & set(kwargs)
    return AutoTokenizer.from_pretrained(path_or_id, **{name: kwargs[name] for name in named})


def load_port(path_or_id: str | Path | None, **kwargs: Any) -> Any:
    """Load a ``GroundingDinoForObjectDetection``; see `GroundingBranch.from_transformers`."""
    from transformers import GroundingDinoForObjectDetection

    kwargs = {"dtype": torch.float32, **kwargs}
    encoder = GroundingDinoForObjectDetection.from_pretrained(path_or_id, **kwargs)
    encoder, *report = encoder if isinstance(encoder, tuple) else (encoder,)
    attention = encoder.model.text_backbone.config._attn_implementation
    if attention != "sdpa":
        raise BranchError(
            f"expected the text encoder to run in sdpa attention; got {attention}, which reads its "
            "mask wrongly; leave attn_implementation out"
        )
    correct_positions(encoder)
    return (encoder, *report) if report else encoder


def load_released(weights_path: str | Path) -> Any:
    """Load a checkpoint of IDEA-Research (``*.pth``) into the port.

    Raises:
        BranchError: if it is not a GroundingDINO, or one of another form.
    """
    checkpoint = torch.load(weights_path, map_location="cpu", weights_only=True)
    released = checkpoint.get("model", checkpoint)
    weights = port_weights(released)
    try:
        config = port_config(weights)
    except (KeyError, ValueError) as exc:
        raise BranchError(f"{weights_path} holds no GroundingDINO: no {exc}") from exc
    encoder, report = load_port(None, config=config, state_dict=weights, output_loading_info=True)
    wrong = {
        kind: sorted(
            name for name in map(str, report[f"{kind}_keys"]) if not _ONE_SIDED.search(name)
        )
        for kind in ("missing", "unexpected", "mismatched")
    }
    if any(wrong.values()):
        raise BranchError(f"{weights_path} is no GroundingDINO of the released form: {wrong}")
    return encoder


def port_weights(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a released checkpoint as transformers saves them."""
    weights = {}
    for name, weight in released.items():
        name = name.removeprefix("module.")
        for pattern, replacement in _PORT_NAMES:
            name = re.sub(pattern, replacement, name)
        if joined := re.search(r"qkv\.|in_proj_", name):
            for part, rows in zip(("query", "key", "value"), weight.chunk(3), strict=True):
                weights[name.replace(joined[0], f"{part}.")] = rows.contiguous()
        else:
            weights[name] = weight
    return weights


def port_config(weights: Mapping[str, Tensor]) -> GroundingDinoConfig:
    """Read the sizes of a model from its weights, named as `port_weights` does."""
    from transformers import GroundingDinoConfig, SwinConfig

    def count(prefix: str) -> int:
        found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in weights)
        return 1 + max(int(match[1]) for match in found if match)

    stages = [f"{_SWIN}.encoder.layers.{i}.blocks" for i in range(count(f"{_SWIN}.encoder.layers"))]
    tables = [weights[f"{s}.0.attention.self.relative_position_bias_table"] for s in stages]
    swin = SwinConfig(
        embed_dim=len(weights[f"{_SWIN}.embeddings.norm.weight"]),
        depths=[count(stage) for stage in stages],
        num_heads=[table.shape[1] for table in tables],
        window_size=(math.isqrt(len(tables[0])) + 1) // 2,
        out_indices=[2, 3, 4],
    )
    words = weights["model.text_backbone.embeddings.word_embeddings.weight"]
    text_layers = "model.text_backbone.encoder.layer"
    text_config = {
        "model_type": "bert",
        "vocab_size": len(words),
        "hidden_size": words.shape[1],
        "num_hidden_layers": count(text_layers),
        "num_attention_heads": max(1, words.shape[1] // 64),
        "intermediate_size": len(weights[f"{text_layers}.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(
            weights["model.text_backbone.embeddings.position_embeddings.weight"]
        ),
    }
    queries = weights["model.query_position_embeddings.weight"]
    layer = "model.decoder.layers.0"
    num_levels, num_points = count("model.input_proj_vision"), 4
    num_offsets = len(weights[f"{layer}.encoder_attn.sampling_offsets.bias"])
    num_heads = num_offsets // (2 * num_levels * num_points)
    ffn_dim = len(weights[f"{layer}.fc1.bias"])
    return GroundingDinoConfig(
        backbone_config=swin,
        text_config=text_config,
        d_model=queries.shape[1],
        num_queries=len(queries),
        num_feature_levels=num_levels,
        encoder_layers=count("model.encoder.layers"),
        decoder_layers=count("model.decoder.layers"),
        encoder_attention_heads=num_heads,
        decoder_attention_heads=num_heads,
        encoder_ffn_dim=ffn_dim,
        decoder_ffn_dim=ffn_dim,
    )


def correct_positions(encoder: Any) -> None:
    """Give each word of a phrase its position, as the released weights expect.

    transformers before 5.23 has the full stop of a phrase at position 0, where
    groundingdino/models/GroundingDINO/bertwarper.py counts through it, and from about 5.9 rounds
    the embeddings of integer positions. Since 5.23 this changes nothing.
    """

    def text_backbone(_: nn.Module, args: Any, kwargs: Any) -> Any:
        attends = args[1][:, 0]  # [B, L, L]
        return args[:3], {**kwargs, "position_ids": _positions(attends)}

    def fusion(_: nn.Module, args: Any, kwargs: Any) -> Any:
        positions = _positions(~kwargs["text_self_attention_masks"])
        return args, {**kwargs, "text_position_ids": positions.to(kwargs["text_features"])}

    encoder.model.text_backbone.register_forward_pre_hook(text_backbone, with_kwargs=True)
    encoder.model.encoder.register_forward_pre_hook(fusion, with_kwargs=True)


def _positions(attends: Tensor) -> Tensor:
    """``[B, L]``: how many tokens of the same phrase precede each, from ``[B, L, L]`` bool."""
    return attends.tril().sum(-1) - 1


def detect(encoder: Any, pixel_values: Tensor, caption: Caption) -> Detections:
    """Run a GroundingDINO on an image ``[1, 3, h, w]`` without padding."""
    if pixel_values.dtype not in (torch.float32, torch.float64):
        raise BranchError(
            f"GroundingDINO runs in float32 only; its weights are {pixel_values.dtype}; keep "
            "them in float32"
        )
    outputs = encoder(pixel_values=pixel_values, **caption.tokens)
    token_scores = outputs.logits.sigmoid()
    return Detections(outputs.last_hidden_state[0], token_scores[0], outputs.pred_boxes[0])
