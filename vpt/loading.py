"""Loading of a model, with all that belongs to it, as a runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vpt.depth.tokenizer import CONFIG, WEIGHTS, DepthTokenizer, load_depth_tokenizer
from vpt.detector import Proposer
from vpt.errors import CheckpointError, PromptError
from vpt.images import DEFAULT_LIMITS, ImageLimits
from vpt.inference.features import DEFAULT_CACHE_BYTES
from vpt.inference.prefixes import DEFAULT_PREFIX_BYTES
from vpt.inference.request import lists_options
from vpt.model.hub import adapter_base, find_file
from vpt.model.modeling import VPTForConditionalGeneration, load_model, merge_adapter
from vpt.model.processing import VPTProcessor
from vpt.runtime import DEFAULT_NUM_SEQS, Runtime
from vpt.segmenter import Segments

EMBEDDED_MODEL = Path(__file__).parent / "embedded"
"""Folder of the model that ships with this package."""


@lists_options
def load(
    path_or_id: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    quantization_config: Any = None,
    base: str | os.PathLike[str] | None = None,
    feature_cache_bytes: int = DEFAULT_CACHE_BYTES,
    limits: ImageLimits = DEFAULT_LIMITS,
    allowed_media_domains: Sequence[str] | None = None,
    image_resolution: int | None = None,
    depth_tokenizer: str | os.PathLike[str] | None = None,
    detector: str | os.PathLike[str] | Proposer | None = None,
    segmenter: str | os.PathLike[str] | Segments | None = None,
    max_num_seqs: int = DEFAULT_NUM_SEQS,
    max_model_len: int | None = None,
    prefix_cache_bytes: int = DEFAULT_PREFIX_BYTES,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Runtime:
    """Load a model and return its runtime.

    Args:
        path_or_id: a model folder or hub id, in the released format or our own; or LoRA weights,
            which are merged into their base; ``None`` for the small embedded model, see
            docs/embedded-model.md.
        device: ``"cpu"``, ``"cuda"``, ...; by default a GPU if there is one.
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"``, ... or a torch dtype.
        device_map: where transformers puts the weights, in place of ``device``: one device.
        quantization_config: for transformers, see docs/transformers.md.
        base: model that LoRA weights belong to; by default the one that they name.
        feature_cache_bytes: memory for features of images seen before.
        limits: of input images.
        allowed_media_domains: hosts from which images may be fetched; those of ``limits``, which
            has none by default, if not given.
        image_resolution: longer side to which images are shrunk before the model sees them, 0 for
            no limit; by default that of the model's configuration (released models: 512).
        depth_tokenizer: folder or file of the decoder of the model's depth maps; by default the one
            in the model's folder, if there is one.
        detector: finds the phrases of ``look_for``: a folder or hub id of GroundingDINO in
            transformers' format, a file ``*.pth`` of its released weights, or an object with its
            method ``propose``. Loaded when it is needed.
        segmenter: finds the objects of ``mask``: a folder or hub id of SAM in transformers' format,
            a file ``*.pth`` of its released weights, which needs the extra ``sam``; or an object
            with its method ``segment``. Loaded when it is needed.
        max_num_seqs: requests that run at once; others wait.
        max_model_len: tokens of one request with all its images, looks and answers; by default
            what the model's context allows, bounded by half of the memory for all requests.
        prefix_cache_bytes: memory for prompts seen before, which are not read again.
        revision: branch, tag or commit on the hub.
        subfolder: of the model, in its folder or on the hub.
        cache_dir: folder for files of the hub; by default that of transformers.
        token: for private models on the hub; ``True`` for the stored one.
        local_files_only: read files that were downloaded before, without a network.
        force_download: download files again.

    Raises:
        CheckpointError: if the model cannot be loaded.
        PromptError: for an unknown option.
    """
    source = str(EMBEDDED_MODEL if path_or_id is None else path_or_id)
    name = "embedded" if path_or_id is None else source
    if allowed_media_domains is not None:
        limits = replace(limits, allowed_media_domains=allowed_media_domains)
    options = {
        "revision": revision,
        "subfolder": subfolder,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    hub = {name: value for name, value in options.items() if value is not None}
    adapter, of_adapter = source, hub
    if (named := adapter_base(source, **hub)) is not None:
        source = str(base or named)
        if not source:
            raise CheckpointError(f"{adapter} does not name its base model; pass base=")
        hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    elif base is not None:
        raise PromptError(f"base is for LoRA weights, but {source} is a whole model")
    if named is not None and quantization_config is not None:
        raise PromptError("LoRA weights cannot be merged into a quantised model; merge them before")
    model = load_model(
        source,
        device=device,
        dtype=dtype,
        device_map=device_map,
        quantization_config=quantization_config,
        **hub,
    )
    if named is not None:
        model = merge_adapter(model, adapter, **of_adapter)
    processor = VPTProcessor.from_pretrained(source, **hub)
    if image_resolution is not None:
        model.config.image_resolution = image_resolution or None
    return Runtime(
        model,
        processor,
        name=name,
        feature_cache_bytes=feature_cache_bytes,
        limits=limits,
        depth_tokenizer=_load_depth_tokenizer(source, model, depth_tokenizer, hub),
        detector=detector,
        segmenter=segmenter,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        prefix_cache_bytes=prefix_cache_bytes,
    )


def _load_depth_tokenizer(
    source: str,
    model: VPTForConditionalGeneration,
    given: str | os.PathLike[str] | None,
    hub: dict[str, Any],
) -> DepthTokenizer | None:
    """The one that is given, or that of the model's folder, or none."""
    if given is not None:
        return load_depth_tokenizer(given)
    if "depth" not in model.config.content_tokens.kinds:
        return None
    name = model.config.depth_tokenizer
    if (part := Path(source, hub.get("subfolder") or "", name)).exists():
        return load_depth_tokenizer(part)
    files = [find_file(source, f"{name}/{file}", **hub) for file in (CONFIG, WEIGHTS)]
    return None if files[0] is None else load_depth_tokenizer(files[0].parent)
