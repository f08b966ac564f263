"""Weights of SAM's image encoder: names of the original package, sizes, and another input size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from vpt.branches.base import BranchError

if TYPE_CHECKING:
    from transformers.models.sam.configuration_sam import SamVisionConfig

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


def rename_segment_anything(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the image encoder's weights the names they have in transformers.

    Args:
        state_dict: of segment-anything's ``Sam`` (other parts are left out) or ``ImageEncoderViT``.

    Returns:
        The same tensors under the names of transformers' ``SamVisionEncoder``.

    Raises:
        BranchError: if there is no image encoder among the weights.
    """
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
    """Read the numbers of an encoder off its weights.

    A layer whose relative positions span the whole grid is a global one. If windows are as large
    as the grid all layers are, which gives the same features.

    Args:
        state_dict: in transformers' names.

    Returns:
        Arguments of ``SamVisionConfig``.

    Raises:
        BranchError: if absolute or relative positions are missing: without them neither the image
            size nor the number of heads can be known.
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
    """Fit an encoder's weights to another input size.

    Only what depends on the grid changes: absolute positions (bilinear) and the relative positions
    of the global layers (linear), as segment-anything's ``get_rel_pos`` does for the latter.

    Args:
        state_dict: in transformers' names, without prefix.
        image_size: pixels per side wanted, a multiple of ``config.patch_size``.
        config: of the given weights.

    Returns:
        A new dict, in the given dtypes.

    Raises:
        BranchError: if ``image_size`` is not such a multiple.
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
