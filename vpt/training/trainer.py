"""LLaMA-Factory's trainer, with refusals of settings that would spoil a run of a VPT model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from vpt.errors import TrainingError
from vpt.model.config import VPTConfig
from vpt.training.template import TEMPLATE_NAME, VPTTemplate
from vpt.training.tested import replace_in_workflow

_STATE, _INDEX = "trainer_state.json", "model.safetensors.index.json"
_OPTIMIZERS = ("optimizer*", "global_step*")  # of torch or FSDP, and of DeepSpeed

logger = logging.getLogger(__name__)


class VPTTrainer(CustomSeq2SeqTrainer):
    """Takes the place of LLaMA-Factory's trainer; with other models it does the same.

    Raises:
        TrainingError: for a template of another model, and for settings under which accelerate
            would cut the pixels of a batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_vpt = isinstance(getattr(self.model, "config", None), VPTConfig)
        if not self._is_vpt:
            return
        if not isinstance(getattr(self.data_collator, "template", None), VPTTemplate):
            raise TrainingError(
                "a VPT model was asked for with the template of another model; "
                f"set `template: {TEMPLATE_NAME}`"
            )
        evaluated = self.eval_dataset
        several = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
        is_streamed = any(
            isinstance(one, IterableDataset) for one in (self.train_dataset, *several)
        )
        dispatch = self.args.accelerator_config.dispatch_batches
        if dispatch or (dispatch is None and is_streamed):
            raise TrainingError(
                "accelerate would cut the pixels of a batch as if each image had one row of them; "
                "set `accelerator_config: {dispatch_batches: false}`, as streaming needs"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kw: Any) -> Any:
        """Train, from the last complete checkpoint where LLaMA-Factory took the last one.

        Raises:
            TrainingError: if the run was told to resume from another one that is incomplete.
        """
        if self._is_vpt and resume_from_checkpoint:
            resume_from_checkpoint = self._complete(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kw)

    def _complete(self, given: str | bool) -> str | None:
        """The checkpoint to resume from; ``None`` where none in the output folder is complete."""
        output = Path(self.args.output_dir)
        last = get_last_checkpoint(str(output)) if output.is_dir() else None
        with_optimizer = not self.args.save_only_model
        if given is not True and given != last:
            if problem := find_lack(Path(str(given)), with_optimizer=with_optimizer):
                raise TrainingError(f"cannot resume from {given}: {problem}; choose another one")
            return str(given)
        found = sorted(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True)
        for checkpoint in found:
            problem = find_lack(checkpoint, with_optimizer=with_optimizer)
            if not problem:
                logger.warning("resuming from %s", checkpoint)
                return str(checkpoint)
            logger.warning("skipping %s, which is incomplete: %s", checkpoint, problem)
        logger.warning("%s has no complete checkpoint; training starts from the first step", output)
        return None


def find_lack(checkpoint: Path, *, with_optimizer: bool = True) -> str:
    """Find what a checkpoint lacks, for example because the run was killed while it was written.

    The trainer writes weights, optimizer and its own state in this order.

    Args:
        checkpoint: folder.
        with_optimizer: whether it has to hold the state of an optimizer.

    Returns:
        What is missing or cut off; empty if the checkpoint is complete.
    """
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        files = {file.name for file in checkpoint.glob("*.safetensors")}
        if (index := checkpoint / _INDEX).is_file():
            files |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(files):
            with safe_open(checkpoint / name, "pt"):
                pass
    except FileNotFoundError as exc:
        return f"there is no {Path(exc.filename or str(exc)).name}"
    except (OSError, ValueError, KeyError, SafetensorError) as exc:
        return f"a file is cut off or damaged ({exc})"
    if with_optimizer and not any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZERS):
        return "there is no state of the optimizer"
    return ""


def install_trainer() -> None:
    """Make LLaMA-Factory's fine-tuning use :class:`VPTTrainer`; harmless when done twice.

    Raises:
        TrainingError: if it does not use its own trainer as the tested version does.
    """
    replace_in_workflow(
        "CustomSeq2SeqTrainer", CustomSeq2SeqTrainer, VPTTrainer, lambda one: one is VPTTrainer
    )


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
