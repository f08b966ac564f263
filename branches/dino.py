"""The DINOv2 branch: patch features of a self-supervised image encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.dinov2 import modeling_dinov2
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

from vpt.branches.base import Backbone, BranchError, Features, check_complete
from vpt.branches.encoder import EncoderBranch, complete_settings, read_settings

# DINOv2-large, the encoder inside released checkpoints, which do not store its config.
# https://huggingface.co/facebook/dinov2-large/blob/main/config.json
RELEASED_CONFIG: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layerscale_value": 1.0,
    "qkv_bias": True,
}

# https://huggingface.co/facebook/dinov2-large/blob/main/preprocessor_config.json
RELEASED_PREPROCESS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,  # PIL: bicubic
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

# Parameters that newer transformers name otherwise: 5.20 and later, "Dinov2Model" in its
# conversion_mapping.py. Stored weights have the older names, as the released files do.
_NEWER_NAMES = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.down_proj.": ".mlp.weights_out.",
}
_HAS_NEWER_NAMES = not hasattr(modeling_dinov2, "Dinov2SelfAttention")
_GATE, _UP, _BOTH = ".mlp.gate_proj.", ".mlp.up_proj.", ".mlp.weights_in."  # of DINOv2-giant


class DinoBranch(EncoderBranch):
    """DINOv2 (arXiv 2304.07193): one feature per patch, without the CLS token.

    `load_state_dict` takes the parameter names of every transformers release.

    Args:
        config: of the encoder; any input size is interpolated from ``config.image_size``.
        preprocess: settings that differ from `RELEASED_PREPROCESS`; others are a `BranchError`.
    """

    name = "dino"
    released_preprocess = RELEASED_PREPROCESS

    def __init__(self, config: Dinov2Config, preprocess: Mapping[str, Any] | None = None) -> None:
        settings = complete_settings(preprocess, RELEASED_PREPROCESS)
        image_processor = BitImageProcessorPil(**settings)
        super().__init__(Dinov2Model(config), image_processor, settings, config.hidden_size)
        self.register_load_state_dict_pre_hook(_take_any_names)

    @classmethod
    def build(cls, settings: Mapping[str, Any], backbone: Backbone) -> DinoBranch:
        """Build the branch of a model with fresh weights."""
        config = Dinov2Config(**(settings.get("encoder") or RELEASED_CONFIG))
        return cls(config, settings.get("preprocess"))

    @staticmethod
    def empty_checkpoint(path_or_id: str) -> nn.Module:
        """The model that a checkpoint holds, by its configuration alone."""
        return Dinov2Model(Dinov2Config.from_pretrained(path_or_id))

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, *, preprocess: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> DinoBranch:
        """Load a plain DINOv2 checkpoint in evaluation mode.

        Args:
            path_or_id: folder or hub id, e.g. ``facebook/dinov2-large``.
            preprocess: settings; by default those of the checkpoint's
                ``preprocessor_config.json``, or `RELEASED_PREPROCESS` if it has none.
            **kwargs: for ``Dinov2Model.from_pretrained`` (``revision``, ``dtype``, ...).

        Raises:
            BranchError: if weights are missing, or settings in the file are not supported.
        """
        if preprocess is None:
            preprocess = read_settings(path_or_id, RELEASED_PREPROCESS, kwargs)
        encoder, account = Dinov2Model.from_pretrained(
            path_or_id, output_loading_info=True, **kwargs
        )
        check_complete(path_or_id, account["missing_keys"])
        with torch.device("meta"):  # no second set of weights beside the loaded one
            branch = cls(encoder.config, preprocess)
        branch.encoder = encoder
        return branch.eval()

    def encode(self, pixel_values: Tensor) -> list[Features]:
        """Encode images of one size.

        Args:
            pixel_values: ``[B, 3, H, W]`` normalised; a rest smaller than a patch at right
                and bottom is not seen.

        Returns:
            B features of ``[H // patch * W // patch, hidden_size]``.

        Raises:
            BranchError: if ``pixel_values`` is not such a batch, or smaller than one patch.
        """
        patch_size = self.encoder.config.patch_size
        if pixel_values.ndim != 4 or min(pixel_values.shape[-2:]) < patch_size:
            raise BranchError(
                f"expected pixel_values [B, 3, H, W] with H and W >= {patch_size}; "
                f"got {list(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[-2:]
        pixel_values = pixel_values.to(self.encoder.device, self.encoder.dtype)
        hidden_states = self.encoder(pixel_values).last_hidden_state  # [B, 1 + h * w, C]
        grid_hw = (height // patch_size, width // patch_size)
        return [Features(values, grid_hw) for values in hidden_states[:, 1:]]

    @staticmethod
    def stored_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights as folders store them, from the names of any transformers release."""
        stored = {}
        for key, value in state_dict.items():
            up = state_dict.get(key.replace(_GATE, _UP)) if _GATE in key else None
            if up is not None:
                stored[key.replace(_GATE, _BOTH)] = torch.cat([value, up])
            elif _UP not in key or key.replace(_UP, _GATE) not in state_dict:
                stored[_renamed(key, _NEWER_NAMES)] = value
        return stored

    @staticmethod
    def key_mapping() -> dict[str, str]:
        """Newer names -> stored ones, for a transformers that does not convert them."""
        if _HAS_NEWER_NAMES:
            return {}
        return {re.escape(newer): stored for newer, stored in _NEWER_NAMES.items()}


def _take_any_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Rename the entries under ``prefix`` for the installed transformers, in place."""
    own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    stored = DinoBranch.stored_weights(own)
    state_dict.update(_newer_weights(stored) if _HAS_NEWER_NAMES else stored)


def _newer_weights(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    newer = {}
    for key, value in stored.items():
        if _BOTH in key:
            for part, half in zip((_GATE, _UP), value.chunk(2), strict=True):
                newer[key.replace(_BOTH, part)] = half
        else:
            newer[_renamed(key, {old: new for new, old in _NEWER_NAMES.items()})] = value
    return newer


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key
