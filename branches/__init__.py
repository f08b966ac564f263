"""Vision branches: each turns an image into features on a grid, a crop, or boxes for a phrase.

Encoders are imported when first used, because they import transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vpt.branches.base import Branch, BranchError, Features, crop

if TYPE_CHECKING:
    from vpt.branches.dino import DinoBranch
    from vpt.branches.grounding import GroundingBranch, Proposal
    from vpt.branches.reencode import ReencodeBranch
    from vpt.branches.sam import SamBranch

__all__ = [
    "Branch",
    "BranchError",
    "DinoBranch",
    "Features",
    "GroundingBranch",
    "Proposal",
    "ReencodeBranch",
    "SamBranch",
    "crop",
]

_HOMES = {
    "DinoBranch": "vpt.branches.dino",
    "GroundingBranch": "vpt.branches.grounding",
    "Proposal": "vpt.branches.grounding",
    "ReencodeBranch": "vpt.branches.reencode",
    "SamBranch": "vpt.branches.sam",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
