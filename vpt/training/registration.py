"""Make models, template, plugin and dataset format known to a running LLaMA-Factory."""

from __future__ import annotations

import inspect

from llamafactory.data import converter, mm_plugin, template
from llamafactory.data.formatter import StringFormatter
from llamafactory.model.model_utils import visual

from vpt.errors import TrainingError
from vpt.model.config import VPTConfig, VRTConfig
from vpt.protocol.tokens import DEFAULT_SYSTEM, IMAGE_PAD, TURN_END, TURN_START
from vpt.training.dataset import VPTDatasetConverter
from vpt.training.muon import orthogonalize_in_float32_on_cpu
from vpt.training.plugin import VPTPlugin
from vpt.training.template import TEMPLATE_NAME, VPTTemplate
from vpt.training.tested import TESTED
from vpt.training.trainer import install_trainer

FORMAT_NAME = "vpt"

PARTS = {
    "projector_keys": ["projectors", "model.visual.merger"],
    "vision_model_keys": ["model.visual.", "branches."],
    "language_model_keys": ["language_model", "lm_head"],
    "lora_conflict_keys": ["patch_embed", "projectors"],
}
"""Which parameters ``freeze_*`` of LLaMA-Factory mean, as parts of their names. The merger is
vision too, so that it is frozen with the tower, as it was for the released models."""


def register_with_llamafactory() -> None:
    """Register everything; harmless when done twice.

    Raises:
        TrainingError: if LLaMA-Factory has changed where there is no public way in.
    """
    if TEMPLATE_NAME not in mm_plugin.PLUGINS:
        mm_plugin.register_mm_plugin(TEMPLATE_NAME, VPTPlugin)
    if FORMAT_NAME not in converter.DATASET_CONVERTERS:
        converter.register_dataset_converter(FORMAT_NAME, VPTDatasetConverter)
    if TEMPLATE_NAME not in template.TEMPLATES:
        _register_template()
    for config in (VPTConfig, VRTConfig):
        register_parts(config.model_type)
    install_trainer()
    orthogonalize_in_float32_on_cpu()


def _register_template() -> None:
    turn = "{{content}}" + TURN_END
    template.register_template(
        name=TEMPLATE_NAME,
        # The formatters serve LLaMA-Factory's exports only: VPTTemplate writes turns itself.
        format_user=StringFormatter(slots=[f"{TURN_START}user\n{turn}\n{TURN_START}assistant\n"]),
        format_assistant=StringFormatter(slots=[f"{turn}\n"]),
        format_system=StringFormatter(slots=[f"{TURN_START}system\n{turn}\n"]),
        default_system=DEFAULT_SYSTEM,
        stop_words=[TURN_END],
        replace_eos=True,
        mm_plugin=mm_plugin.get_mm_plugin(TEMPLATE_NAME, image_token=IMAGE_PAD),
        template_class=VPTTemplate,
    )


def register_parts(model_type: str) -> None:
    """Say which parameters of a model type are projectors, vision and language model.

    Raises:
        TrainingError: if the private function this needs is not the tested one.
    """
    register = getattr(visual, "_register_composite_model", None)
    expected = ["model_type", *PARTS]
    if register is None or list(inspect.signature(register).parameters) != expected:
        raise TrainingError(
            "llamafactory.model.model_utils.visual._register_composite_model does not take "
            f"{', '.join(expected)}; freezing parts of the model was tested with {TESTED}"
        )
    register(model_type, **PARTS)
