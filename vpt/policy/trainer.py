"""Policy training (GRPO, arXiv 2402.03300) on the engine: sample, reward, update.

A step is a function of the weights, the optimizer and its number, so a resumed run is the run that
was not stopped. Of several processes each answers its share of the questions, and gradients are
added up: N processes are one with N times the answers of a step. Updates are on-policy: each answer
is used once, so no ratio has to be clipped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from vpt.errors import CheckpointError, DataError, NonFiniteError, PromptError
from vpt.evaluation.samples import BadRow, ImageRoots, Sample
from vpt.evaluation.splits import Split, find_split, read_split
from vpt.files import write_atomic
from vpt.inference.engine import Engine
from vpt.inference.features import FeatureCache
from vpt.inference.prefixes import DEFAULT_PREFIX_BYTES, PrefixStore
from vpt.model.modeling import load_model
from vpt.model.processing import VPTProcessor
from vpt.policy.evaluation import BLIND, behaviour, evaluate, write_gallery
from vpt.policy.rewards import Outcome, group_advantages, reward_parts, score_of
from vpt.policy.rollouts import Rollout, RolloutEncoder, run_rollouts, sampled_log_probs
from vpt.policy.settings import MAY_CHANGE, PolicySettings
from vpt.runtime import Runtime
from vpt.training.processes import Processes

STATE, LOG, PREFIX = "policy_state.pt", "trainer_log.jsonl", "checkpoint-"

logger = logging.getLogger(__name__)


class PolicyTrainer:
    """A model in training, from its start or its last checkpoint.

    Attributes:
        step: steps done.
    """

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings
        self.processes = Processes(use_cpu=settings.use_cpu)
        self.split, self._train = _read_samples(settings.train_split, settings)
        self._eval: list[Sample] = []
        if settings.eval_split is not None:
            _, self._eval = _read_samples(settings.eval_split, settings)
            self._eval = self._eval[: settings.max_eval_samples]
        self.score = settings.score or self.split.score
        self.output = settings.output_dir
        self.step = 0
        checkpoint = last_checkpoint(self.output)
        self._load(checkpoint)
        if checkpoint is not None:
            self._load_state(checkpoint)
        self.processes.wait()  # until all have read the checkpoint
        self._log = None
        if self.processes.is_main:
            self._log = _Log(self.output, self.step, settings.report_to)

    def _load(self, checkpoint: Path | None) -> None:
        settings = self.settings
        is_lora = settings.finetuning_type == "lora"  # its checkpoints hold the adapters alone
        is_start = is_lora or checkpoint is None
        source = settings.model_name_or_path if is_start else str(checkpoint)
        device = "cpu" if settings.use_cpu else None
        if device is None and torch.cuda.is_available() and self.processes.size > 1:
            device = f"cuda:{torch.cuda.current_device()}"
        self.model = load_model(source, device=device, dtype="float32")
        self.model.config.intended_inputs = None  # as after any training
        self.processor = VPTProcessor.from_pretrained(str(source))
        self._adapted = adapt(self.model, settings, checkpoint) if is_lora else None
        self._runtime = Runtime(self.model, self.processor, name=source, detector=settings.detector)
        self._engine = Engine(self.model, self._runtime.encoders, settings.num_sequences)
        self._encoder = RolloutEncoder(self.model.config, self.processor)
        self._reference = None
        if settings.beta:
            start = settings.model_name_or_path
            self._reference = load_model(start, device=device, dtype="float32")
            self._reference.requires_grad_(False)
        if self._adapted is None:
            _set_trainable(self.model, settings.freeze_multi_modal_projector)
        trained = [one for one in self.model.parameters() if one.requires_grad]
        betas = settings.adam_beta1, settings.adam_beta2
        self._optimizer = torch.optim.AdamW(
            trained, settings.learning_rate, betas, weight_decay=settings.weight_decay
        )
        self._scheduler = get_scheduler(
            settings.lr_scheduler_type, self._optimizer, settings.warmup_steps, settings.max_steps
        )

    def run(self) -> Iterator[dict[str, Any]]:
        """Train to the end; yields the figures of each step and each evaluation."""
        settings = self.settings
        if self.step == 0:
            yield from self._evaluate()
        while self.step < settings.max_steps:
            figures = self._train_step()
            is_last = self.step == settings.max_steps
            if self.step % settings.logging_steps == 0 or is_last:
                self._write("train", figures)
                yield {"step": self.step, **figures}
            if self.step % settings.eval_steps == 0 or is_last:
                yield from self._evaluate()
            if self.step % settings.save_steps == 0 or is_last:
                self._save_checkpoint()
        if self.processes.is_main:
            self._save_model(self.output)

    def _save_model(self, folder: Path) -> None:
        if self._adapted is None:
            self._runtime.save_pretrained(folder)
        else:
            self._adapted.save_pretrained(folder)

    def _write(self, kind: str, figures: Mapping[str, Any]) -> None:
        if self._log is not None:
            self._log.write(self.step, kind, figures)

    # One step

    def _train_step(self) -> dict[str, float]:
        started = time.perf_counter()
        outcomes, rollouts = self._sample()
        names = list(self.settings.rewards)
        parts = [reward_parts(one, names) for one in outcomes]
        rewards = torch.tensor(
            [sum(self.settings.rewards[name] * part[name] for name in names) for part in parts]
        )
        if not rewards.isfinite().all():
            raise NonFiniteError(
                f"a reward of step {self.step + 1} is not finite; check the weights of `rewards`"
            )
        if self.settings.shuffle_rewards:
            generator = torch.Generator().manual_seed(self._seed(self.step, 0))
            rewards = rewards[torch.randperm(len(rewards), generator=generator)]
        shape = self.settings.num_questions, self.settings.num_generations
        counted = torch.tensor([not one.is_cut for one in outcomes])
        advantages = group_advantages(
            rewards.view(shape), counted.view(shape), scale=self.settings.scale_rewards
        ).flatten()
        sampled_s = time.perf_counter() - started
        figures = self._update(rollouts, advantages, counted)
        self.step += 1
        informative = (advantages.view(shape) != 0).any(-1).float().mean().item()
        own = {
            "reward": rewards.mean().item(),
            **{f"reward_{name}": fmean(part[name] for part in parts) for name in names},
            **behaviour(outcomes),
            "informative_groups": informative,
            **figures,
            "sampling_s": sampled_s,
            "step_s": time.perf_counter() - started,
        }
        return self.processes.means(own, largest=("log_prob_gap", "sampling_s", "step_s"))

    def _sample(self) -> tuple[list[Outcome], list[Rollout]]:
        """Answers to the questions of a step, those to one question together."""
        settings = self.settings
        indices = self._indices()
        samples = [self._sample_at(i) for i in indices]
        num_before = self.processes.rank * len(indices) * settings.num_generations
        options = [
            {
                "temperature": settings.temperature,
                "seed": self._seed(self.step, num_before + number + 1),
            }
            for number in range(len(samples) * settings.num_generations)
        ]
        repeated = [one for one in samples for _ in range(settings.num_generations)]
        blind = samples if settings.asks_blind else []
        rollouts = self._rollouts([*repeated, *blind], [*options, *(BLIND for _ in blind)])
        num = len(repeated)
        scores = [
            score_of(self.score, rollout.trace, sample)
            for rollout, sample in zip(rollouts[num:], blind, strict=True)
        ]
        blind_scores: list[float | None] = [None] * num
        if scores:
            blind_scores = [one for one in scores for _ in range(settings.num_generations)]
        outcomes = [
            Outcome(sample, rollout.trace, score_of(self.score, rollout.trace, sample), without)
            for sample, rollout, without in zip(repeated, rollouts[:num], blind_scores, strict=True)
        ]
        return outcomes, rollouts[:num]

    def _update(
        self, rollouts: Sequence[Rollout], advantages: Tensor, counted: Tensor
    ) -> dict[str, float]:
        """One step of the optimizer; each sampled token has the same weight."""
        settings = self.settings
        triples = zip(rollouts, advantages.tolist(), counted.tolist(), strict=True)
        kept = [(one, advantage) for one, advantage, counts in triples if counts]
        num_tokens = int(self.processes.total(sum(len(one.sampled) for one, _ in kept)))
        if self._reference is None:  # an advantage of 0 has no gradient
            kept = [(one, advantage) for one, advantage in kept if advantage]
        kept.sort(key=lambda pair: pair[0].trace.counts.generated_tokens)  # little is padding
        sums: dict[str, float] = dict.fromkeys(("entropy", "kl", "read"), 0.0)
        gap, size = 0.0, settings.per_device_train_batch_size
        for start in range(0, len(kept), size):
            batch, values = zip(*kept[start : start + size], strict=True)
            weights = torch.tensor(
                [value for one, value in zip(batch, values, strict=True) for _ in one.sampled]
            )
            found, entropy, kl = self._log_probs(batch)
            loss = -(weights.to(found) * found).sum() + settings.beta * kl.sum()
            (loss / num_tokens).backward()
            own = torch.tensor([token.log_prob for one in batch for token in one.sampled])
            gap = max(gap, (found.detach().cpu() - own).abs().max().item())
            sums["entropy"] += entropy.sum().item()
            sums["kl"] += kl.sum().item()
            sums["read"] += len(found)
        self.processes.sum_gradients(p for p in self.model.parameters() if p.requires_grad)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), settings.max_grad_norm
        ).item()
        if not np.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of step {self.step + 1} is {norm}; lower learning_rate, or set "
                "`bf16: false`"
            )
        rate = self._scheduler.get_last_lr()[0]
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._forget()
        num_read = max(sums["read"], 1)
        figures = {"entropy": sums["entropy"] / num_read, "grad_norm": norm, "learning_rate": rate}
        if self._reference is not None:
            figures["kl"] = sums["kl"] / num_read
        return {**figures, "sampled_tokens": num_tokens, "log_prob_gap": gap}

    def _log_probs(self, batch: Sequence[Rollout]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of sampled tokens, entropies, and divergences from the start."""
        inputs, rules = self._encoder.batch(batch)
        temperature = self.settings.temperature
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.settings.bf16):
            found, entropy = sampled_log_probs(self.model, inputs, rules, temperature)
            if self._reference is None:
                return found, entropy, found.new_zeros(1)
            with torch.no_grad():
                start, _ = sampled_log_probs(self._reference, inputs, rules, temperature)
        # The estimator of http://joschu.net/blog/kl-approx.html that is unbiased and positive.
        return found, entropy, torch.exp(start - found) - (start - found) - 1

    def _forget(self) -> None:
        """Drop what was computed with other weights, or in other batches than a resumed run."""
        self._engine.prefixes = PrefixStore(DEFAULT_PREFIX_BYTES)
        self._runtime.encoders.cache = FeatureCache()

    # Questions

    def _indices(self) -> range:
        """Positions of this process's questions in this step."""
        num = self.settings.num_questions
        start = (self.step * self.processes.size + self.processes.rank) * num
        return range(start, start + num)

    def _sample_at(self, position: int) -> Sample:
        """The sample at a position in an endless sequence of epochs, each shuffled by itself."""
        epoch, index = divmod(position, len(self._train))
        order = np.random.default_rng([self.settings.seed, 1, epoch]).permutation(len(self._train))
        return self._train[order[index]]

    def _seed(self, step: int, number: int) -> int:
        return int(np.random.default_rng([self.settings.seed, 2, step, number]).integers(2**63))

    def _rollouts(
        self, samples: Sequence[Sample], options: Sequence[Mapping[str, Any]]
    ) -> list[Rollout]:
        settings = self.settings
        opened = {
            one.id: self._runtime.load_images([ref.open() for ref in one.images]) for one in samples
        }
        requests = [
            self._runtime.request(
                opened[sample.id],
                sample.question,
                max_calls=settings.max_calls,
                max_new_tokens=settings.max_new_tokens or self.split.max_new_tokens,
                **chosen,
            )
            for sample, chosen in zip(samples, options, strict=True)
        ]
        return run_rollouts(self._engine, [self._runtime.take(one) for one in requests])

    # Evaluation

    def ask(self, samples: Sequence[Sample], options: Mapping[str, Any]) -> list[Outcome]:
        """Answer samples under options of a request, some at a time, each process its share."""
        outcomes = []
        size = 2 * self.settings.num_sequences
        rank, num = self.processes.rank, self.processes.size
        share = samples[rank * len(samples) // num : (rank + 1) * len(samples) // num]
        for start in range(0, len(share), size):
            some = share[start : start + size]
            for sample, rollout in zip(
                some, self._rollouts(some, [options] * len(some)), strict=True
            ):
                score = score_of(self.score, rollout.trace, sample)
                outcomes.append(Outcome(sample, rollout.trace, score))
        return self.processes.gather(outcomes)

    def _evaluate(self) -> Iterator[dict[str, Any]]:
        if not self._eval:
            return
        figures, outcomes = evaluate(self.ask, self._eval)
        self._forget()
        self._write("eval", figures)
        if self.settings.num_gallery and self.processes.is_main:
            file = self.output / "gallery" / f"step-{self.step}.html"
            write_gallery(outcomes[: self.settings.num_gallery], file, f"Step {self.step}")
        yield {"step": self.step, "eval": figures}

    # Checkpoints

    def _save_checkpoint(self) -> None:
        """Write a checkpoint, whole or not at all, and remove old ones."""
        if not self.processes.is_main:
            return
        target = self.output / f"{PREFIX}{self.step}"
        draft = self.output / f".{target.name}.part"
        for stale in (draft, target):
            shutil.rmtree(stale, ignore_errors=True)
        self._save_model(draft)
        state = {
            "step": self.step,
            "num_processes": self.processes.size,
            "settings": self.settings.model_dump_json(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
        }
        torch.save(state, draft / STATE)
        draft.rename(target)
        for old in _checkpoints(self.output)[: -self.settings.save_total_limit]:
            shutil.rmtree(old)

    def _load_state(self, checkpoint: Path) -> None:
        try:
            state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        except Exception as exc:
            raise CheckpointError(
                f"cannot read {checkpoint / STATE} ({exc}); delete {checkpoint} to resume from "
                "the checkpoint before it"
            ) from exc
        _check_same_run(json.loads(state["settings"]), self.settings, self.output)
        if (num := state.get("num_processes", 1)) != self.processes.size:
            raise PromptError(
                f"{self.output} holds a run of {num} processes, not {self.processes.size}; resume "
                "it with as many, or choose another output_dir"
            )
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]
        logger.info("resumed from %s", checkpoint)


class _Log:
    """Figures as JSON lines, and for TensorBoard; a resumed run replaces those after its step."""

    def __init__(self, folder: Path, step: int, report_to: str) -> None:
        self._file = folder / LOG
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise PromptError(f"output_dir: cannot make {folder}: {exc.strerror}") from exc
        kept = []
        if self._file.exists():
            lines = self._file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if step and json.loads(line)["step"] <= step]
        write_atomic("".join(f"{line}\n" for line in kept), self._file)
        self._writer: Any = None
        if report_to == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as exc:
                raise PromptError(
                    "report_to: tensorboard needs `pip install tensorboard`; or set it to none"
                ) from exc
            self._writer = SummaryWriter(str(folder / "runs"), purge_step=step + 1)

    def write(self, step: int, kind: str, figures: Mapping[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        if self._writer is None:
            return
        for name, value in figures.items():
            number = value["mean"] if isinstance(value, Mapping) else value
            self._writer.add_scalar(f"{kind}/{name}", number, step)
        self._writer.flush()


def last_checkpoint(output: Path) -> Path | None:
    """The last checkpoint of a run; each is whole, for it was renamed when it was."""
    found = _checkpoints(output)
    return found[-1] if found else None


def _checkpoints(output: Path) -> list[Path]:
    found = [one for one in output.glob(f"{PREFIX}*") if one.name[len(PREFIX) :].isdecimal()]
    return sorted(found, key=lambda one: int(one.name[len(PREFIX) :]))


def _check_same_run(found: Mapping[str, Any], settings: PolicySettings, folder: Path) -> None:
    may_change = set(MAY_CHANGE)
    if settings.lr_scheduler_type == "constant":
        may_change.add("max_steps")
    before = PolicySettings.model_validate(found).model_dump(mode="json")  # with new defaults
    for name, value in settings.model_dump(mode="json").items():
        if name not in may_change and before[name] != value:
            raise PromptError(
                f"{folder} holds a run with {name} {before[name]}, not {value}; repeat its "
                "settings to resume it, or choose another output_dir"
            )


def _set_trainable(model: Any, freeze_projectors: bool) -> None:
    """Freeze all but the language model, and the projectors of the branches if wanted."""
    parts = ("language_model", "lm_head") + (() if freeze_projectors else ("projectors",))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name.split(".") for part in parts))


def adapt(model: Any, settings: PolicySettings, checkpoint: Path | None) -> Any:
    """Put LoRA adapters into the language model, which stays the same object; returns peft's view.

    Raises:
        PromptError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as exc:
        raise PromptError("finetuning_type: lora needs `pip install peft`") from exc
    if checkpoint is not None:
        return PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        target_modules=r".*language_model.*\.[a-z]+_proj",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return get_peft_model(model, config)


def _read_samples(name: str, settings: PolicySettings) -> tuple[Split, list[Sample]]:
    """A split, and its samples with their prompts for questions."""
    split = find_split(name, settings.data_dir)
    samples: list[Sample] = []
    for one in read_split(split, settings.data_dir, ImageRoots.parse(settings.images)):
        if isinstance(one, BadRow):
            raise DataError(f"{name}: {one.problem}")
        samples.append(dataclasses.replace(one, question=split.prompt(one)))
    if not samples:
        raise DataError(f"{name} has no questions")
    return split, samples
