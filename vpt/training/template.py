"""The chat template ``vpt_qwen2_vl``: turns in tokens, as :mod:`vpt.protocol.rows` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamafactory.data.template import Template

from vpt.errors import TrainingError
from vpt.model.processing import VPTProcessor
from vpt.protocol.rows import ROLES, write_turns
from vpt.training.accuracy import install_accuracy

TEMPLATE_NAME = "vpt_qwen2_vl"


class VPTTemplate(Template):
    """Template of the released models; it differs from ``qwen2_vl`` at the ends of turns."""

    def fix_special_tokens(self, tokenizer: Any) -> None:
        """Prepare the tokenizer, and the accuracy of its kinds of tokens.

        Raises:
            CheckpointError: if the folder's processor cannot be loaded or is not the model's.
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
        """Ids of prompt and answer of each turn.

        Raises:
            TrainingError: for ``mask_history``, and for tools.
        """
        if discarding_history_cot:
            raise TrainingError(
                "mask_history is not supported: it cuts the first turns, and which images belong "
                "to the rest could not be told; set `mask_history: false`"
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
