"""Where numbers come from: which weights, code, libraries and machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vpt.depth.tokenizer import DepthTokenizer
    from vpt.modeling import VPTForConditionalGeneration
    from vpt.runtime import Runtime

_LIBRARIES = ("torch", "transformers", "numpy", "pillow", "tokenizers")
# What a configuration says of where a model was saved, by which release, and as what.
_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "auto_map", "architectures", "dtype"}
_HASHED_VALUES = 4096  # per tensor, spread evenly over it


def hash_model(model: VPTForConditionalGeneration) -> str:
    """A short hash over the configuration and, of each weight, name, shape and sampled values.

    Reading all of a large model would take minutes; two trainings differ in every weight.

    Args:
        model: on any device, in any precision; the precision is part of the hash.
    """
    config = _without(model.config.to_dict(), _NOT_THE_MODEL)
    return _hash(config, model.state_dict())


def hash_depth_tokenizer(tokenizer: DepthTokenizer) -> str:
    """Likewise, of the depth tokenizer: what a model's codes mean."""
    return _hash(dataclasses.asdict(tokenizer.config), tokenizer.network.state_dict())


def _hash(config: dict[str, Any], weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        values = tensor.detach().flatten()
        stride = max(len(values) // _HASHED_VALUES, 1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _without(config: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {
        key: _without(value, keys) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in keys
    }


def describe_model(runtime: Runtime) -> dict[str, Any]:
    """Name, hash, size and precision of a model, and the hash of its depth tokenizer if any."""
    model = runtime.model
    described = {
        "name": runtime.name,
        "hash": hash_model(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    if runtime.depth_tokenizer is not None:
        described["depth_tokenizer"] = hash_depth_tokenizer(runtime.depth_tokenizer)
    return described


def describe_surroundings(runtime: Runtime) -> dict[str, Any]:
    """Code, libraries and machine of a run."""
    return {
        "device": str(runtime.device),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in ("vpt-runtime", *_LIBRARIES)},
    }


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
    """Commit of a checkout, with a ``+`` if files differ from it; ``None`` if there is none."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
