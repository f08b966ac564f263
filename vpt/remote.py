"""What the shim in a model folder imports: the classes, made known wherever they are needed."""

import vpt
from vpt.model.config import VPTConfig, VPTQwen25Config, VRTConfig
from vpt.model.modeling import (
    VPTForConditionalGeneration,
    VPTQwen25ForConditionalGeneration,
    VRTForConditionalGeneration,
)
from vpt.model.processing import VPTProcessor

__all__ = [
    "VPTConfig",
    "VPTForConditionalGeneration",
    "VPTProcessor",
    "VPTQwen25Config",
    "VPTQwen25ForConditionalGeneration",
    "VRTConfig",
    "VRTForConditionalGeneration",
]

vpt.register()
