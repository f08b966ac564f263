"""Read released and our own checkpoints, with an exact account of their weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import cached_file

from branches import BranchError
from vpt.config import VPTConfig, VRTConfig
from vpt.errors import CheckpointError, is_out_of_memory
from vpt.modeling import VPTForConditionalGeneration

logger = logging.getLogger(__name__)

SIDE_FILES = {
    "dino": ("dinov2_config.json", "dinov2_preprocessor_config.json"),
    "sam": ("sam_vision_config.json", "sam_preprocessor_config.json"),
}
"""Files that may lie beside a released checkpoint and describe its encoders."""


UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    SafetensorError,
    UnpicklingError,
    BranchError,
)
"""What transformers, torch and safetensors raise for broken files and settings that do not fit."""


def load_config(path_or_id: str, **hub_kwargs: Any) -> VPTConfig:
    """Read the configuration of a model folder or hub id, side files included.

    Args:
        path_or_id: folder, or id of a repository.
        **hub_kwargs: ``revision``, ``cache_dir``, ``token``, ... as for ``from_pretrained``.

    Raises:
        CheckpointError: if there is no such model, or it is of another type.
    """
    file = _find_file(path_or_id, "config.json", **hub_kwargs)
    if file is None:
        raise CheckpointError(f"{path_or_id} holds no config.json, so it is no model folder")
    raw = _read_json(file)
    classes = {cls.model_type: cls for cls in (VPTConfig, VRTConfig)}
    if (model_type := raw.get("model_type")) not in classes:
        raise CheckpointError(
            f"{path_or_id} holds a model of type {model_type!r}; expected "
            f"{' or '.join(classes)}. `vpt init --base {path_or_id}` makes a VPT model of a "
            "Qwen2-VL one"
        )
    config = classes[model_type].from_dict(raw)
    for branch, names in SIDE_FILES.items():
        if branch not in config.branches:
            continue
        settings = config.branch_configs.setdefault(branch, {})
        for part, name in zip(("encoder", "preprocess"), names, strict=True):
            if part not in settings and (found := _find_file(path_or_id, name, **hub_kwargs)):
                settings[part] = _read_json(found)
    return config


def load_model(
    path_or_id: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    **hub_kwargs: Any,
) -> VPTForConditionalGeneration:
    """Load a VPT model for inference.

    Args:
        path_or_id: folder or hub id, in the released format or our own.
        device: where to; by default a CUDA device if there is one.
        dtype: of the weights; ``"auto"`` is the stored one on a GPU and float32 on a CPU.
        **hub_kwargs: as for ``from_pretrained``.

    Raises:
        CheckpointError: if the folder or a weight is missing, or a weight is unknown.
    """
    config = load_config(path_or_id, **hub_kwargs)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    try:
        model, account = VPTForConditionalGeneration.from_pretrained(
            path_or_id, config=config, dtype=dtype, output_loading_info=True, **hub_kwargs
        )
    except UNREADABLE as exc:
        if is_out_of_memory(exc):
            raise
        raise CheckpointError(f"cannot make a model of {path_or_id}: {exc}") from exc
    check_account(path_or_id, account)
    return model.to(device).eval()


def check_account(path_or_id: str, account: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not exactly those of the model.

    Args:
        path_or_id: for the message.
        account: ``loading_info`` of ``from_pretrained``.

    Raises:
        CheckpointError: naming what is missing, unknown or of another shape.
    """
    problems = {
        "missing": sorted(account["missing_keys"]),
        "unknown": sorted(account["unexpected_keys"]),
        "of another shape": sorted(str(key) for key in account["mismatched_keys"]),
    }
    if said := [f"{len(v)} {k} ({', '.join(v[:3])}, ...)" for k, v in problems.items() if v]:
        raise CheckpointError(
            f"the weights in {path_or_id} do not fit its config.json: {'; '.join(said)}. "
            "Check vision_encoder_ls and the encoder configs beside the weights"
        )


def _find_file(path_or_id: str, name: str, **hub_kwargs: Any) -> Path | None:
    folder = Path(path_or_id)
    if not folder.is_dir() and (folder.is_absolute() or path_or_id.startswith((".", "~"))):
        raise CheckpointError(
            f"there is no model folder {path_or_id}; pass a folder that holds config.json, "
            "or the id of a model on the Hugging Face hub"
        )
    try:
        file = cached_file(
            path_or_id, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs
        )
    except OSError as exc:
        raise CheckpointError(
            f"cannot find {name} of the model {path_or_id!r}: not a folder here, and the hub "
            f"did not give it ({str(exc).splitlines()[0]})"
        ) from exc
    return None if file is None else Path(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"cannot read {file}: {exc}") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a JSON object in {file}, found {type(content).__name__}")
    return content
