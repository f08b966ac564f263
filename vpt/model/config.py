"""Configurations of VPT models: those of their backbones, plus perception tokens and branches.

Field names are those of the released checkpoints, so that their ``config.json`` loads as it is.
What those do not store, the encoders' own settings, stands in ``branch_configs``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from vpt.errors import CheckpointError
from vpt.files import replace_atomically
from vpt.model.folder import check_type, read_json
from vpt.model.hub import (
    ShimSavingMixin,
    as_checkpoint_error,
    auto_map,
    find_file,
    refuse_adapter,
    write_shim,
)
from vpt.model.intended import IntendedInputs
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    IMAGE_PAD,
    RELEASED_DEPTH_CELLS,
    RELEASED_DEPTH_CODES,
    RELEASED_GRID_SIZE,
    RELEASED_PIXELS,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    ContentTokens,
    branches_named,
    encoder_names,
    find_branch,
    region_tokens,
)

_SIZES = {
    2**5: "spatial_merge_size temporal_patch_size",
    2**6: "in_channels num_channels",
    2**8: "grid_size",
    2**10: "depth num_attention_heads num_heads num_hidden_layers num_key_value_heads patch_size "
    "projector_scale",
    2**12: "head_dim",
    2**14: "image_size",
    2**16: "box_num_pixels depth_num_cells depth_num_codes embed_dim hidden_size image_resolution "
    "num_pos_feats output_channels seg_image_resolution",
    2**20: "intermediate_size mlp_dim",
    2**24: "vocab_size",
    2**30: "max_position_embeddings",
}
"""Largest value -> sizes in ``config.json`` and the encoder configs, whole numbers from 1."""

_LARGEST = {name: largest for largest, names in _SIZES.items() for name in names.split()}

_FRACTIONS = (
    "attention_dropout attention_probs_dropout_prob drop_path_rate hidden_dropout_prob "
    "layer_norm_eps para_mask_ratio rms_norm_eps"
)

_RANGES = dict.fromkeys(_FRACTIONS.split(), (0, 1)) | {
    "mlp_ratio": (0.01, 2**8),
    "rope_theta": (1, 1e15),
}
"""Other numbers, fractions among them: least and largest of each."""

_MULTIPLES = (
    ("hidden_size", "num_attention_heads", 1),
    ("num_attention_heads", "num_key_value_heads", 1),
    ("embed_dim", "num_heads", 4),  # rotary positions: two halves, each of pairs
)
"""A size that must be a multiple of another size times a factor."""

_TOKEN_FIELDS = {
    "image_token_id": IMAGE_PAD,
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "para_start_id": TURN_START,
    "para_end_id": TURN_END,
}
"""Fields that hold the id of a token, beside those of the branches."""


@dataclass(kw_only=True, repr=False)
class VPTSettings(ShimSavingMixin):
    """What the configuration of a VPT model adds to that of its backbone.

    Attributes:
        vision_encoder_ls: branches by their released names, out of ``clip``, ``dino``, ``sam``.
        branch_configs: branch -> ``{"encoder": ..., "preprocess": ...}``; the encoder part is a
            DINOv2 or SAM vision configuration as a dict. Branches not named here have the
            released encoders (DINOv2-large, SAM ViT-L). The own tower has a ``size`` to preprocess
            at most; without it, it looks again at the size of the first look.
        grid_size: cells per side of the region grid.
        perception_content: what the model writes by itself, out of ``depth``, ``boxes``.
        depth_num_codes: size of the codebook of its depth maps.
        depth_num_cells: codes of a depth map.
        box_num_pixels: side of the image in which its boxes are given.
        depth_tokenizer: folder or file of the depth tokenizer, relative to the model's folder.
        image_resolution: longer side, in pixels, to which images are shrunk before the tower and
            DINOv2, as LLaMA-Factory did for the released models; ``None`` for no such limit.
            Crops are cut from the image as given.
        seg_image_resolution: the same for SAM.
        num_inner_forward_run: 2 conditions the projectors on control states, 1 does not.
        alignment: project without condition, whatever ``num_inner_forward_run`` says.
        freeze_stems: train only the conditioning of a projector; its stem keeps what alignment
            or pretraining made of it.
        para_mask_id: which paragraphs are hidden from the final pass in training: 0 none,
            1 the question, 2 the question and the re-encoded image, drawn independently.
        para_mask_ratio: probability of each such draw, per sample.
        projector_scale: control states per condition.
        intended_inputs: images that the model is meant for and how they are recognised, see
            :class:`vpt.model.intended.IntendedInputs`; ``None`` for images of any kind. Training
            sets it to ``None``.
        para_start_id, para_end_id: ids of the tokens that open and close a turn.

    The ids of a branch's tokens have the names that its row in ``BRANCH_TOKENS`` gives them, such
    as ``clip_image_token_id``, ``clip_action_id`` and ``clip_action_start_id``.
    """

    if TYPE_CHECKING:  # what the backbone's configuration brings

        def __getattr__(self, name: str) -> Any: ...

    # Of the released branches; what hashes a model reads these. Other rows bring their own.
    clip_image_token_id: int | None = None
    clip_action_id: int | None = None
    clip_action_start_id: int | None = None
    detection_image_token_id: int | None = None
    detection_action_id: int | None = None
    detection_action_start_id: int | None = None
    seg_image_token_id: int | None = None
    seg_action_id: int | None = None
    seg_action_start_id: int | None = None
    para_start_id: int | None = None
    para_end_id: int | None = None
    para_mask_id: int = 0
    para_mask_ratio: float = 1.0
    num_inner_forward_run: int = 2
    projector_scale: int = 1
    alignment: bool = False
    freeze_stems: bool = False
    grid_size: int = RELEASED_GRID_SIZE
    perception_content: Any = None  # list of kinds; a comma-separated string is read too
    depth_num_codes: int = RELEASED_DEPTH_CODES
    depth_num_cells: int = RELEASED_DEPTH_CELLS
    box_num_pixels: int = RELEASED_PIXELS
    depth_tokenizer: str = "depth_tokenizer"
    image_resolution: int | None = 512
    seg_image_resolution: int | None = 1024
    vision_encoder_ls: Any = None  # list of names; a comma-separated string is read too
    branch_configs: Any = None  # dict
    intended_inputs: Any = None  # dict

    def __post_init__(self, **kwargs: Any) -> None:
        names = self.vision_encoder_ls or []
        self.vision_encoder_ls = names.split(",") if isinstance(names, str) else list(names)
        self.branch_configs = dict(self.branch_configs or {})
        kinds = self.perception_content or []
        self.perception_content = kinds.split(",") if isinstance(kinds, str) else list(kinds)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        text = self.text_config
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int) and end >= text.vocab_size:
            # The class default of a field that small or old configurations leave out.
            text.bos_token_id, text.eos_token_id = None, self.para_end_id
        check_settings(self.to_dict())
        _check_rotary(self.text_config)
        _ = self.content_tokens  # checks itself
        if self.intended_inputs is not None:
            IntendedInputs.read(self.intended_inputs)
        for name in ("alignment", "freeze_stems"):
            if not isinstance(getattr(self, name), bool):
                raise CheckpointError(f"{name} must be true or false, not {getattr(self, name)!r}")
        parts = Path(self.depth_tokenizer).parts
        if not parts or Path(self.depth_tokenizer).is_absolute() or ".." in parts:
            raise CheckpointError(
                f"depth_tokenizer must be a name in the model folder, not {self.depth_tokenizer!r}"
            )
        if unknown := [n for n in self.vision_encoder_ls if find_branch(n) is None]:
            raise CheckpointError(
                f"unknown branch {unknown[0]!r} in vision_encoder_ls; "
                f"available: {', '.join(encoder_names())}"
            )
        if self.num_inner_forward_run not in (1, 2):
            raise CheckpointError(
                f"num_inner_forward_run must be 1 or 2, not {self.num_inner_forward_run!r}"
            )
        if self.para_mask_id not in (0, 1, 2):
            raise CheckpointError(f"para_mask_id must be 0, 1 or 2, not {self.para_mask_id!r}")
        if self.para_mask_id and None in (self.para_start_id, self.para_end_id):
            raise CheckpointError(
                "para_mask_id needs para_start_id and para_end_id: the ids of <|im_start|> and "
                "<|im_end|>"
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save ``config.json``, and the shim by which transformers finds this class."""
        self.auto_map = auto_map(type(self))
        with replace_atomically(Path(save_directory)) as draft:
            super().save_pretrained(draft, **kwargs)  # type: ignore[misc]
            write_shim(draft)

    @property
    def is_conditioned(self) -> bool:
        """Whether control states replace embeddings and condition the projectors."""
        return self.num_inner_forward_run == 2 and not self.alignment

    @property
    def branches(self) -> tuple[str, ...]:
        """Re-encoding branches of this model, keys of ``BRANCH_TOKENS``, in table order."""
        return branches_named(self.vision_encoder_ls)

    @property
    def content_tokens(self) -> ContentTokens:
        """Perception content of this model; ``CheckpointError`` if it is impossible."""
        sizes = (self.depth_num_codes, self.depth_num_cells, self.box_num_pixels)
        return ContentTokens(tuple(self.perception_content), *sizes)

    def max_side(self, branch: str) -> int | None:
        """Longer side to which images are shrunk before a branch."""
        field = BRANCH_TOKENS[branch].resolution if branch in BRANCH_TOKENS else "image_resolution"
        limit: int | None = getattr(self, field)
        return limit

    def pad_id(self, branch: str) -> int:
        """Id of the placeholder of a branch's features."""
        return self.token_id(branch, f"{BRANCH_TOKENS[branch].released}_image_token_id")

    def action_id(self, branch: str) -> int:
        """Id of a branch's control token."""
        return self.token_id(branch, f"{BRANCH_TOKENS[branch].released}_action_id")

    def start_id(self, branch: str) -> int:
        """Id of the token that opens a call of a branch."""
        return self.token_id(branch, f"{BRANCH_TOKENS[branch].released}_action_start_id")

    def token_id(self, branch: str, field: str) -> int:
        """Id in one of a branch's ``id_fields``; ``CheckpointError`` if it is not set."""
        token_id: int | None = getattr(self, field, None)
        if token_id is None:
            raise CheckpointError(
                f"config has the branch {BRANCH_TOKENS[branch].encoder!r} but no {field}; "
                "set it to the id of the token in the tokenizer"
            )
        return token_id


