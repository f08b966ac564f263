"""Read released and our own checkpoints, with an exact account of their weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from branches import BranchError
from vpt.config import load_config
from vpt.errors import CheckpointError, is_out_of_memory
from vpt.modeling import VPTForConditionalGeneration

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


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Turn what libraries raise for unreadable files into a ``CheckpointError`` with words.

    Running out of memory is another matter and passes through.
    """
    try:
        yield
    except UNREADABLE as exc:
        if is_out_of_memory(exc):
            raise
        raise CheckpointError(f"{what}: {exc}") from exc


def load_model(
    path_or_id: str | os.PathLike[str],
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
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    return read_model(path_or_id, dtype=dtype, **hub_kwargs).to(device).eval()


def read_model(
    path_or_id: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", **hub_kwargs: Any
) -> VPTForConditionalGeneration:
    """Read a VPT model as it is stored, to be asked, changed or trained.

    Args:
        path_or_id: folder or hub id, in the released format or our own.
        dtype: of the weights; ``"auto"`` for the stored one.
        **hub_kwargs: as for ``from_pretrained``.

    Raises:
        CheckpointError: if the folder or a weight is missing, or a weight is unknown.
    """
    path_or_id = str(path_or_id)
    config = load_config(path_or_id, **hub_kwargs)
    with saying(f"cannot make a model of {path_or_id}"):
        return VPTForConditionalGeneration.from_pretrained(
            path_or_id, config=config, dtype=dtype, **hub_kwargs
        )
