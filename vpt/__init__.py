"""VPT Runtime: multimodal LLMs that decide by themselves to look again.

Names are imported when first used, so that ``import vpt`` costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpt.answer import Answer, Look
    from vpt.errors import VPTError
    from vpt.images import load_image
    from vpt.inference.events import (
        CallEvent,
        ContentEvent,
        ErrorEvent,
        ResultEvent,
        StopEvent,
        TokenEvent,
    )
    from vpt.inference.request import Request
    from vpt.loading import load
    from vpt.model.config import VPTConfig
    from vpt.model.modeling import VPTForConditionalGeneration
    from vpt.model.processing import VPTProcessor
    from vpt.runtime import Runtime
    from vpt.trace.records import Trace

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "CallEvent",
    "ContentEvent",
    "ErrorEvent",
    "Look",
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
    "Answer": "vpt.answer",
    "CallEvent": "vpt.inference.events",
    "ContentEvent": "vpt.inference.events",
    "ErrorEvent": "vpt.inference.events",
    "Look": "vpt.answer",
    "Request": "vpt.inference.request",
    "ResultEvent": "vpt.inference.events",
    "Runtime": "vpt.runtime",
    "StopEvent": "vpt.inference.events",
    "TokenEvent": "vpt.inference.events",
    "Trace": "vpt.trace.records",
    "VPTConfig": "vpt.model.config",
    "VPTError": "vpt.errors",
    "VPTForConditionalGeneration": "vpt.model.modeling",
    "VPTProcessor": "vpt.model.processing",
    "load": "vpt.loading",
    "load_image": "vpt.images",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def register() -> None:
    """Register the VPT model types with transformers' Auto classes; repetition has no effect.

    LLaMA-Factory is included if it is already imported; it is never imported for this.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vpt.model.config import CONFIGS, register_configs
    from vpt.model.modeling import MODELS
    from vpt.model.processing import VPTProcessor

    register_configs()
    for model_type, config in CONFIGS.items():
        AutoModelForImageTextToText.register(config, MODELS[model_type], exist_ok=True)
        AutoProcessor.register(config, VPTProcessor, exist_ok=True)
    if "llamafactory" in sys.modules:
        from vpt.training.registration import register_with_llamafactory

        register_with_llamafactory()