class VPTConfig(VPTSettings, Qwen2VLConfig):
    """Settings of :class:`vpt.model.modeling.VPTForConditionalGeneration`, on Qwen2-VL."""

    model_type = "qwen2_vl_vpt"


class VRTConfig(VPTConfig):
    """The same under the model type of the oldest released checkpoints."""

    model_type = "vrt_qwen2_vl"


class VPTQwen25Config(VPTSettings, Qwen2_5_VLConfig):
    """Settings of :class:`vpt.model.modeling.VPTQwen25ForConditionalGeneration`."""

    model_type = "qwen2_5_vl_vpt"


class VPTQwen3Config(VPTSettings, Qwen3VLConfig):
    """Settings of :class:`vpt.model.modeling.VPTQwen3ForConditionalGeneration`."""

    model_type = "qwen3_vl_vpt"


CONFIGS: dict[str, Any] = {
    one.model_type: one for one in (VPTConfig, VRTConfig, VPTQwen25Config, VPTQwen3Config)
}
"""Configuration class by ``model_type``, of VPT models."""

BASE_CONFIGS: dict[str, Any] = {
    one.model_type: one for one in (Qwen2VLConfig, Qwen2_5_VLConfig, Qwen3VLConfig)
}
"""The same of their backbones."""


def register_configs() -> None:
    """Register the model types with transformers' ``AutoConfig``; harmless when repeated."""
    for model_type, config in CONFIGS.items():
        AutoConfig.register(model_type, config, exist_ok=True)


