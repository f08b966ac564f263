"""Vision branches: each turns an image into features on a grid, a crop, or boxes for a phrase.

Encoders are imported when first used, because they bring transformers with them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from branches.base import Branch, BranchError, Features
from branches.crop import crop

if TYPE_CHECKING:
    from branches.dino import DinoBranch
    from branches.grounding import GroundingBranch, Proposal
    from branches.reencode import ReencodeBranch
    from branches.sam import SamBranch

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
    "DinoBranch": "branches.dino",
    "GroundingBranch": "branches.grounding",
    "Proposal": "branches.grounding",
    "ReencodeBranch": "branches.reencode",
    "SamBranch": "branches.sam",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'branches' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
