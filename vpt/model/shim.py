"""The small module in every model folder through which transformers finds this package.

transformers loads a model type that it does not know from code beside the weights, if it is
allowed to (``trust_remote_code``). Ours holds nothing but an import of the installed package.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vpt.files import write_whole
from vpt.model.hub import read_json

SHIM_NAME = "vpt_shim"

SHIM_TEXT = '''\
"""Leads transformers and LLaMA-Factory to the installed package vpt-runtime."""

from vpt.remote import *  # noqa: F403
'''

_PROCESSOR_ENTRY = {"AutoProcessor": f"{SHIM_NAME}.VPTProcessor"}


def auto_map(config_class: type) -> dict[str, str]:
    """Which class of the shim each Auto class shall use.

    Args:
        config_class: of the model; the model class has a name that begins alike.
    """
    family = config_class.__name__.removesuffix("Config")
    return {
        "AutoConfig": f"{SHIM_NAME}.{family}Config",
        "AutoModelForImageTextToText": f"{SHIM_NAME}.{family}ForConditionalGeneration",
        **_PROCESSOR_ENTRY,
    }


def write_shim(folder: str | os.PathLike[str]) -> None:
    """Write the module into a model folder."""
    write_whole(SHIM_TEXT, Path(folder) / f"{SHIM_NAME}.py")


def write_processor_entry(folder: str | os.PathLike[str]) -> None:
    """Say whose processor this is, in the file that transformers reads before all others."""
    file = Path(folder) / "processor_config.json"
    known = read_json(file) if file.exists() else {}
    entry = {**known, "processor_class": "VPTProcessor", "auto_map": _PROCESSOR_ENTRY}
    write_whole(json.dumps(entry, indent=2) + "\n", file)


class ShimSavingMixin:
    """Goes in front of a transformers class that lies behind the shim.

    transformers marks classes it loads from a folder, and copies their source when it saves. That
    would replace the shim by files that cannot be imported alone.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the shim is written by ``save_pretrained``."""
