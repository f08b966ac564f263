"""Files of a model, in a folder or on the hub: where they are, and the weights they hold.

Every folder has a small module, the shim, through which transformers finds this package: it loads a
model type that it does not know from code beside the weights, if it is allowed to
(``trust_remote_code``). Ours holds nothing but an import of the installed package.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from vpt.branches.base import branch_class
from vpt.branches.encoder import HUB_ARGUMENTS, EncoderBranch
from vpt.errors import CheckpointError, VPTError, is_out_of_memory
from vpt.files import write_atomic
from vpt.model.folder import check_file, check_path, read_json
from vpt.protocol.tokens import BRANCH_TOKENS

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*")
"""Names of the files that hold a model's weights, in the order in which they are looked for."""

SHIM_NAME = "vpt_shim"

SHIM_TEXT = '''\
"""Leads transformers and LLaMA-Factory to the installed package vpt-runtime."""

from vpt.remote import *  # noqa: F403
'''

_PROCESSOR_ENTRY = {"AutoProcessor": f"{SHIM_NAME}.VPTProcessor"}

_UNUSED_PARTS = {"identity": ("linear", "layernorm"), "conv": ("linear",)}
"""Stem -> layers of features that the released projectors carry but never use."""

UNUSED_RELEASED_KEYS = [
    rf"^projectors\.{row.branch}\.({'|'.join(_UNUSED_PARTS[row.stem])})_feature\."
    for row in BRANCH_TOKENS.values()
    if row.stem in _UNUSED_PARTS
]
"""Patterns of weights in released checkpoints that are left aside."""


@contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Turn what libraries raise for unreadable files into a ``CheckpointError`` with words.

    Tokenizers raise plain ``Exception``, and a number in a file can break code anywhere, so no
    list of types would do. Our own errors and a lack of memory pass through.
    """
    try:
        yield
    except Exception as exc:
        if isinstance(exc, VPTError) or is_out_of_memory(exc):
            raise
        reason = str(exc).strip().split("\n")[0] or type(exc).__name__
        if isinstance(exc, UnpicklingError) or "weights_only" in str(exc):
            # torch's own text advises to switch safe loading off.
            reason = (
                "it is damaged, or holds more than tensors, which could run code when loaded; get "
                "the file again, or ask for it as safetensors"
            )
        raise CheckpointError(f"{what}: {reason}") from exc


def find_file(path_or_id: str | os.PathLike[str], name: str, **hub_kwargs: Any) -> Path | None:
    """Path of a file of a model, or ``None``; options that are not of the hub are ignored."""
    path_or_id = str(path_or_id)
    check_path(path_or_id)
    wanted = {key: value for key, value in hub_kwargs.items() if key in HUB_ARGUMENTS}
    if (there := Path(path_or_id, wanted.get("subfolder") or "", name)).is_dir():
        raise CheckpointError(f"{there} is a folder; expected a file")
    try:
        file = cached_file(path_or_id, name, _raise_exceptions_for_missing_entries=False, **wanted)
    except OSError as exc:
        raise CheckpointError(
            f"cannot find {name} of the model {path_or_id!r}: not a folder here, and the hub "
            f"did not give it ({str(exc).splitlines()[0]})"
        ) from exc
    return None if file is None else Path(file)


def check_weights(
    path_or_id: str,
    make: Callable[[], nn.Module],
    key_mapping: Mapping[str, str] = {},
) -> None:
    """Check a folder's weights before any are read; the files of a hub id are not checked.

    Args:
        make: builds the model; called under the ``meta`` device.
        key_mapping: patterns of stored names -> names in the model.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        return
    refuse_adapter(path_or_id)
    if not (files := _weights_files(folder)):
        return  # transformers names all that it looked for
    names: Counter[str] = Counter()
    for file in files:
        for name in _stored_names(file):
            for pattern, replacement in key_mapping.items():
                name = re.sub(pattern, replacement, name)
            names[name] += 1
    if twice := [name for name, count in names.items() if count > 1]:
        raise CheckpointError(f"{folder} holds the weight {twice[0]} twice; remove one of the two")
    with torch.device("meta"):
        num_wanted = sum(weight.numel() for weight in make().parameters())
    num_bytes = sum(file.stat().st_size for file in files)
    if num_wanted > num_bytes:
        raise CheckpointError(
            f"{folder}/config.json and the encoder configs beside it describe {num_wanted:,} "
            f"weights, but the files hold {num_bytes:,} bytes; check the sizes in them, such as "
            "hidden_size and num_hidden_layers, or get the weights again"
        )


def adapter_base(path_or_id: str, **hub_kwargs: Any) -> str | None:
    """Return the model that LoRA weights belong to, as they name it; ``None`` for a whole model."""
    if find_file(path_or_id, "config.json", **hub_kwargs):
        return None
    if (file := find_file(path_or_id, "adapter_config.json", **hub_kwargs)) is None:
        return None
    return str(read_json(file).get("base_model_name_or_path") or "")


