"""Provenance of numbers: weights, code, libraries and machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.view.wording import public_text

if TYPE_CHECKING:
    from torch import Tensor

    from vpt.model.modeling import VPTForConditionalGeneration
    from vpt.runtime import Runtime

# Settings of transformers that decide what a model computes. Its releases add others, which would
# give the same model another hash.
_TEXT = (
    *("hidden_act", "hidden_size", "intermediate_size", "layer_types", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "sliding_window", "vocab_size"),
)
_ROPE = ("rope_type", "rope_theta", "mrope_section", "factor")
_VISION = (
    *("depth", "embed_dim", "hidden_act", "hidden_size", "in_channels", "mlp_ratio", "num_heads"),
    *("patch_size", "spatial_merge_size", "temporal_patch_size"),
)
_LIBRARIES = ("torch", "transformers", "numpy", "pillow", "tokenizers")
# Keys by which an encoder's stored configuration names the release that wrote it.
_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "architectures", "dtype"}
_NOT_THE_MODEL |= {"intended_inputs"}  # changes no answer
_SECRET_FLAG = re.compile(r"-.*(key|token$|secret|password)", re.IGNORECASE)
_REMOVED = "REMOVED"
_HASHED_VALUES = 4096  # per tensor, spread evenly over it


def hash_model(model: VPTForConditionalGeneration) -> str:
    """A short hash over the configuration and, of each weight, name, shape, type and sample.

    It does not depend on the release of transformers. Values are sampled because reading all of a
    large model takes minutes, and two trainings differ in every weight.
    """
    from vpt.model.config import VPTSettings
    from vpt.model.hub import stored_weights

    config = model.config
    text, vision = config.text_config, config.vision_config
    own = {name: getattr(config, name) for name in VPTSettings.__annotations__}
    settings = {
        **_without(own, _NOT_THE_MODEL),
        "tie_word_embeddings": config.tie_word_embeddings,
        "text": {name: getattr(text, name, None) for name in _TEXT},
        "rope": {name: text.rope_parameters.get(name) for name in _ROPE},
        "vision": {name: getattr(vision, name, None) for name in _VISION},
    }
    return _hash(settings, stored_weights(model.state_dict()))


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
    if (tokenizer := runtime.depth_tokenizer) is not None:  # gives the codes their meaning
        config = dataclasses.asdict(tokenizer.config)
        described["depth_tokenizer"] = _hash(config, tokenizer.network.state_dict())
    return described


def describe_surroundings(runtime: Runtime) -> dict[str, Any]:
    """Code, libraries and machine of a run."""
    machine = {"device": str(runtime.device), "hardware": describe_hardware()}
    return {**machine, **describe_code(sys.argv)}


def describe_code(words: Sequence[str]) -> dict[str, Any]:
    """Command, code and libraries of a run."""
    return {
        "command": command_line(words),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in ("vpt-runtime", *_LIBRARIES)},
    }


def describe_hardware() -> dict[str, Any]:
    """Names of the processor and of a GPU if there is one, and the threads that torch uses."""
    import torch

    hardware = {"cpu": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    return hardware


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())


def command_line(words: Sequence[str]) -> str:
    """A command as it may be published: without keys, and without folders of the machine."""
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, _ = word.partition("=")
        if _SECRET_FLAG.fullmatch(before):
            word = _REMOVED
        elif equals and _SECRET_FLAG.fullmatch(flag):
            word = f"{flag}={_REMOVED}"
        shown.append(shlex.quote(public_text(f"'{word}'")[1:-1]))
    return " ".join(shown)


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
    """Commit of a checkout, with a ``+`` if files differ from it; ``None`` if there is none."""
    options: dict[str, Any] = {"cwd": folder, "stderr": subprocess.DEVNULL, "timeout": 20}
    status = ["git", "status", "--porcelain", "--untracked-files=no"]
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True, **options)
        changed = subprocess.check_output(status, text=True, **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changed else "")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
