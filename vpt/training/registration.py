"""Registration with LLaMA-Factory: models, template, plugin, dataset format and trainer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamafactory.data import converter, mm_plugin, template
from llamafactory.data.formatter import StringFormatter
from llamafactory.model.model_utils import visual

from vpt.errors import TrainingError
from vpt.model.config import CONFIGS
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import ROLES, write_turns
from vpt.protocol.tokens import DEFAULT_SYSTEM, IMAGE_PAD, TURN_END, TURN_START
from vpt.training.dataset import TEMPLATES, VPTDatasetConverter, VPTPlugin
from vpt.training.trainer import TESTED, install_accuracy, install_trainer

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
    """Register everything, once; raise ``TrainingError`` for private parts that have changed."""
    if FORMAT_NAME not in mm_plugin.PLUGINS:
        mm_plugin.register_mm_plugin(FORMAT_NAME, VPTPlugin)
    if FORMAT_NAME not in converter.DATASET_CONVERTERS:
        converter.register_dataset_converter(FORMAT_NAME, VPTDatasetConverter)
    for name in set(TEMPLATES) - set(template.TEMPLATES):
        _register_template(name)
    for model_type in CONFIGS:
        register_parts(model_type)
    install_trainer()


def _register_template(name: str) -> None:
    turn = "{{content}}" + TURN_END
    template.register_template(
        name=name,
        # The formatters serve LLaMA-Factory's exports only: VPTTemplate writes turns itself.
        format_user=StringFormatter(slots=[f"{TURN_START}user\n{turn}\n{TURN_START}assistant\n"]),
        format_assistant=StringFormatter(slots=[f"{turn}\n"]),
        format_system=StringFormatter(slots=[f"{TURN_START}system\n{turn}\n"]),
        default_system=DEFAULT_SYSTEM,
        stop_words=[TURN_END],
        replace_eos=True,
        mm_plugin=mm_plugin.get_mm_plugin(FORMAT_NAME, image_token=IMAGE_PAD),
        template_class=VPTTemplate,
    )


def register_parts(model_type: str) -> None:
    """Name the parameters of a model type that are projectors, vision and language model."""
    register = getattr(visual, "_register_composite_model", None)
    expected = ["model_type", *PARTS]
    if register is None or list(inspect.signature(register).parameters) != expected:
        raise TrainingError(
            "llamafactory.model.model_utils.visual._register_composite_model does not take "
            f"{', '.join(expected)}; freezing parts of the model was tested with {TESTED}"
        )
    register(model_type, **PARTS)


class VPTTemplate(template.Template):
    """Template of the released models, whatever their backbone.

    It differs from LLaMA-Factory's ``qwen2_vl`` and ``qwen3_vl`` at the ends of turns; its default
    system prompt is the former's.
    """

    def fix_special_tokens(self, tokenizer: Any) -> None:
        """Prepare the tokenizer, and the accuracy of its kinds of tokens.

        Raise ``CheckpointError`` if the folder's processor cannot be loaded or is not the model's:
        LLaMA-Factory only logs that, and would train without it.
        """
        if Path(tokenizer.name_or_path).is_dir():
            VPTProcessor.from_pretrained(tokenizer.name_or_path)
        super().fix_special_tokens(tokenizer)
        install_accuracy(tokenizer)

    def encode_multiturn(
        self,
        tokenizer: Any,
        messages: Sequence[dict[str, str]],
        system: str | None = None,
        tools: str | None = None,
        discarding_history_cot: bool = False,
    ) -> list[tuple[list[int], list[int]]]:
        """Ids of prompt and answer of each turn; ``mask_history`` and tools are refused."""
        if discarding_history_cot:
            raise TrainingError(
                "mask_history is not supported: it cuts the first turns, and which images belong "
                "to the rest would be unknown; set `mask_history: false`"
            )
        return super().encode_multiturn(tokenizer, messages, system, tools)

    def _encode(
        self,
        tokenizer: Any,
        messages: Sequence[dict[str, str]],
        system: str | None,
        tools: str | None,
    ) -> list[list[int]]:
        if tools:
            raise TrainingError("tools are not supported by this template; leave them out")
        roles = [message["role"] for message in messages]
        if roles != [ROLES[number % 2] for number in range(len(roles))]:
            raise TrainingError(f"expected user and assistant by turns, got {', '.join(roles)}")
        contents = [message["content"] for message in messages]
        turns = write_turns(system or self.default_system, contents[::2], contents[1::2])
        return [tokenizer.encode(text, add_special_tokens=False) for turn in turns for text in turn]