def refuse_adapter(path_or_id: str, **hub_kwargs: Any) -> None:
    """Refuse a folder of LoRA weights, which transformers would put on a model from elsewhere."""
    if file := find_file(path_or_id, "adapter_config.json", **hub_kwargs):
        base = read_json(file).get("base_model_name_or_path") or "the model it was trained on"
        raise CheckpointError(
            f"{path_or_id} holds an adapter (adapter_config.json), not a model; vpt.load applies "
            f"one, or merge it into {base} with `llamafactory-cli export` and load the result. If "
            "the weights are merged already, remove adapter_config.json"
        )


def _weights_files(folder: Path) -> list[Path]:
    """Files of the weights that would be read from a folder; none if it has none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (file := folder / name).exists():
            return [file]
        if (index := folder / f"{name}.index.json").exists():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(one, str) for one in shards.values()):
        raise CheckpointError(f"expected in {index} a weight_map of weights to file names")
    files = []
    for name in sorted(set(shards.values())):
        if name != Path(name).name or name == "..":
            raise CheckpointError(f"{index} names {name!r}, which is outside the model folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name!r}, which is not in the folder; get it")
        files.append(index.parent / name)
    return files


def _stored_names(file: Path) -> list[str]:
    check_file(file)
    with as_checkpoint_error(f"cannot read the weights {file}"):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                return list(stored.keys())
        return list(torch.load(file, map_location="meta", weights_only=True))


def copy_part(folder: str | os.PathLike[str], name: str, target: str | os.PathLike[str]) -> None:
    """Copy a file or folder within a model folder to where the model is saved, unless it exists."""
    source, copy = Path(folder, name), Path(target, name)
    if not folder or not source.exists() or os.path.lexists(copy) or ".." in Path(name).parts:
        return
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        shutil.copy2(source, copy)


def other_weights(folder: Path, draft: Path) -> list[Path]:
    """Weights in a folder that would be read instead of those in ``draft``, if there are any."""
    old, new = (
        {file.name: file for pattern in WEIGHTS for file in where.glob(pattern)}
        for where in (folder, draft)
    )
    return [old[name] for name in old if name not in new] if new else []


def key_mapping(branches: Iterable[str]) -> dict[str, str]:
    """Patterns of names in folders -> names in the installed model; ours are left alone."""
    names = {
        r"^model\.(layers|embed_tokens|norm)\b": r"model.language_model.\1",
        r"^visual\.": r"model.visual.",
    }
    for row in BRANCH_TOKENS.values():
        names[rf"^{row.released}_model\."] = f"branches.{row.branch}.encoder."
        names[rf"^{row.released}_projector\."] = f"projectors.{row.branch}."
    for branch in branches:
        home = branch_class(BRANCH_TOKENS[branch].home)
        own: Mapping[str, str] = home.key_mapping() if issubclass(home, EncoderBranch) else {}
        for pattern, replacement in own.items():
            names[rf"^branches\.{branch}\.(.*){pattern}"] = rf"branches.{branch}.\1{replacement}"
    return names


def stored_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model under the names that folders have, whatever transformers is installed."""
    rest, stored = dict(state_dict), dict[str, Tensor]()
    for row in BRANCH_TOKENS.values():
        prefix = f"branches.{row.branch}."
        own = {key: rest.pop(key) for key in state_dict if key.startswith(prefix)}
        if own and issubclass(home := branch_class(row.home), EncoderBranch):
            own = home.stored_weights(own)
        stored |= own
    return rest | stored


def check_account(path_or_id: str, account: Mapping[str, Any]) -> None:
    """Refuse weights other than the model's; ``account`` is transformers' loading info."""
    problems = {
        "missing": sorted(account["missing_keys"]),
        "unknown": sorted(account["unexpected_keys"]),
        "of another shape": sorted(str(key) for key in account["mismatched_keys"]),
    }
    if found := [f"{len(v)} {k} ({', '.join(v[:3])}, ...)" for k, v in problems.items() if v]:
        raise CheckpointError(
            f"the weights in {path_or_id} do not fit its config.json: {'; '.join(found)}. "
            "Check vision_encoder_ls and the encoder configs beside the weights"
        )


def auto_map(config_class: type) -> dict[str, str]:
    """Class of the shim for each Auto class."""
    family = config_class.__name__.removesuffix("Config")
    return {
        "AutoConfig": f"{SHIM_NAME}.{family}Config",
        "AutoModelForImageTextToText": f"{SHIM_NAME}.{family}ForConditionalGeneration",
        **_PROCESSOR_ENTRY,
    }


def write_shim(folder: str | os.PathLike[str]) -> None:
    """Write the module into a model folder."""
    write_atomic(SHIM_TEXT, Path(folder) / f"{SHIM_NAME}.py")


def write_processor_entry(folder: str | os.PathLike[str]) -> None:
    """Name our processor in the file that transformers reads before all others."""
    file = Path(folder) / "processor_config.json"
    known = read_json(file) if file.exists() else {}
    entry = {**known, "processor_class": "VPTProcessor", "auto_map": _PROCESSOR_ENTRY}
    write_atomic(json.dumps(entry, indent=2) + "\n", file)


class ShimSavingMixin:
    """Keeps transformers from copying a class's source over the shim when a model is saved."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the shim is written by ``save_pretrained``."""
