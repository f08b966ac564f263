"""Read released and our own checkpoints, with an exact account of their weights."""

from __future__ import annotations

import os
from typing import Any

import torch

from vpt.errors import PromptError
from vpt.model.config import load_config
from vpt.model.modeling import VPTForConditionalGeneration

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Types that weights can be computed in."""


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
        PromptError: for an unknown ``dtype``.
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
        PromptError: for an unknown ``dtype``.
    """
    if dtype != "auto" and str(dtype).removeprefix("torch.") not in DTYPES:
        raise PromptError(f"unknown dtype {str(dtype)!r}; available: auto, {', '.join(DTYPES)}")
    path_or_id = str(path_or_id)
    config = load_config(path_or_id, **hub_kwargs)
    return VPTForConditionalGeneration.from_pretrained(
        path_or_id, config=config, dtype=dtype, **hub_kwargs
    )
