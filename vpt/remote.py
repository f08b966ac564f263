"""What the shim in a model folder imports: the classes, made known wherever they are needed."""

import vpt
from vpt.model.config import VPTConfig, VRTConfig
from vpt.model.modeling import VPTForConditionalGeneration, VRTForConditionalGeneration
from vpt.model.processing import VPTProcessor

__all__ = [
    "VPTConfig",
    "VPTForConditionalGeneration",
    "VPTProcessor",
    "VRTConfig",
    "VRTForConditionalGeneration",
]

vpt.register()
