"""What the shim in a model folder imports: the classes, made known wherever they are needed."""

import vpt
from vpt.config import VPTConfig, VRTConfig
from vpt.modeling import VPTForConditionalGeneration, VRTForConditionalGeneration
from vpt.processing import VPTProcessor

__all__ = [
    "VPTConfig",
    "VPTForConditionalGeneration",
    "VPTProcessor",
    "VRTConfig",
    "VRTForConditionalGeneration",
]

vpt.register()
