"""Build a fresh VPT model: from a base Qwen2-VL and encoders, or a tiny random one."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from vpt.errors import CheckpointError
from vpt.model.checkpoint import read_model
from vpt.model.config import VPTConfig, check_generation_config, check_settings
from vpt.model.embeddings import draw_embeddings
from vpt.model.hub import as_checkpoint_error, check_file, check_weights, find_file, read_json
from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.processing import VPTProcessor, build_image_processor
from vpt.model.weights import check_account, stored_weights
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    IMAGE_PAD,
    NO_CONTENT,
    RELEASED_GRID_SIZE,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    ContentTokens,
    branches_named,
    perception_tokens,
)

DEFAULT_ENCODERS = {"dino": "facebook/dinov2-large", "sam": "facebook/sam-vit-large"}
"""The encoders of the released models."""

_BASE_TOKENS = ["<|endoftext|>", TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD]
_BASE_TOKENS += ["<|video_pad|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_from_base(
    base: str | os.PathLike[str],
    branches: Iterable[str],
    *,
    encoders: Mapping[str, str | os.PathLike[str]] | None = None,
    grid_size: int = RELEASED_GRID_SIZE,
    content: ContentTokens = NO_CONTENT,
    codebook: Tensor | None = None,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """Make a VPT model of a Qwen2-VL one.

    Perception tokens are added to the tokenizer; new embedding rows are drawn around the mean
    of the old ones (:func:`draw_embeddings`); projectors start from their released initialisation.

    Args:
        base: folder or hub id of a Qwen2-VL model, e.g. ``Qwen/Qwen2-VL-2B-Instruct``.
        branches: command-line names: ``clip``, ``dino``, ``sam``.
        encoders: name -> folder, hub id or (for ``sam``) ``.pth`` file of segment-anything;
            by default the released choice.
        grid_size: cells per side of the region grid.
        content: what it shall write by itself.
        codebook: ``[K, D]``, vectors of the depth codes, by which their rows begin in order.
        dtype: of the weights; ``"auto"`` for the base model's.
        seed: of everything drawn.

    Raises:
        CheckpointError: if a branch is unknown, or a part cannot be loaded.
    """
    base, wanted = str(base), branches_named(branches)
    sources = DEFAULT_ENCODERS | {name: str(source) for name, source in (encoders or {}).items()}
    if stray := [name for name in encoders or {} if name not in DEFAULT_ENCODERS]:
        raise CheckpointError(f"{stray[0]!r} takes no encoder; those that do: dino, sam")
    _check_base(base)
    with as_checkpoint_error(f"cannot load the base model {base}"):
        check_generation_config(base)
        base_config = Qwen2VLConfig.from_pretrained(base)
        check_weights(base, partial(Qwen2VLForConditionalGeneration, base_config))
        llm, account = Qwen2VLForConditionalGeneration.from_pretrained(
            base, dtype=dtype, output_loading_info=True
        )
        processor = VPTProcessor.from_pretrained(base)
    check_account(base, account)
    encoder_branches = {
        name: _load_encoder(name, sources[name], llm.dtype) for name in wanted if name in sources
    }
    add_perception_tokens(processor.tokenizer, wanted, grid_size, content)
    _make_room(llm, processor.tokenizer, seed)
    config = vpt_config(llm.config, processor.tokenizer, wanted, grid_size, content)
    for name, branch in encoder_branches.items():
        config.branch_configs[name] = {
            "encoder": branch.encoder.config.to_dict(),
            "preprocess": branch.preprocess_config,
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VPTForConditionalGeneration(config).to(llm.dtype)
    missing, unexpected = model.load_state_dict(llm.state_dict(), strict=False)
    new = ("branches.", "projectors.")
    if unexpected or [key for key in missing if not key.startswith(new)]:
        raise CheckpointError(f"the base model {base} does not have the weights of a Qwen2-VL")
    for name, branch in encoder_branches.items():
        model.branches[name].encoder.load_state_dict(branch.encoder.state_dict())
    special, ordinary = perception_tokens(wanted, grid_size, content)
    _draw_new_embeddings(model, processor.tokenizer, [*special, *ordinary], seed, codebook)
    return model.eval(), processor


def add_content(
    source: str | os.PathLike[str],
    content: ContentTokens,
    *,
    codebook: Tensor | None = None,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """Give a VPT model the tokens of perception content that it lacks; all else stays as it is.

    Args:
        source: folder or hub id of a VPT model.
        content: what it shall write by itself, beside what it writes already.
        codebook: as for :func:`build_from_base`.
        dtype: of the weights; ``"auto"`` for the stored one.
        seed: of the new embedding rows, drawn as those of :func:`build_from_base`.

    Raises:
        CheckpointError: if it cannot be loaded, writes that already, or in other sizes.
    """
    source = str(source)
    if _model_type(source) == "qwen2_vl":
        raise CheckpointError(
            f"the base model {source} is a plain Qwen2-VL; name branches, or an empty list of "
            "them, to make a VPT model of it"
        )
    model = read_model(source, dtype=dtype)
    processor = VPTProcessor.from_pretrained(source)
    config = model.config
    old = config.content_tokens
    if known := [kind for kind in content.kinds if kind in old.kinds]:
        raise CheckpointError(f"{source} has the tokens of {', '.join(known)} already")
    sizes = {"depth": ("num_codes", "num_cells"), "boxes": ("num_pixels",)}
    kept = {name: getattr(old, name) for kind in old.kinds for name in sizes[kind]}
    whole = dataclasses.replace(content, kinds=(*old.kinds, *content.kinds), **kept)
    vocab = processor.tokenizer.get_vocab()
    new = [token for token in whole.tokens if token not in vocab]
    processor.tokenizer.add_tokens(new)
    _make_room(model, processor.tokenizer, seed)
    for name, value in _content_settings(whole).items():
        setattr(config, name, value)
    if new:
        _draw_new_embeddings(model, processor.tokenizer, new, seed, codebook)
    return model.eval(), processor


def _make_room(model: Any, tokenizer: Any, seed: int) -> None:
    """Rows for all tokens: Qwen2-VL has more than tokens; shrink never, grow only if need be."""
    if len(tokenizer) <= model.get_input_embeddings().num_embeddings:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # rows that stay without a token are drawn too
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)


def _content_settings(content: ContentTokens) -> dict[str, Any]:
    """Fields of the configuration that record perception content."""
    return {
        "perception_content": list(content.kinds),
        "depth_num_codes": content.num_codes,
        "depth_num_cells": content.num_cells,
        "box_num_pixels": content.num_pixels,
    }


def _check_base(base: str) -> None:
    """A VPT model, say, would load with most of its weights drawn anew: refuse it."""
    if (model_type := _model_type(base)) != "qwen2_vl":
        raise CheckpointError(f"the base model {base} is of type {model_type!r}, not 'qwen2_vl'")


def _model_type(base: str) -> Any:
    try:
        file = find_file(base, "config.json")
        if file is None:
            raise CheckpointError("it has no config.json, or the hub did not give it")
        settings = read_json(file)
        check_settings(settings)
        return settings.get("model_type")
    except CheckpointError as exc:
        raise CheckpointError(f"cannot load the base model {base}: {exc}") from exc


def _load_encoder(name: str, source: str, dtype: torch.dtype) -> Any:
    from transformers import Dinov2Config, Dinov2Model, SamConfig, SamModel

    from vpt.branches import DinoBranch, SamBranch

    with as_checkpoint_error(f"cannot load the {name} encoder {source}"):
        if name == "sam" and Path(source).suffix == ".pth":
            check_file(Path(source))
            return SamBranch.from_segment_anything(source)
        if file := find_file(source, "config.json"):
            check_settings(read_json(file))
        if name == "dino":
            check_weights(source, lambda: Dinov2Model(Dinov2Config.from_pretrained(source)))
            return DinoBranch.from_pretrained(source, dtype=dtype)
        check_weights(source, lambda: SamModel(SamConfig.from_pretrained(source)))
        return SamBranch.from_pretrained(source, dtype=dtype)


def add_perception_tokens(
    tokenizer: Any, branches: Iterable[str], grid_size: int, content: ContentTokens = NO_CONTENT
) -> int:
    """Add the tokens that are not there yet; returns how many that were."""
    special, ordinary = perception_tokens(branches, grid_size, content)
    known = tokenizer.get_vocab()
    added = tokenizer.add_tokens([t for t in special if t not in known], special_tokens=True)
    return added + tokenizer.add_tokens([t for t in ordinary if t not in known])


def vpt_config(
    base: Any,
    tokenizer: Any,
    branches: Iterable[str],
    grid_size: int = RELEASED_GRID_SIZE,
    content: ContentTokens = NO_CONTENT,
) -> VPTConfig:
    """Configuration of a VPT model on a base Qwen2-VL configuration.

    Args:
        base: a ``Qwen2VLConfig``.
        tokenizer: with the perception tokens in it.
        branches: keys of ``BRANCH_TOKENS``.
        grid_size: cells per side of the region grid.
        content: what the model writes by itself.
    """
    ids = tokenizer.get_vocab()
    rows = [BRANCH_TOKENS[branch] for branch in branches]
    settings: dict[str, Any] = _content_settings(content)
    for row in rows:
        settings[f"{row.released}_image_token_id"] = ids[row.pad]
        settings[f"{row.released}_action_id"] = ids[row.action]
        settings[f"{row.released}_action_start_id"] = ids[row.start]
    skipped = ("model_type", "architectures", "transformers_version", "auto_map", "dtype")
    inherited = {k: v for k, v in base.to_dict().items() if k not in skipped}
    return VPTConfig(
        **inherited,
        **settings,
        para_start_id=ids[TURN_START],
        para_end_id=ids[TURN_END],
        vision_encoder_ls=[row.encoder for row in rows],
        grid_size=grid_size,
    )


def _draw_new_embeddings(
    model: VPTForConditionalGeneration,
    tokenizer: Any,
    tokens: list[str],
    seed: int,
    codebook: Tensor | None,
) -> None:
    """Let tokens begin in both tables, which may be one, as :func:`draw_embeddings` says."""
    rows = tokenizer.convert_tokens_to_ids(tokens)
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.lm_head)}
    for number, weight in enumerate(tables.values()):
        drawn = draw_embeddings(weight.data[: min(rows)], tokens, seed + number, codebook)
        weight.data[rows] = drawn.to(weight)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that writes bytes: Qwen2's rules with no merges, and its control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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
    max_pixels: int = 28 * 28 * 256,
    tie_word_embeddings: bool = False,
    content: ContentTokens = NO_CONTENT,
    **text_settings: Any,
) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """A small model with random weights, the same for the same arguments.

    Args:
        branches: command-line names: ``clip``, ``dino``, ``sam``.
        seed: of the weights.
        hidden_size: LLM width, a multiple of 32.
        num_layers: of the LLM.
        max_pixels: of an image before the tower.
        tie_word_embeddings: whether the head is the embedding table.
        content: what it writes by itself.
        **text_settings: other fields of ``Qwen2VLTextConfig``.
    """
    from transformers import Qwen2VLConfig

    wanted = branches_named(branches)
    tokenizer = byte_tokenizer()
    add_perception_tokens(tokenizer, wanted, RELEASED_GRID_SIZE, content)
    ids = tokenizer.get_vocab()
    head_dim = hidden_size // 4
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
        **text_settings,
    }
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2}
    base = Qwen2VLConfig(
        text_config=text,
        vision_config={**vision, "hidden_size": hidden_size},
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=tie_word_embeddings,
    )
    config = vpt_config(base, tokenizer, wanted, content=content)
    for name, encoder in (("dino", TINY_DINO), ("sam", TINY_SAM)):
        config.branch_configs[name] = {"encoder": encoder, "preprocess": TINY_PREPROCESS[name]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VPTForConditionalGeneration(config).eval()
    _spread_weights(model, seed)
    image_processor = build_image_processor(
        {"size": {"shortest_edge": 56 * 56, "longest_edge": max_pixels}}
    )
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
