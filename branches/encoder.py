"""Branches with an image encoder of their own: settings, pixels, and the part they see."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from vpt.branches.base import BoxXYXY, BranchError

# Entries of a preprocessor_config.json that do not change the pixels of an image.
_WITHOUT_EFFECT = {
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "mask_pad_size",  # SAM: sizes of segmentation maps, which we never pass
    "mask_size",
}
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)
"""Options of transformers that locate the files of a model."""


class EncoderBranch(nn.Module):
    """A branch whose encoder takes ``pixel_values`` ``[B, 3, H, W]``.

    Args:
        encoder: a transformers model, with the ``patch_size`` in its ``config``.
        image_processor: returns ``pixel_values`` of RGB images.
        preprocess_config: all of its settings.
        feature_dim: ``C`` of the features.
    """

    released_preprocess: ClassVar[Mapping[str, Any]] = {}
    file_suffix: ClassVar[str | None] = None  # of a single file that `from_pretrained` reads too
    min_side = 28

    def __init__(
        self,
        encoder: nn.Module,
        image_processor: Any,
        preprocess_config: dict[str, Any],
        feature_dim: int,
    ) -> None:
        super().__init__()
        self.preprocess_config, self.feature_dim = preprocess_config, feature_dim
        self.encoder: Any = encoder
        self._image_processor = image_processor

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Resize, crop or pad, and normalise to ``pixel_values`` ``[B, 3, H, W]`` float32."""
        pixels = self._image_processor(check_images(images), return_tensors="pt")
        return {"pixel_values": pixels["pixel_values"].to(torch.float32)}

    def grid_hw(self, size_wh: tuple[int, int]) -> tuple[int, int]:
        """Grid of the features of an image of this size."""
        width, height = _pixels_wh(size_wh, self.preprocess_config)
        patch_size: int = self.encoder.config.patch_size
        return height // patch_size, width // patch_size

    @classmethod
    def seen_box_px(
        cls, size_wh: tuple[int, int], preprocess: Mapping[str, Any] | None = None
    ) -> BoxXYXY:
        """Part of an image that the features cover; see `Branch.seen_box_px`."""
        settings = {**cls.released_preprocess, **(preprocess or {})}
        width, height = _resized(size_wh, settings)
        left = top = 0
        pixels_wh = _pixels_wh(size_wh, settings)
        if settings.get("do_center_crop"):
            # Rounded down, as transformers' numpy center_crop does; negative where it pads.
            left, top = (width - pixels_wh[0]) // 2, (height - pixels_wh[1]) // 2
        scale_x, scale_y = size_wh[0] / width, size_wh[1] / height
        right, bottom = left + pixels_wh[0], top + pixels_wh[1]
        return (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)

    @staticmethod
    def stored_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the names under which model folders store them."""
        return dict(state_dict)

    @staticmethod
    def key_mapping() -> dict[str, str]:
        """Patterns of stored names -> names in the installed transformers."""
        return {}


def _pixels_wh(size_wh: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
    """Size of the pixels that are made of an image."""
    if settings.get("do_center_crop"):
        return _sides(settings["crop_size"])
    if settings.get("do_pad"):
        return _sides(settings["pad_size"])
    return _resized(size_wh, settings)


def _resized(size_wh: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
    """Size of an image after it is resized, rounded as transformers does."""
    width, height = size_wh
    size = settings.get("size")
    if not settings.get("do_resize", True) or not size:
        return size_wh
    if "shortest_edge" in size:
        short, edge = min(width, height), size["shortest_edge"]
        return max(edge * width // short, 1), max(edge * height // short, 1)
    if "longest_edge" in size:
        scale = size["longest_edge"] / max(width, height)
        return max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1)
    return _sides(size)


def _sides(size: Mapping[str, int] | int) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["width"], size["height"])


def complete_settings(
    given: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill up image processor settings; unknown ones are a `BranchError`.

    Args:
        given: settings that differ from the defaults; may be a whole ``preprocessor_config.json``.

    Returns:
        A JSON-able dict with exactly the keys of ``defaults``, sharing nothing with the arguments.
    """
    chosen = {key: value for key, value in (given or {}).items() if key not in _WITHOUT_EFFECT}
    if unknown := sorted(set(chosen) - set(defaults)):
        raise BranchError(
            f"unknown preprocess settings {', '.join(unknown)}; available: "
            f"{', '.join(sorted(defaults))}"
        )
    check_values(chosen)
    return copy.deepcopy({**defaults, **chosen})


