"""GroundingDINO as ported to transformers, used only where the port is right."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import torch

from vpt.branches.base import BranchError
from vpt.branches.grounding_detector import Caption, Detections

# A caption of two phrases in ids of bert-base-uncased: [CLS] a cat . a dog . [SEP]
_INPUT_IDS = [101, 1037, 4937, 1012, 1037, 3899, 1012, 102]
# Positions start anew in each phrase and go on through its full stop; so says
# groundingdino/models/GroundingDINO/bertwarper.py, with which the released weights were trained.
_POSITION_IDS = [0, 0, 1, 2, 0, 1, 2, 0]
# A token sees the tokens of its own phrase, full stop included.
_PHRASE_OF_TOKEN = [0, 1, 1, 1, 2, 2, 2, 3]


@functools.cache
def transformers_port_is_right() -> bool:
    """Tell whether the installed transformers feeds GroundingDINO's text encoder correctly.

    Its function is run on a caption of two phrases and compared with masks and positions worked
    out by hand. It gave a full stop position 0 in 5.0 to 5.17.
    """
    from transformers.models.grounding_dino import modeling_grounding_dino as port

    build_masks = port.generate_masks_with_special_tokens_and_transfer_map
    kwargs = {}
    if "special_tokens" in inspect.signature(build_masks).parameters:  # since 5.23 or before
        kwargs["special_tokens"] = torch.tensor(port.SPECIAL_TOKENS)
    attention_mask, position_ids = build_masks(torch.tensor([_INPUT_IDS]), **kwargs)
    phrases = torch.tensor(_PHRASE_OF_TOKEN)
    return bool(
        torch.equal(position_ids[0], torch.tensor(_POSITION_IDS))
        and torch.equal(attention_mask[0], phrases[:, None] == phrases[None])
    )


def load_encoder(path_or_id: str | Path, **kwargs: Any) -> Any:
    """Load a ``GroundingDinoForObjectDetection``; see `GroundingBranch.from_transformers`.

    Raises:
        BranchError: if the port is wrong in the installed transformers, or if its text encoder
            would run in eager attention, which reads the mask wrongly.
    """
    import transformers

    if not transformers_port_is_right():
        raise BranchError(
            "expected a transformers whose GroundingDINO gives each word of a phrase its position; "
            f"{transformers.__version__} does not; use groundingdino-py instead "
            '(pip install "vpt-runtime[grounding]", GroundingBranch.from_checkpoint) '
            "or another transformers (5.23 is right)"
        )
    encoder = transformers.GroundingDinoForObjectDetection.from_pretrained(path_or_id, **kwargs)
    attention = encoder.model.text_backbone.config._attn_implementation
    if attention != "sdpa":
        raise BranchError(
            f"expected the text encoder to run in sdpa attention; got {attention}, which reads its "
            "mask wrongly; leave attn_implementation out"
        )
    return encoder


def load_tokenizer(path_or_id: str | Path, **kwargs: Any) -> Any:
    """Load the tokenizer beside the weights, of the same revision."""
    from transformers import AutoTokenizer

    named = {"revision", "cache_dir", "token", "local_files_only", "subfolder"} & set(kwargs)
    return AutoTokenizer.from_pretrained(path_or_id, **{name: kwargs[name] for name in named})


def detect(encoder: Any, pixel_values: torch.Tensor, caption: Caption) -> Detections:
    """Run the port; a `vpt.branches.grounding_detector.Detect`."""
    outputs = encoder(pixel_values=pixel_values, **caption.tokens)
    token_scores = outputs.logits.sigmoid()
    return Detections(outputs.last_hidden_state[0], token_scores[0], outputs.pred_boxes[0])
