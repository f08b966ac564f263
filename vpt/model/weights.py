"""Names of weights in model folders, and what a folder must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vpt.branches import dino
from vpt.errors import CheckpointError

RELEASED_NAMES = {
    r"^model\.(layers|embed_tokens|norm)\b": r"model.language_model.\1",
    r"^visual\.": r"model.visual.",
    r"^detection_model\.": r"branches.dino.encoder.",
    r"^seg_model\.": r"branches.sam.encoder.",
    r"^clip_projector\.": r"projectors.reencode.",
    r"^detection_projector\.": r"projectors.dino.",
    r"^seg_projector\.": r"projectors.sam.",
}
"""Released parameter names -> ours; names that are already ours are left alone."""

UNUSED_RELEASED_KEYS = [
    r"^projectors\.reencode\.(linear|layernorm)_feature\.",
    r"^projectors\.sam\.linear_feature\.",
]
"""Weights the released projectors carry but never use."""

_DINO = "branches.dino."


def key_mapping() -> dict[str, str]:
    """Patterns and replacements from the names in folders to those of the installed model.

    A newer transformers converts the stored names of DINOv2 by itself; an older one has to be
    told of the newer names.
    """
    if dino.has_newer_names():
        return RELEASED_NAMES
    newer = {
        rf"^{_DINO}(.*){pattern}": rf"{_DINO}\1{stored}"
        for pattern, stored in dino.newer_to_stored_names().items()
    }
    return RELEASED_NAMES | newer


def stored_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model under the names that folders have, whatever transformers is installed.

    Args:
        state_dict: of a :class:`vpt.model.modeling.VPTForConditionalGeneration`.
    """
    own = {key: value for key, value in state_dict.items() if key.startswith(_DINO)}
    rest = {key: value for key, value in state_dict.items() if key not in own}
    return rest | dino.stored_weights(own)


def check_account(path_or_id: str, account: Mapping[str, Any]) -> None:
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
    if found := [f"{len(v)} {k} ({', '.join(v[:3])}, ...)" for k, v in problems.items() if v]:
        raise CheckpointError(
            f"the weights in {path_or_id} do not fit its config.json: {'; '.join(found)}. "
            "Check vision_encoder_ls and the encoder configs beside the weights"
        )
