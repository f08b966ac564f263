"""The settings of an image processor: checked against a full set, or read from a model folder."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vpt.branches.base import BranchError

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
"""Options that say where the files of a model are, as transformers calls them."""


def complete_settings(
    given: Mapping[str, Any] | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill up image processor settings.

    Args:
        given: settings that differ from the defaults; a whole ``preprocessor_config.json`` will do.
        defaults: every setting there is.

    Returns:
        A JSON-able dict with exactly the keys of ``defaults``, sharing nothing with the arguments.

    Raises:
        BranchError: if ``given`` has a key that is not in ``defaults``.
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
    """Refuse settings of an image processor that no image can be brought to.

    Args:
        settings: any; those that are not known here, or null, are let pass.

    Raises:
        BranchError: naming the setting, what was expected and what came.
    """
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
    """Sides up to 2**13; under the names of Qwen2-VL's edges are pixels in all."""
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
    """Read ``preprocessor_config.json`` of a model folder or hub id.

    Args:
        path_or_id: folder, or id of a repository.
        known: the settings we honour, as for `complete_settings`.
        hub_kwargs: arguments of ``from_pretrained``; those that say which file are used.

    Returns:
        The settings in the file, or None if the folder has no such file. transformers 5 writes
        entries that are empty (null); these, too, are left out.

    Raises:
        BranchError: if the file has a filled entry that is neither known nor without effect.
        OSError: if the hub cannot be reached, as ``from_pretrained`` of transformers.
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
    filled = {key: value for key, value in entries.items() if value is not None}
    filled = {key: value for key, value in filled.items() if key not in _WITHOUT_EFFECT}
    if unknown := sorted(set(filled) - set(known)):
        raise BranchError(f"{file} has settings that are not supported: {', '.join(unknown)}")
    return filled


def check_images(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Check what a branch is asked to preprocess.

    Raises:
        BranchError: if there is no image, or one that is not an RGB `PIL.Image.Image`.
    """
    if not images:
        raise BranchError("a branch needs at least one image; got none")
    for image in images:
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            came = getattr(image, "mode", type(image).__name__)
            raise BranchError(f"expected RGB PIL images; got {came}; use image.convert('RGB')")
    return list(images)
