"""Checks of a model's folder that need no torch: a mistake shows before torch is imported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vpt.errors import CheckpointError

BACKBONES = {
    "qwen2_vl": ("qwen2_vl_vpt", "vrt_qwen2_vl"),
    "qwen2_5_vl": ("qwen2_5_vl_vpt",),
    "qwen3_vl": ("qwen3_vl_vpt",),
}
"""``model_type`` of a base -> those of VPT models on it: ours first, then older ones."""

MODEL_TYPES = tuple(one for types in BACKBONES.values() for one in types)
"""``model_type`` of VPT models in config.json."""

_LFS_POINTER = b"version https://git-lfs"


def check_path(path_or_id: str) -> None:
    """Refuse a path without a folder; anything that may be the id of a model on the hub passes."""
    folder = Path(path_or_id)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; expected the folder of a model")
    if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path_or_id):
        raise CheckpointError(
            f"there is no model folder {path_or_id}; pass a folder that holds config.json, "
            "or the id of a model on the Hugging Face hub"
        )


def model_type(path_or_id: str) -> Any:
    """Return ``model_type`` of a model folder; ``None`` for the id of a model and for an adapter.

    Raises:
        CheckpointError: if there is no such folder, or it holds no readable config.json.
    """
    check_path(path_or_id)
    folder = Path(path_or_id)
    if not folder.is_dir():
        return None
    if (file := folder / "config.json").exists():
        return read_json(file).get("model_type", "")
    if (folder / "adapter_config.json").exists():
        return None
    raise CheckpointError(f"{path_or_id} holds no config.json, so it is no model folder")


def check_type(model_type: Any, path_or_id: str) -> None:
    """Refuse a ``model_type`` that is not in :data:`MODEL_TYPES`."""
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"{path_or_id} holds a model of type {model_type!r}; expected "
            f"{' or '.join(MODEL_TYPES)}. `vpt init --base {path_or_id}` makes a VPT model of a "
            "Qwen2-VL, Qwen2.5-VL or Qwen3-VL one"
        )


def check_model(path_or_id: str) -> None:
    """Refuse a folder that holds no VPT model; the id of a model on the hub passes."""
    if (found := model_type(path_or_id)) is not None:
        check_type(found, path_or_id)


def check_base(found: Any, base: str, *, is_extended: bool) -> None:
    """Refuse the ``model_type`` of a base that cannot be extended, or not made into a VPT model."""
    if is_extended and found in BACKBONES:
        raise CheckpointError(
            f"the base model {base} is a plain {found}; name branches, or an empty list of "
            "them, to make a VPT model of it"
        )
    if not is_extended and found not in BACKBONES:  # most weights would be drawn again
        types = " or ".join(map(repr, BACKBONES))
        raise CheckpointError(f"the base model {base} is of type {found!r}, not {types}")


def check_depth_tokenizer(source: Path) -> None:
    """Refuse a path at which there is neither a folder nor a file of torch weights."""
    if source.is_file() and source.suffix not in (endings := (".pt", ".pth", ".bin")):
        names = ", ".join(endings)
        raise CheckpointError(f"{source} is neither a folder nor a file that ends in {names}")
    if not source.exists():
        raise CheckpointError(f"there is no depth tokenizer {source}; pass a folder or a .pth file")


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object."""
    check_file(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"cannot read {file}: {exc}") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a JSON object in {file}, found {type(content).__name__}")
    return content


def check_file(file: Path) -> None:
    """Refuse what is not the file that it is named for."""
    try:
        with file.open("rb") as stream:
            head = stream.read(len(_LFS_POINTER))
    except OSError as exc:
        raise CheckpointError(f"cannot read {file}: {exc.strerror or exc}") from exc
    if not head:
        raise CheckpointError(f"{file} is empty; get the file again")
    if head == _LFS_POINTER:
        raise CheckpointError(
            f"{file} is a git LFS pointer, not the file itself; run `git lfs pull` in its folder, "
            "or download it again"
        )
