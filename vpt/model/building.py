"""Build a fresh VPT model: from a base Qwen2-VL and encoders, or a tiny random one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt.branches.base import branch_class
from vpt.errors import CheckpointError
from vpt.model.config import (
    BASE_CONFIGS,
    CONFIGS,
    check_generation_config,
    check_settings,
)
from vpt.model.folder import BACKBONES, check_base, check_file, read_json
from vpt.model.hub import as_checkpoint_error, check_account, check_weights, find_file
from vpt.model.modeling import BASE_MODELS, MODELS, VPTForConditionalGeneration, read_model
from vpt.model.processing import VPTProcessor
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    GROUND_TOKENS,
    NO_CONTENT,
    RELEASED_GRID_SIZE,
    TURN_END,
    TURN_START,
    ContentTokens,
    branches_named,
    content_value,
    perception_tokens,
)

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
    grounding: bool = False,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """Make a VPT model of a Qwen2-VL or Qwen2.5-VL one.

    Perception tokens are added to the tokenizer; new embedding rows are drawn around the mean
    of the old ones (:func:`draw_embeddings`); projectors start from their released initialisation.

    Args:
        base: folder or hub id of such a model, e.g. ``Qwen/Qwen2-VL-2B-Instruct``.
        branches: names of branches, see :func:`vpt.protocol.tokens.find_branch`.
        encoders: branch -> folder, hub id or (for ``sam``) ``.pth`` file of segment-anything;
            by default the ``source`` in the branch's row.
        codebook: ``[K, D]``, vectors of the depth codes, which order the rows of their tokens.
        grounding: whether it can call for phrases, which a detector finds.
        dtype: of the weights; ``"auto"`` for the base model's.

    Raises:
        CheckpointError: if a branch is unknown, or a part cannot be loaded.
    """
    base, wanted = str(base), branches_named(branches)
    defaults = {name: row.source for name, row in BRANCH_TOKENS.items() if row.source is not None}
    sources = defaults | {name: str(source) for name, source in (encoders or {}).items()}
    if stray := [name for name in encoders or {} if name not in defaults]:
        raise CheckpointError(
            f"{stray[0]!r} takes no encoder; those that do: {', '.join(defaults)}"
        )
    found = _model_type(base)
    check_base(found, base, is_extended=False)
    with as_checkpoint_error(f"cannot load the base model {base}"):
        check_generation_config(base)
        family = BASE_MODELS[found]
        check_weights(base, partial(family, BASE_CONFIGS[found].from_pretrained(base)))
        llm, account = family.from_pretrained(base, dtype=dtype, output_loading_info=True)
        processor = VPTProcessor.from_pretrained(base)
    check_account(base, account)
    encoder_branches = {
        name: _load_encoder(name, sources[name], llm.dtype) for name in wanted if name in sources
    }
    add_perception_tokens(processor.tokenizer, wanted, grid_size, content, grounding)
    _make_room(llm, processor.tokenizer, seed)
    config = vpt_config(llm.config, processor.tokenizer, wanted, grid_size, content)
    for name, branch in encoder_branches.items():
        config.branch_configs[name] = {
            "encoder": branch.encoder.config.to_dict(),
            "preprocess": branch.preprocess_config,
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[config.model_type](config).to(llm.dtype)
    missing, unexpected = model.load_state_dict(llm.state_dict(), strict=False)
    if unexpected or not all(key.startswith(("branches.", "projectors.")) for key in missing):
        raise CheckpointError(f"the base model {base} does not have the weights of a {found}")
    for name, branch in encoder_branches.items():
        model.branches[name].encoder.load_state_dict(branch.encoder.state_dict())
    special, ordinary = perception_tokens(wanted, grid_size, content, grounding)
    _draw_new_embeddings(model, processor.tokenizer, [*special, *ordinary], seed, codebook)
    return model.eval(), processor


def add_tokens(
    source: str | os.PathLike[str],
    content: ContentTokens = NO_CONTENT,
    *,
    codebook: Tensor | None = None,
    grounding: bool = False,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """Give a VPT model tokens of content or phrases that it lacks; all else stays as it is.

    Args:
        source: folder or hub id of a VPT model.
        codebook: as for :func:`build_from_base`, as well as ``grounding``.

    Raises:
        CheckpointError: if it cannot be loaded, has these tokens already, or in other sizes.
    """
    source = str(source)
    check_base(_model_type(source), source, is_extended=True)
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
    phrase = GROUND_TOKENS if grounding else ()
    if grounding and all(token in vocab for token in phrase):
        raise CheckpointError(f"{source} has the tokens of grounding already")
    new = [token for token in [*whole.tokens, *phrase] if token not in vocab]
    processor.tokenizer.add_tokens(new)
    _make_room(model, processor.tokenizer, seed)
    for name, value in _content_settings(whole).items():
        setattr(config, name, value)
    if new:
        _draw_new_embeddings(model, processor.tokenizer, new, seed, codebook)
    return model.eval(), processor


def _make_room(model: Any, tokenizer: Any, seed: int) -> None:
    """Add rows if there are more tokens than rows; Qwen2-VL has spare ones, which are kept."""
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


def _load_encoder(branch: str, source: str, dtype: torch.dtype) -> Any:
    home: Any = branch_class(BRANCH_TOKENS[branch].home)
    with as_checkpoint_error(f"cannot load the {branch} encoder {source}"):
        if Path(source).suffix == home.file_suffix:
            check_file(Path(source))
        else:
            if file := find_file(source, "config.json"):
                check_settings(read_json(file))
            check_weights(source, lambda: home.empty_checkpoint(source))
        return home.from_pretrained(source, dtype=dtype)


def add_perception_tokens(
    tokenizer: Any,
    branches: Iterable[str],
    grid_size: int,
    content: ContentTokens = NO_CONTENT,
    grounding: bool = False,
) -> int:
    """Add the tokens that are not there yet; returns how many that were."""
    special, ordinary = perception_tokens(branches, grid_size, content, grounding)
    known = tokenizer.get_vocab()
    added = tokenizer.add_tokens([t for t in special if t not in known], special_tokens=True)
    return added + tokenizer.add_tokens([t for t in ordinary if t not in known])


def vpt_config(
    base: Any,
    tokenizer: Any,
    branches: Iterable[str],
    grid_size: int = RELEASED_GRID_SIZE,
    content: ContentTokens = NO_CONTENT,
) -> Any:
    """Configuration of a VPT model on that of a backbone; its tokens are in the tokenizer."""
    ids = tokenizer.get_vocab()
    rows = [BRANCH_TOKENS[branch] for branch in branches]
    skipped = ("model_type", "architectures", "transformers_version", "auto_map", "dtype")
    return CONFIGS[BACKBONES[base.model_type][0]](
        **{name: value for name, value in base.to_dict().items() if name not in skipped},
        **_content_settings(content),
        **{field: ids[token] for row in rows for field, token in row.id_fields.items()},
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
    """Draw the rows of tokens in both tables, which may be one: see :func:`draw_embeddings`."""
    rows = tokenizer.convert_tokens_to_ids(tokens)
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.lm_head)}
    for number, weight in enumerate(tables.values()):
        drawn = draw_embeddings(weight.data[: min(rows)], tokens, seed + number, codebook)
        weight.data[rows] = drawn.to(weight)


def draw_embeddings(
    old: Tensor, tokens: Sequence[str], seed: int, codebook: Tensor | None = None
) -> Tensor:
    """Draw rows around the mean of the old ones, as spread as these are.

    Rows are independent, except where an order is known: near coordinates of boxes get similar
    rows, and so do depth codes with similar vectors. What is learned for one then holds for its
    neighbours (docs/decisions/008-ordered-tokens-begin-in-order.md).

    Args:
        old: ``[N, H]``.
        codebook: ``[K, D]``, vectors of the depth codes; without it these are independent.

    Returns:
        ``[len(tokens), H]`` float32.
    """
    generator = torch.Generator().manual_seed(seed)
    width = old.shape[1]
    drawn = torch.randn(len(tokens), width, generator=generator)
    rows, pixels = _numbered(tokens, "boxes")
    if rows:
        drawn[rows] = _mix(_waves(max(pixels) + 1)[pixels], width, generator)
    rows, codes = _numbered(tokens, "depth")
    if rows and codebook is not None:
        if max(codes) >= len(codebook):
            raise CheckpointError(
                f"the codebook has {len(codebook)} vectors; there are {max(codes) + 1} codes"
            )
        drawn[rows] = _mix(codebook[codes].float().cpu(), width, generator)
    old = old.float()
    return drawn * old.std() + old.mean(0)


def _numbered(tokens: Sequence[str], kind: str) -> tuple[list[int], list[int]]:
    """Indices of the tokens of a kind of content, and what each of them names."""
    values = {row: content_value(token, kind) for row, token in enumerate(tokens)}
    named = {row: value for row, value in values.items() if value is not None}
    return [*named], [*named.values()]


def _waves(num: int) -> Tensor:
    """``[num, F]``: sines and cosines of a place, from half a wave over all down to ten places."""
    num_waves = max(1, 1 + math.floor(2 * math.log2(max(num / 5, 1))))
    frequencies = 0.5 * 2 ** (torch.arange(num_waves) / 2)
    angles = 2 * math.pi * frequencies * torch.arange(num)[:, None] / num
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _mix(vectors: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """``[N, D]`` vectors mixed at random into ``[N, width]`` of mean 0 and variance 1."""
    mixed = vectors @ torch.randn(vectors.shape[1], width, generator=generator)
    mixed = mixed - mixed.mean(0)
    return mixed / mixed.std().clamp(min=1e-6)
