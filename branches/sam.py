"""The SAM branch: the feature map of Segment Anything's image encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam.configuration_sam import SamConfig, SamVisionConfig
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.sam.modeling_sam import SamModel, SamVisionEncoder

from vpt.branches.base import Backbone, BranchError, Features, check_complete
from vpt.branches.encoder import EncoderBranch, complete_settings, read_settings

# SAM ViT-L, the encoder inside released checkpoints, which do not store its config.
# https://huggingface.co/facebook/sam-vit-large/blob/main/config.json ("vision_config")
RELEASED_CONFIG: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "mlp_dim": 4096,
    "global_attn_indexes": [5, 11, 17, 23],
    "window_size": 14,
    "output_channels": 256,
    "image_size": 1024,
    "patch_size": 16,
}

# https://huggingface.co/facebook/sam-vit-large/blob/main/preprocessor_config.json
RELEASED_PREPROCESS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"longest_edge": 1024},
    "resample": 2,  # PIL: bilinear
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_pad": True,  # right and bottom, with zeros, after normalisation
    "pad_size": {"height": 1024, "width": 1024},
}

# segment-anything name -> transformers name, applied in this order.
# https://github.com/huggingface/transformers/blob/main/src/transformers/models/sam/convert_sam_to_hf.py
_NAMES = {
    "patch_embed.proj.": "patch_embed.projection.",
    "blocks.": "layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    "neck.0.": "neck.conv1.",
    "neck.1.": "neck.layer_norm1.",
    "neck.2.": "neck.conv2.",
    "neck.3.": "neck.layer_norm2.",
}
_PREFIX = "image_encoder."


class SamBranch(EncoderBranch):
    """The image encoder of SAM (arXiv 2304.02643), without prompts and masks.

    Args:
        config: of the encoder. It takes images of ``config.image_size`` only.
        preprocess: settings that differ from `RELEASED_PREPROCESS`, whose sizes follow
            ``config.image_size``.

    Raises:
        BranchError: if ``preprocess`` has an unknown key, or sizes other than the encoder's.
    """

    name = "sam"
    released_preprocess = RELEASED_PREPROCESS
    file_suffix = ".pth"

    def __init__(
        self, config: SamVisionConfig, preprocess: Mapping[str, Any] | None = None
    ) -> None:
        defaults = {**RELEASED_PREPROCESS, **_sizes(config.image_size)}
        settings = complete_settings(preprocess, defaults)
        expected = _sizes(config.image_size)
        if (came := {key: settings[key] for key in expected}) != expected:
            raise BranchError(
                f"an encoder of image_size {config.image_size} needs {expected}; got {came}; leave "
                "these settings out, or build the encoder at that image_size"
            )
        image_processor = SamImageProcessorPil(**settings)
        super().__init__(
            SamVisionEncoder(config), image_processor, settings, config.output_channels
        )

    @classmethod
    def build(cls, settings: Mapping[str, Any], backbone: Backbone) -> SamBranch:
        """Build the branch of a model with fresh weights."""
        config = SamVisionConfig(**(settings.get("encoder") or RELEASED_CONFIG))
        return cls(config, settings.get("preprocess"))

    @staticmethod
    def empty_checkpoint(path_or_id: str) -> nn.Module:
        """The model that a checkpoint holds, by its configuration alone."""
        return SamModel(SamConfig.from_pretrained(path_or_id))

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        image_size: int | None = None,
        preprocess: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> SamBranch:
        """Load the image encoder of a SAM checkpoint in evaluation mode.

        Args:
            path_or_id: folder or hub id of a ``SamModel``, e.g. ``facebook/sam-vit-large``; or a
                ``.pth`` file, for which see `from_segment_anything`.
            image_size: pixels per side; other than the checkpoint's, positions are resized.
            preprocess: settings; by default those of the checkpoint's
                ``preprocessor_config.json`` (sizes: of the encoder), or `RELEASED_PREPROCESS`.
            **kwargs: for ``SamModel.from_pretrained`` (``revision``, ``dtype``, ...).

        Raises:
            BranchError: if weights are missing, or settings in the file are not supported.
        """
        if Path(path_or_id).suffix == cls.file_suffix:
            return cls.from_segment_anything(path_or_id, image_size or 1024)
        model, account = SamModel.from_pretrained(path_or_id, output_loading_info=True, **kwargs)
        own = [key for key in account["missing_keys"] if key.startswith("vision_encoder.")]
        check_complete(path_or_id, own)
        config = model.vision_encoder.config
        if preprocess is None:
            found = read_settings(path_or_id, RELEASED_PREPROCESS, kwargs) or {}
            preprocess = {**found, **_sizes(image_size or config.image_size)}
        weights = model.vision_encoder.state_dict()
        return cls._from_state_dict(weights, config, image_size, preprocess)

    @classmethod
    def from_segment_anything(
        cls, weights: str | Path | Mapping[str, Tensor], image_size: int = 1024
    ) -> SamBranch:
        """Build from weights of the segment-anything package, which need not be installed.

        Args:
            weights: a ``.pth`` file (read as tensors only, no code) or its state dict, of a whole
                model (``image_encoder.*``) or of its ``ImageEncoderViT``, of any size.
            image_size: pixels per side; other than that of the weights, positions are resized.

        Returns:
            The branch in evaluation mode. It does not copy the tensors.

        Raises:
            BranchError: if the weights are not those of such an encoder.
        """
        loaded: Any = weights
        if isinstance(weights, str | Path):
            loaded = torch.load(weights, map_location="cpu", weights_only=True)
        state_dict = rename_segment_anything(loaded)
        config = SamVisionConfig(**config_from_shapes(state_dict))
        return cls._from_state_dict(state_dict, config, image_size, None)

    @classmethod
    def _from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        config: SamVisionConfig,
        image_size: int | None,
        preprocess: Mapping[str, Any] | None,
    ) -> SamBranch:
        if image_size is not None and image_size != config.image_size:
            state_dict = resize_sam_state_dict(state_dict, image_size=image_size, config=config)
            config.image_size = image_size
        with torch.device("meta"):  # no second set of weights beside the given one
            branch = cls(config, preprocess)
        branch.encoder.load_state_dict(state_dict, assign=True)
        return branch.eval()

    def encode(self, pixel_values: Tensor) -> list[Features]:
        """Encode images of the encoder's own size.

        Args:
            pixel_values: ``[B, 3, image_size, image_size]`` normalised.

        Returns:
            B features of ``[h * w, output_channels]``, h = w = image_size // patch_size, cells that
            cover padding only included, as in the released checkpoints.

        Raises:
            BranchError: if the pixels are of another size.
        """
        size = self.encoder.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[-2:]) != (size, size):
            raise BranchError(
                f"expected pixel_values [B, 3, {size}, {size}]; got {list(pixel_values.shape)}; "
                "use preprocess(), or build the encoder at that image_size"
            )
        pixel_values = pixel_values.to(self.encoder.device, self.encoder.dtype)
        feature_maps = self.encoder(pixel_values).last_hidden_state  # [B, C, h, w]
        height, width = feature_maps.shape[-2:]
        values = feature_maps.flatten(2).transpose(1, 2)  # [B, h * w, C]
        return [Features(one, (height, width)) for one in values]


def _sizes(image_size: int) -> dict[str, Any]:
    return {
        "size": {"longest_edge": image_size},
        "pad_size": {"height": image_size, "width": image_size},
    }


def rename_segment_anything(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image encoder's weights, out of a ``Sam`` or alone, by their names in transformers."""
    prefix = _PREFIX if any(key.startswith(_PREFIX) for key in state_dict) else ""
    if f"{prefix}patch_embed.proj.weight" not in state_dict:
        raise BranchError(
            "expected weights of segment-anything's image encoder (patch_embed.proj.weight, ...); "
            f"got {', '.join(list(state_dict)[:3]) or 'none'}, ..."
        )
    renamed = {}
    for key, value in state_dict.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            for old, new in _NAMES.items():
                name = name.replace(old, new)
            renamed[name] = value
    return renamed


