"""Settings of policy training: a YAML file, under the names of Hugging Face's trainers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpt.errors import DataError, PromptError
from vpt.evaluation.scores.table import SCORES
from vpt.inference.request import Request
from vpt.policy.rewards import REWARDS

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]

MAY_CHANGE = frozenset(("logging_steps", "save_steps", "save_total_limit", "report_to"))
"""Settings in which a resumed run may differ; ``max_steps`` as well, at a constant rate."""


class PolicySettings(BaseModel):
    """Settings of a run.

    Attributes:
        train_split: name of a split, or a file of questions as for ``vpt eval``; ``eval_split``
            likewise.
        data_dir: folder of the splits; ``images`` as ``--images`` of ``vpt eval``.
        score: of the evaluation, by name; by default that of the split.
        rewards: name of a reward -> weight.
        per_device_train_batch_size: streams that the training forward reads at once.
        gradient_accumulation_steps: such batches per step.
        num_generations: answers to each question.
        num_sequences: streams that are decoded at once.
        detector: for models that call for phrases: a folder, hub id or file, as for ``vpt.load``.
        beta: weight of the divergence from the start.
        scale_rewards: divide advantages by the standard deviation of their group.
        shuffle_rewards: a control: give each answer the reward of another one.
        finetuning_type: ``"full"``, or ``"lora"``: adapters of all linear layers of the language
            model, of rank ``lora_rank``, scaled by ``lora_alpha / lora_rank`` (by default 2).
        freeze_multi_modal_projector: train the language model only, without the projectors of the
            branches. Encoders are never trained.
        bf16: run the training forward under bfloat16 autocast; the engine uses float32.
        num_gallery: answers that are drawn at each evaluation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model_name_or_path: str
    output_dir: Path
    train_split: str
    eval_split: str | None = None
    data_dir: Path = Path("data")
    images: tuple[str, ...] = ()
    score: Literal[tuple(SCORES)] | None = None  # type: ignore[valid-type]
    rewards: Annotated[dict[str, float], Field(min_length=1)]

    num_generations: Annotated[int, Field(ge=2)] = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_new_tokens: Count | None = None
    max_calls: Annotated[int, Field(ge=0)] = Request.max_calls
    num_sequences: Count = 32
    detector: str | None = None
    beta: Annotated[float, Field(ge=0)] = 0.0
    scale_rewards: bool = True
    shuffle_rewards: bool = False

    max_steps: Count
    per_device_train_batch_size: Count = 16
    gradient_accumulation_steps: Count = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    finetuning_type: Literal["full", "lora"] = "full"
    lora_rank: Count = 8
    lora_alpha: Count | None = None
    freeze_multi_modal_projector: bool = True
    bf16: bool = False
    use_cpu: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    logging_steps: Count = 1
    save_steps: Count = 50
    save_total_limit: Count = 2
    eval_steps: Count = 50
    max_eval_samples: Count = 400
    num_gallery: Annotated[int, Field(ge=0)] = 12
    report_to: Literal["none", "tensorboard"] = "none"

    @property
    def num_questions(self) -> int:
        """Questions of a step."""
        num_answers = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return num_answers // self.num_generations

    @property
    def asks_blind(self) -> bool:
        """Whether each question is also asked with calls forbidden."""
        return "look_bonus" in self.rewards

    def check(self) -> None:
        """Check what concerns several settings, or names; raise ``PromptError``."""
        for name in self.rewards:
            if name not in REWARDS:
                raise PromptError(f"unknown reward {name!r}; available: {', '.join(REWARDS)}")
        if self.output_dir.resolve() == Path(self.model_name_or_path).resolve():
            raise PromptError("output_dir is the folder of the model; choose another one")
        if self.finetuning_type == "lora" and not self.freeze_multi_modal_projector:
            raise PromptError("freeze_multi_modal_projector: false needs finetuning_type: full")
        num_answers = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if num_answers % self.num_generations:
            raise PromptError(
                f"a step has {num_answers} answers (per_device_train_batch_size x "
                "gradient_accumulation_steps), which is not a multiple of "
                f"num_generations={self.num_generations}"
            )


def load_settings(file: Path, overrides: Sequence[str] = ()) -> PolicySettings:
    """Read settings of a YAML file; ``overrides`` are ``key=value``.

    Raises:
        DataError: if the file cannot be read.
        PromptError: for a key that is unknown, missing or given twice, and an impossible value.
    """
    values = _read(file)
    for one in overrides:
        key, equals, text = one.partition("=")
        if not equals:
            raise PromptError(f"expected KEY=VALUE after the file, got {one!r}")
        values[key] = yaml.safe_load(text)
    try:
        settings = PolicySettings.model_validate(values)
    except ValidationError as exc:
        raise PromptError(f"{file}: {_first_problem(exc)}") from exc
    settings.check()
    return settings


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError as exc:
        raise DataError(f"{file} does not exist; check the path") from exc
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise DataError(f"cannot read {file}: {exc}") from exc
    if not isinstance(values, dict):
        raise DataError(f"{file} holds no settings; expected lines of the form `key: value`")
    return values


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the key {repeated[0]!r} is given twice; keep one")
        return super().construct_mapping(node, deep)


def _first_problem(exc: ValidationError) -> str:
    first = exc.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"the key {name!r} is missing"
    if first["type"] == "extra_forbidden":
        known = list(PolicySettings.model_fields)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {name!r}; {hint}available: {', '.join(known)}"
    return f"{name}: {first['msg']}, got {first['input']!r}"