def check_values(settings: Mapping[str, Any]) -> None:
    """Refuse settings with which no image can be processed; unknown or null ones are ignored."""
    for name, value in settings.items():
        if value is None:
            continue
        for known, (expected, fits) in _VALUES.items():
            if re.fullmatch(known, name) and not fits(value):
                raise BranchError(f"{name}: expected {expected}, got {str(value)[:80]}")


def _is_number(value: Any, least: float = -(2**20), largest: float = 2**20) -> bool:
    return type(value) in (int, float) and least <= value <= largest


def _is_whole(value: Any, largest: int) -> bool:
    return type(value) is int and 1 <= value <= largest


def _is_size(value: Any) -> bool:
    """Sides up to 2**13; Qwen2-VL's two edges count pixels of the whole image."""
    if not isinstance(value, Mapping) or not value:
        return False
    sides = [side for side in value.values() if side is not None]
    if set(value) == {"shortest_edge", "longest_edge"}:
        least, most = value["shortest_edge"], value["longest_edge"]
        return _is_whole(least, 2**24) and _is_whole(most, 2**40) and least <= most
    return bool(sides) and all(_is_whole(side, 2**13) for side in sides)


def _is_color(value: Any, least: float = -(2**20)) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(_is_number(one, least) for one in value)
    )


_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    r"do_\w+": ("true or false", lambda value: isinstance(value, bool)),
    r"patch_size|merge_size|temporal_patch_size": (
        "a whole number from 1 to 256",
        lambda value: _is_whole(value, 2**8),
    ),
    r"size|crop_size|pad_size": ("sides of 1 to 8192 pixels, the least first", _is_size),
    r"image_mean": ("three numbers", _is_color),
    r"image_std": ("three numbers above 0", lambda value: _is_color(value, 1e-6)),
    r"rescale_factor": ("a number above 0", lambda value: _is_number(value, 1e-9)),
    r"resample": (
        "a whole number from 0 to 5",
        lambda value: type(value) is int and 0 <= value < 6,
    ),
}


def read_settings(
    path_or_id: str | Path, known: Mapping[str, Any], hub_kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Read ``preprocessor_config.json`` of a model folder or hub id; ``None`` if it has none.

    Args:
        known: the supported settings.
        hub_kwargs: arguments of ``from_pretrained``; those that select the file are used.
    """
    from transformers.utils import cached_file

    file = cached_file(
        str(path_or_id),
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        **{key: value for key, value in hub_kwargs.items() if key in HUB_ARGUMENTS},
    )
    if file is None:
        return None
    entries = json.loads(Path(file).read_text(encoding="utf-8"))
    filled = {  # transformers 5 writes null for what is not set
        key: value
        for key, value in entries.items()
        if value is not None and key not in _WITHOUT_EFFECT
    }
    if unknown := sorted(set(filled) - set(known)):
        raise BranchError(f"{file} has settings that are not supported: {', '.join(unknown)}")
    return filled


def check_images(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Check that there are images and all are RGB."""
    if not images:
        raise BranchError("a branch needs at least one image; got none")
    for image in images:
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            came = getattr(image, "mode", type(image).__name__)
            raise BranchError(f"expected RGB PIL images; got {came}; use image.convert('RGB')")
    return list(images)