def config_from_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``SamVisionConfig``, read off an encoder's weights.

    A layer whose relative positions span the whole grid is global. If windows are as large as the
    grid all layers are, with the same features.
    """
    if "pos_embed" not in state_dict or "layers.0.attn.rel_pos_h" not in state_dict:
        raise BranchError(
            "expected an encoder with absolute and relative positions (use_abs_pos, use_rel_pos); "
            "without them its size cannot be read off the weights"
        )
    hidden_size, num_channels, patch_size, _ = state_dict["patch_embed.projection.weight"].shape
    grid_size = state_dict["pos_embed"].shape[1]
    num_layers = sum(key.endswith(".attn.rel_pos_h") for key in state_dict)
    spans = [len(state_dict[f"layers.{i}.attn.rel_pos_h"]) for i in range(num_layers)]
    head_dim = state_dict["layers.0.attn.rel_pos_h"].shape[1]
    windows = {(span + 1) // 2 for span in spans if span != 2 * grid_size - 1}
    if len(windows) > 1:
        raise BranchError(f"expected one window size in all layers; got {sorted(windows)}")
    return {
        "hidden_size": hidden_size,
        "num_channels": num_channels,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // head_dim,
        "mlp_dim": len(state_dict["layers.0.mlp.lin1.weight"]),
        "qkv_bias": "layers.0.attn.qkv.bias" in state_dict,
        "global_attn_indexes": [i for i, span in enumerate(spans) if span == 2 * grid_size - 1],
        "window_size": windows.pop() if windows else grid_size,
        "output_channels": len(state_dict["neck.conv1.weight"]),
        "image_size": grid_size * patch_size,
        "patch_size": patch_size,
    }


def resize_sam_state_dict(
    state_dict: Mapping[str, Tensor], *, image_size: int, config: SamVisionConfig
) -> dict[str, Tensor]:
    """Fit an encoder's weights to another ``image_size``, a multiple of the patch size.

    Absolute positions (bilinear) and the relative positions of the global layers (linear) are
    resized, the latter as in segment-anything's ``get_rel_pos``. Returns a new dict.
    """
    if image_size < config.patch_size or image_size % config.patch_size:
        raise BranchError(
            f"image_size must be a multiple of the patch size {config.patch_size}; got {image_size}"
        )
    grid_size = image_size // config.patch_size
    resized = dict(state_dict)
    if (positions := resized.get("pos_embed")) is not None:
        maps = positions.permute(0, 3, 1, 2)  # [1, C, h, w]
        maps = _interpolate(maps, (grid_size, grid_size), "bilinear")
        resized["pos_embed"] = maps.permute(0, 2, 3, 1)
    for layer in config.global_attn_indexes:
        for axis in ("rel_pos_h", "rel_pos_w"):
            key = f"layers.{layer}.attn.{axis}"
            if key in resized:
                rows = _interpolate(resized[key].T[None], (2 * grid_size - 1,), "linear")
                resized[key] = rows[0].T  # [2 * grid - 1, head_dim]
    return resized


def _interpolate(values: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    """Interpolate in float32: half precision shifts the positions."""
    return F.interpolate(values.float(), size=size, mode=mode, align_corners=False).to(values.dtype)
