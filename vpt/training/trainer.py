"""LLaMA-Factory's trainer and metric for VPT models, put in place of the stock ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import IterableDataset
from llamafactory.train.sft import metric, workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from vpt.errors import TrainingError
from vpt.model.config import VPTSettings
from vpt.model.encoding import IGNORE_INDEX
from vpt.protocol.tokens import (
    BRANCH_TOKENS,
    GROUND_END,
    GROUND_START,
    REGION_END,
    REGION_START,
    TURN_END,
    content_value,
    is_content,
    is_coordinate,
)
from vpt.training.dataset import TEMPLATES, VPTPlugin

TESTED = "llamafactory 0.9.5"
"""Named by errors about any other."""

CLASSES = (
    "text",
    "region",
    "coordinate",
    "grounding",
    "reencode",
    "depth",
    "box",
    "turn_end",
    "control",
)
"""Kinds of tokens. Control tokens are forced, so no accuracy is reported of them."""

_STATE, _INDEX = "trainer_state.json", "model.safetensors.index.json"
_OPTIMIZERS = ("optimizer*", "global_step*")  # of torch or FSDP, and of DeepSpeed

logger = logging.getLogger(__name__)


class VPTTrainer(CustomSeq2SeqTrainer):
    """Replaces LLaMA-Factory's trainer; with other models it behaves the same.

    Refuses the template of another model, and settings under which accelerate would cut the pixels
    of a batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_vpt = isinstance(getattr(self.model, "config", None), VPTSettings)
        if not self._is_vpt:
            return
        template = getattr(self.data_collator, "template", None)
        if not isinstance(getattr(template, "mm_plugin", None), VPTPlugin):
            raise TrainingError(
                "a VPT model cannot be trained with the template of another model; "
                f"set `template: {TEMPLATES[0]}`, or {TEMPLATES[1]} for Qwen3-VL"
            )
        evaluated = self.eval_dataset
        several = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
        sets = (self.train_dataset, *several)
        is_streamed = any(isinstance(one, IterableDataset) for one in sets)
        dispatch = self.args.accelerator_config.dispatch_batches
        if dispatch or (dispatch is None and is_streamed):
            raise TrainingError(
                "accelerate would cut the pixels of a batch as if each image had one row of them; "
                "set `accelerator_config: {dispatch_batches: false}`, as streaming needs"
            )
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        own = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        own.trains_in_lockstep = plugin is not None and plugin.zero_stage > 0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kw: Any) -> Any:
        """Train, from the last complete checkpoint where LLaMA-Factory took the last one.

        A trained model is no longer meant for the images of the one that it began as.
        """
        if self._is_vpt:
            self.model.config.intended_inputs = None
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
    """Name what a checkpoint lacks, e.g. because the run was killed while writing; else empty.

    The trainer writes weights, optimizer and its own state in this order.
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


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


class TokenClassAccuracy:
    """Next-token accuracy by kind of token; replaces LLaMA-Factory's ``ComputeAccuracy``.

    Reports ``accuracy``, the mean over rows as LLaMA-Factory does, and for each kind of token that
    the model has ``accuracy_KIND`` over all tokens of the kind, and their number ``num_KIND``. A
    kind that did not occur has no accuracy.

    Args:
        class_of_id: token id -> index in :data:`CLASSES`; ids that are not there are text.
    """

    def __init__(self, class_of_id: Mapping[int, int]) -> None:
        self.class_of_id = np.zeros(max(class_of_id, default=0) + 1, dtype=np.int64)
        for token_id, number in class_of_id.items():
            self.class_of_id[token_id] = number
        self.reported = sorted({CLASSES.index("text"), *class_of_id.values()} - {_CONTROL})
        self._reset()

    def _reset(self) -> None:
        self.rows: list[float] = []
        self.num_right = np.zeros(len(CLASSES), dtype=np.int64)
        self.num_all = np.zeros(len(CLASSES), dtype=np.int64)

    def __call__(
        self, eval_preds: Any, compute_result: bool = True
    ) -> dict[str, float | int] | None:
        """Count a batch; the last one returns the metrics of all and restarts the counting.

        ``eval_preds`` holds ``predictions`` ``[B, S]``, the likeliest next token at each place, and
        ``label_ids`` ``[B, S]``, -100 where ignored.
        """
        predicted = np.asarray(_on_cpu(eval_preds.predictions))[:, :-1]
        labels = np.asarray(_on_cpu(eval_preds.label_ids))[:, 1:]
        for row_predicted, row_labels in zip(predicted, labels, strict=True):
            counted = row_labels != IGNORE_INDEX
            ids = row_labels[counted]
            known = ids < len(self.class_of_id)
            kinds = np.where(known, self.class_of_id[np.where(known, ids, 0)], 0)
            right = (row_predicted[counted] == row_labels[counted])[kinds != _CONTROL]
            kinds = kinds[kinds != _CONTROL]
            if len(kinds):
                self.rows.append(float(right.mean()))
            self.num_all += np.bincount(kinds, minlength=len(CLASSES))
            self.num_right += np.bincount(kinds[right], minlength=len(CLASSES))
        return self._result() if compute_result else None

    def _result(self) -> dict[str, float | int]:
        result: dict[str, float | int] = {}
        if self.rows:
            result["accuracy"] = float(np.mean(self.rows))
        for number in self.reported:
            name = CLASSES[number]
            if self.num_all[number]:
                result[f"accuracy_{name}"] = float(self.num_right[number] / self.num_all[number])
            result[f"num_{name}"] = int(self.num_all[number])
        self._reset()
        return result


_CONTROL = CLASSES.index("control")


def _on_cpu(values: Any) -> Any:
    return values.cpu() if hasattr(values, "cpu") else values


def token_classes(tokenizer: Any) -> dict[int, int]:
    """Index in :data:`CLASSES` of every token of a tokenizer that is not text."""
    names = {TURN_END: "turn_end", REGION_START: "region", REGION_END: "region"}
    names |= {GROUND_START: "grounding", GROUND_END: "grounding"}
    for row in BRANCH_TOKENS.values():
        names |= {row.start: "reencode", row.end: "reencode", row.action: "control"}
    vocabulary = tokenizer.get_vocab()
    names |= {token: "coordinate" for token in vocabulary if is_coordinate(token)}
    for token in filter(is_content, vocabulary):
        names[token] = "depth" if content_value(token, "boxes") is None else "box"
    return {vocabulary[t]: CLASSES.index(name) for t, name in names.items() if t in vocabulary}


def install_trainer() -> None:
    """Make LLaMA-Factory's fine-tuning use :class:`VPTTrainer`; harmless when done twice."""
    _replace_in_workflow("CustomSeq2SeqTrainer", CustomSeq2SeqTrainer, VPTTrainer)


def install_accuracy(tokenizer: Any) -> None:
    """Make ``compute_accuracy: true`` report by kind of token."""
    ours = partial(TokenClassAccuracy, token_classes(tokenizer))
    _replace_in_workflow("ComputeAccuracy", metric.ComputeAccuracy, ours)


def _replace_in_workflow(name: str, stock: object, ours: object) -> None:
    """Replace a name in ``llamafactory.train.sft.workflow``, which has no registry.

    Raise ``TrainingError`` if it is not used as in the tested version, where its value is
    ``stock``, unless ours is there already.
    """
    current = getattr(workflow, name, None)
    is_ours = getattr(current, "func", current) is getattr(ours, "func", ours)  # of a partial
    used = getattr(workflow.run_sft, "__code__", None)
    if used is None or name not in used.co_names or not (current is stock or is_ours):
        raise TrainingError(
            f"llamafactory.train.sft.workflow does not use {name} as expected; this was tested "
            f"with {TESTED}"
        )
    setattr(workflow, name, ours)