def load_config(path_or_id: str | os.PathLike[str], **hub_kwargs: Any) -> VPTSettings:
    """Read the configuration of a model folder or hub id, side files included.

    Raises:
        CheckpointError: if there is no such model, it is of another type, or a setting is
            impossible.
    """
    path_or_id = str(path_or_id)
    if (file := find_file(path_or_id, "config.json", **hub_kwargs)) is None:
        refuse_adapter(path_or_id, **hub_kwargs)
        if Path(path_or_id).is_dir():
            raise CheckpointError(f"{path_or_id} holds no config.json, so it is no model folder")
        raise CheckpointError(
            f"there is no model {path_or_id!r}: it is not a folder here, and the hub did not give "
            "its config.json; check the spelling, or the network"
        )
    raw = read_json(file)
    check_type(raw.get("model_type"), path_or_id)
    with as_checkpoint_error(f"cannot use {file}"):
        check_settings(raw)
        config = CONFIGS[raw["model_type"]].from_dict(raw)
        if not _mrope_section(config.text_config):
            raise CheckpointError("expected mrope_section in rope_parameters, or rope_scaling")
    add_side_files(config, path_or_id, **hub_kwargs)
    return config


def add_side_files(
    config: VPTSettings, path_or_id: str | os.PathLike[str], **hub_kwargs: Any
) -> None:
    """Complete ``branch_configs`` by what the files beside a released checkpoint say."""
    for branch in config.branches:
        if (names := BRANCH_TOKENS[branch].side_files) is None:
            continue
        settings = config.branch_configs.setdefault(branch, {})
        for part, name in zip(("encoder", "preprocess"), names, strict=True):
            if part not in settings and (found := find_file(path_or_id, name, **hub_kwargs)):
                settings[part] = read_json(found)
                check_numbers(settings[part], f"{name}: ")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse a ``config.json`` (of a VPT model, a base model or an encoder) before it is used."""
    if method := settings.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, Mapping) else method
        raise CheckpointError(
            f"the model is quantised (quantization_config: {method}), which is not supported; use "
            "the model that it was made from, in bfloat16 to save memory"
        )
    if file := settings.get("transformers_weights"):
        raise CheckpointError(
            f"transformers_weights names {str(file)[:80]!r}; expected model.safetensors, or remove "
            "the setting"
        )
    check_numbers(settings)


def check_numbers(settings: Mapping[str, Any], where: str = "") -> None:
    """Refuse numbers that no model can have, nested ones too; ``where`` is a prefix of names."""
    for name, value in settings.items():
        wanted = None
        if isinstance(value, Mapping):
            check_numbers(value, f"{where}{name}.")
        elif value is not None and name in _LARGEST:
            if type(value) is not int or not 1 <= value <= _LARGEST[name]:
                wanted = f"whole number from 1 to {_LARGEST[name]}"
        elif value is not None and name in _RANGES:
            least, largest = _RANGES[name]
            if type(value) not in (int, float) or not least <= value <= largest:
                wanted = f"number from {least} to {largest:g}"
        if wanted:
            raise CheckpointError(f"{where}{name} must be a {wanted}, not {repr(value)[:40]}")
    for large, small, factor in _MULTIPLES:
        width, part = settings.get(large), settings.get(small)
        if width and part and width % (part * factor):
            times = f"{factor} times " if factor > 1 else ""
            raise CheckpointError(
                f"{where}{large} {width} must be a multiple of {times}{small} {part}"
            )


def _check_rotary(text: Any) -> None:
    """Refuse a language model whose heads and rotary positions do not fit each other."""
    half = head_dim(text) // 2
    if not (sections := _mrope_section(text)):
        return  # a configuration made without arguments; load_config wants them
    whole = all(type(size) is int and size >= 0 for size in sections)
    if not whole or sum(sections) != half:
        raise CheckpointError(
            f"mrope_section must be whole numbers that add up to {half}, half the width of a "
            f"head, not {sections}"
        )


def head_dim(text: Any) -> int:
    """Width of an attention head of a language model."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _mrope_section(text: Any) -> list[int]:
    return (text.rope_parameters or {}).get("mrope_section") or []


