"""VPT Runtime: multimodal LLMs that decide by themselves to look again.

Names are imported when first used, so that ``import vpt`` costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpt.config import VPTConfig
    from vpt.controller import (
        CallEvent,
        ContentEvent,
        ErrorEvent,
        Request,
        ResultEvent,
        StopEvent,
        TokenEvent,
    )
    from vpt.errors import VPTError
    from vpt.images import load_image
    from vpt.modeling import VPTForConditionalGeneration
    from vpt.processing import VPTProcessor
    from vpt.runtime import Answer, Runtime, load
    from vpt.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "CallEvent",
    "ContentEvent",
    "ErrorEvent",
    "Request",
    "ResultEvent",
    "Runtime",
    "StopEvent",
    "TokenEvent",
    "Trace",
    "VPTConfig",
    "VPTError",
    "VPTForConditionalGeneration",
    "VPTProcessor",
    "load",
    "load_image",
    "register",
]

_HOMES = {
    "Answer": "vpt.runtime",
    "CallEvent": "vpt.controller",
    "ContentEvent": "vpt.controller",
    "ErrorEvent": "vpt.controller",
    "Request": "vpt.controller",
    "ResultEvent": "vpt.controller",
    "Runtime": "vpt.runtime",
    "StopEvent": "vpt.controller",
    "TokenEvent": "vpt.controller",
    "Trace": "vpt.trace",
    "VPTConfig": "vpt.config",
    "VPTError": "vpt.errors",
    "VPTForConditionalGeneration": "vpt.modeling",
    "VPTProcessor": "vpt.processing",
    "load": "vpt.runtime",
    "load_image": "vpt.images",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def register() -> None:
    """Tell transformers' Auto classes of the VPT model types; harmless when done twice.

    LLaMA-Factory is told too where it is running already; it is never imported for this.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vpt.config import VPTConfig, VRTConfig, register_configs
    from vpt.modeling import VPTForConditionalGeneration, VRTForConditionalGeneration
    from vpt.processing import VPTProcessor

    register_configs()
    models = {VPTConfig: VPTForConditionalGeneration, VRTConfig: VRTForConditionalGeneration}
    for config, model in models.items():
        AutoModelForImageTextToText.register(config, model, exist_ok=True)
        AutoProcessor.register(config, VPTProcessor, exist_ok=True)
    if "llamafactory" in sys.modules:
        from vpt.training.registration import register_with_llamafactory

        register_with_llamafactory()
