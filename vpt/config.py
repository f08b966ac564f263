"""Configuration of a VPT model: a Qwen2-VL configuration plus its perception tokens and branches.

Field names are those of the released checkpoints, so that their ``config.json`` loads as it is.
What those do not store, the encoders' own settings, stands in ``branch_configs``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, Qwen2VLConfig

from vpt.errors import CheckpointError
from vpt.model_files import find_file, read_json
from vpt.shim import KeepsOwnShim, auto_map, write_shim
from vpt.tokens import (
    BRANCH_TOKENS,
    ENCODER_TO_BRANCH,
    RELEASED_DEPTH_CELLS,
    RELEASED_DEPTH_CODES,
    RELEASED_GRID_SIZE,
    RELEASED_PIXELS,
    ContentTokens,
)

SIDE_FILES = {
    "dino": ("dinov2_config.json", "dinov2_preprocessor_config.json"),
    "sam": ("sam_vision_config.json", "sam_preprocessor_config.json"),
}
"""Files that may lie beside a released checkpoint and describe its encoders."""


class VPTConfig(KeepsOwnShim, Qwen2VLConfig):
    """Settings of :class:`vpt.modeling.VPTForConditionalGeneration`.

    Attributes:
        vision_encoder_ls: branches by their released names, out of ``clip``, ``dino``, ``sam``.
        branch_configs: branch -> ``{"encoder": ..., "preprocess": ...}``; the encoder part is a
            DINOv2 or SAM vision configuration as a dict. Branches not named here have the
            released encoders (DINOv2-large, SAM ViT-L).
        grid_size: cells per side of the region grid.
        perception_content: what the model writes by itself, out of ``depth``, ``boxes``; the ids
            of the tokens are found in the tokenizer.
        depth_num_codes: of the codebook of its depth maps.
        depth_num_cells: codes of a depth map.
        box_num_pixels: side of the image in which its boxes lie.
        depth_tokenizer: folder or file of the depth tokenizer, relative to the model's folder.
        image_resolution: longer side, in pixels, to which images are shrunk before the tower and
            DINOv2, as LLaMA-Factory did for the released models; ``None`` for no such limit.
            Crops are cut from the image as given, and shrunk after.
        seg_image_resolution: the same for SAM.
        num_inner_forward_run: 2 steers the projectors by control states, 1 does not.
        alignment: project without condition, whatever ``num_inner_forward_run`` says.
        freeze_stems: train of a projector only what steers it, and leave what alignment, or
            pretraining, made of its stem.
        para_mask_id: which paragraphs are hidden from the final pass in training: 0 none,
            1 the question, 2 the question and the re-encoded image, drawn independently.
        para_mask_ratio: probability of each such draw, per sample.
        projector_scale: control states per condition.
        para_start_id, para_end_id: ids of the tokens that open and close a turn.
    """

    model_type = "qwen2_vl_vpt"

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

    def __post_init__(self, **kwargs: Any) -> None:
        names = self.vision_encoder_ls or []
        self.vision_encoder_ls = names.split(",") if isinstance(names, str) else list(names)
        self.branch_configs = dict(self.branch_configs or {})
        kinds = self.perception_content or []
        self.perception_content = kinds.split(",") if isinstance(kinds, str) else list(kinds)
        super().__post_init__(**kwargs)
        text = self.text_config
        if isinstance(text.eos_token_id, int) and text.eos_token_id >= text.vocab_size:
            # The class default of a field that small or old configurations leave out.
            text.bos_token_id, text.eos_token_id = None, self.para_end_id
        self._check()

    def _check(self) -> None:
        _ = self.content_tokens  # checks itself
        if unknown := [n for n in self.vision_encoder_ls if n not in ENCODER_TO_BRANCH]:
            raise CheckpointError(
                f"unknown branch {unknown[0]!r} in vision_encoder_ls; "
                f"available: {', '.join(ENCODER_TO_BRANCH)}"
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
        for name in ("image_resolution", "seg_image_resolution"):
            if (side := getattr(self, name)) is not None and side < 1:
                raise CheckpointError(f"{name} must be at least 1, or null, not {side!r}")
        if not 0 <= self.para_mask_ratio <= 1:
            raise CheckpointError(f"para_mask_ratio must be in 0..1, not {self.para_mask_ratio!r}")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save ``config.json``, and the shim by which transformers finds this class."""
        self.auto_map = auto_map(type(self))
        super().save_pretrained(save_directory, **kwargs)
        write_shim(save_directory)

    @property
    def branches(self) -> tuple[str, ...]:
        """Re-encoding branches of this model, keys of ``BRANCH_TOKENS``, in table order."""
        return tuple(b for b, row in BRANCH_TOKENS.items() if row.encoder in self.vision_encoder_ls)

    @property
    def content_tokens(self) -> ContentTokens:
        """Perception content of this model.

        Raises:
            CheckpointError: if a kind is unknown or a size impossible.
        """
        sizes = (self.depth_num_codes, self.depth_num_cells, self.box_num_pixels)
        return ContentTokens(tuple(self.perception_content), *sizes)

    def max_side(self, branch: str) -> int | None:
        """Longer side to which images are shrunk before a branch."""
        return self.seg_image_resolution if branch == "sam" else self.image_resolution

    def pad_id(self, branch: str) -> int:
        """Id of the placeholder of a branch's features."""
        return self._token_id(branch, "image_token_id")

    def action_id(self, branch: str) -> int:
        """Id of a branch's control token."""
        return self._token_id(branch, "action_id")

    def start_id(self, branch: str) -> int:
        """Id of the token that opens a call of a branch."""
        return self._token_id(branch, "action_start_id")

    def _token_id(self, branch: str, field: str) -> int:
        name = f"{BRANCH_TOKENS[branch].released}_{field}"
        if (token_id := getattr(self, name)) is None:
            raise CheckpointError(
                f"config has the branch {BRANCH_TOKENS[branch].encoder!r} but no {name}; "
                "set it to the id of the token in the tokenizer"
            )
        return token_id