def check_generation_config(path_or_id: str, **hub_kwargs: Any) -> GenerationConfig | None:
    """Read ``generation_config.json``, which transformers passes over where it is broken."""
    if (file := find_file(path_or_id, "generation_config.json", **hub_kwargs)) is None:
        return None
    content = read_json(file)
    with as_checkpoint_error(f"cannot use {file}"):
        return GenerationConfig.from_dict(content)


def check_tokenizer(
    tokenizer: Any, config: Any, name: str, end_ids: int | Iterable[int] | None = None
) -> None:
    """Refuse a tokenizer whose ids are not those of a VPT or Qwen2-VL model.

    Args:
        end_ids: ``eos_token_id`` of the generation configuration.
    """
    ids: dict[str, int] = tokenizer.get_vocab()
    wanted = {
        token: (field, getattr(config, field, None)) for field, token in _TOKEN_FIELDS.items()
    }
    needed: list[str] = []
    if isinstance(config, VPTSettings):
        needed = [*region_tokens(config.grid_size), *config.content_tokens.tokens]
        for branch in config.branches:
            row = BRANCH_TOKENS[branch]
            for field, token in row.id_fields.items():
                wanted[token] = (field, config.token_id(branch, field))
            needed.append(row.end)
    cure = (
        f"the tokenizer is not that of the model {name}; copy tokenizer.json and "
        "tokenizer_config.json from where the model was saved"
    )
    if missing := [token for token in needed if token not in ids]:
        raise CheckpointError(f"the tokenizer lacks {missing[0]}: {cure}")
    for token, (field, value) in wanted.items():
        if value is not None and ids.get(token) != value:
            found = f"has it at {ids[token]}" if token in ids else "does not have it"
            raise CheckpointError(
                f"config.json has {token} as {field} {value!r}, but the tokenizer {found}: {cure}"
            )
    num_rows = config.text_config.vocab_size
    if ids and max(ids.values()) >= num_rows:
        raise CheckpointError(
            f"the tokenizer has ids up to {max(ids.values())}, but vocab_size is {num_rows}: {cure}"
        )
    ends = {ids.get(TURN_END), ids.get("<|endoftext|>")}
    for end in [end_ids] if isinstance(end_ids, int) else end_ids or ():
        if end not in ends:
            raise CheckpointError(
                f"generation_config.json has eos_token_id {end!r}, but the tokenizer has "
                f"{TURN_END} at {ids.get(TURN_END)}: {cure}"
            )
