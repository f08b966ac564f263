"""What the shim in a model folder imports: the classes, made known wherever they are needed."""

import vpt
from vpt.model.config import VPTConfig, VPTQwen3Config, VPTQwen25Config, VRTConfig
from vpt.model.modeling import (
    VPTForConditionalGeneration,
    VPTQwen3ForConditionalGeneration,
    VPTQwen25ForConditionalGeneration,
    VRTForConditionalGeneration,
)
from vpt.model.processing import VPTProcessor

__all__ = [
    "VPTConfig",
    "VPTForConditionalGeneration",
    "VPTProcessor",
    "VPTQwen3Config",
    "VPTQwen3ForConditionalGeneration",
    "VPTQwen25Config",
    "VPTQwen25ForConditionalGeneration",
    "VRTConfig",
    "VRTForConditionalGeneration",
]

vpt.register()