class VRTConfig(VPTConfig):
    """The same under the model type of the oldest released checkpoints."""

    model_type = "vrt_qwen2_vl"


def register_configs() -> None:
    """Tell transformers' ``AutoConfig`` of both model types; harmless when done twice."""
    for config in (VPTConfig, VRTConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def load_config(path_or_id: str | os.PathLike[str], **hub_kwargs: Any) -> VPTConfig:
    """Read the configuration of a model folder or hub id, side files included.

    Args:
        path_or_id: folder, or id of a repository.
        **hub_kwargs: ``revision``, ``cache_dir``, ``token``, ... as for ``from_pretrained``.

    Raises:
        CheckpointError: if there is no such model, or it is of another type.
    """
    path_or_id = str(path_or_id)
    file = find_file(path_or_id, "config.json", **hub_kwargs)
    if file is None and Path(path_or_id).is_dir():
        raise CheckpointError(f"{path_or_id} holds no config.json, so it is no model folder")
    if file is None:
        raise CheckpointError(
            f"there is no model {path_or_id!r}: it is not a folder here, and the hub did not give "
            "its config.json; check the spelling, or the network"
        )
    raw = read_json(file)
    classes = {cls.model_type: cls for cls in (VPTConfig, VRTConfig)}
    if (model_type := raw.get("model_type")) not in classes:
        raise CheckpointError(
            f"{path_or_id} holds a model of type {model_type!r}; expected "
            f"{' or '.join(classes)}. `vpt init --base {path_or_id}` makes a VPT model of a "
            "Qwen2-VL one"
        )
    config = classes[model_type].from_dict(raw)
    add_side_files(config, path_or_id, **hub_kwargs)
    return config


def add_side_files(
    config: VPTConfig, path_or_id: str | os.PathLike[str], **hub_kwargs: Any
) -> None:
    """Complete ``branch_configs`` by what the files beside a released checkpoint say."""
    for branch, names in SIDE_FILES.items():
        if branch not in config.branches:
            continue
        settings = config.branch_configs.setdefault(branch, {})
        for part, name in zip(("encoder", "preprocess"), names, strict=True):
            if part not in settings and (found := find_file(path_or_id, name, **hub_kwargs)):
                settings[part] = read_json(found)
