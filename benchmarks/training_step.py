"""What a training step costs, measured: random weights, no downloads.

    python benchmarks/training_step.py --size tiny small --json out.json

A step is forward and backward; an optimizer would cost all the same. Contestants have the same
weights and rows, and take turns after one warm-up forward each:

- ``ours``: the training forward of this project;
- ``ours, half masked``: the question hidden in half of the rows that have a picture re-encoded;
- ``two passes``: the released forward, which runs the LLM twice (``two_pass_step.py``); loss and
  gradients must be those of ours, those of the masked rows too;
- ``sft``: stock Qwen2-VL, one pass over streams of the same tokens, the same of them trained, in
  which re-encoded pictures stand like any others and nothing steers them.

Encoders are left out on all sides: pictures are features from the start, so that a share which is
equal for all does not flatter the ratios. Projectors, whose cost only calls have, are in. All but
the encoders is trained. With gradient checkpointing (not reentrant) the LLM's layers are computed
again in the backward pass.

Tables give medians and, in brackets, the least and the greatest; ratios are taken within a turn.
Goals are judged by CPU time of the process on a CPU, where other jobs disturb wall time, and by
wall time on a GPU. Sizes ``tiny`` and ``small`` are for a CPU: one and 25 minutes on one thread.
``2b`` and ``7b`` are for a GPU, and the authors, who had none, have not run them.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peak_memory import peak_memory
from random_models import SIZES, build, plain_model
from reporting import announce, save
from single_pass_tables import print_table, spread
from torch import Tensor
from training_rows import BATCHES, Batch, encoded_before, make_batch
from two_pass_step import two_pass_loss

from vpt.model.modeling import scatter_features

KINDS = ("wall", "cpu")
GOALS = {"ours": 1.15, "ours, half masked": 1.5}  # times sft, at most
CHECKPOINTED = ("clip, equal rows", "mixed")
CHECKED = ("k_proj.weight", "down_proj.weight", "linear_condition.weight", "linear_feature.weight")
TOLERANCES = {"float32": (1e-4, 1e-2), "bfloat16": (2e-2, 0.5)}  # of the loss, of gradients
"""Against two passes, relative. Random weights make noise large; the tests compare in float64."""


@dataclass(frozen=True)
class Bench:
    """One batch, the models that learn from it, and how they are measured."""

    model: Any
    plain: Any
    batch: Batch
    dtype: str
    repeats: int

    def losses(self) -> dict[str, Callable[[], Tensor]]:
        """Forward of each contestant; those with masks only where there is something to mask."""
        with_masks = {"ours, half masked": functools.partial(self._ours, para_mask_id=1)}
        return {
            "ours": self._ours,
            **(with_masks if self.batch.looks else {}),
            "two passes": self._two_passes,
            "sft": self._sft,
        }

    def _ours(self, para_mask_id: int = 0) -> Tensor:
        self.model.config.para_mask_id = para_mask_id
        torch.manual_seed(self.batch.seed)
        with encoded_before(self.model, self.batch):
            return self.model(**self.batch.inputs).loss

    def _two_passes(self, rows_without_question: Sequence[int] = ()) -> Tensor:
        batch = self.batch
        return two_pass_loss(
            self.model, batch.inputs, batch.image_embeds, batch.looks, rows_without_question
        )

    def _sft(self) -> Tensor:
        inputs, config = self.batch.inputs, self.model.config
        input_ids = inputs["input_ids"]
        embeds = self.plain.get_input_embeddings()(input_ids)
        embeds = scatter_features(
            embeds, input_ids == config.image_token_id, self.batch.image_embeds
        )
        for branch, values in self.batch.projected.items():
            embeds = scatter_features(embeds, input_ids == config.pad_id(branch), values)
        given = {key: inputs[key] for key in ("attention_mask", "position_ids", "labels")}
        return self.plain(inputs_embeds=embeds, use_cache=False, **given).loss

    def step(self, loss: Callable[[], Tensor]) -> None:
        """Forward and backward, from no gradients to gradients of all parameters."""
        for model in (self.model, self.plain):
            model.zero_grad(set_to_none=True)
        loss().backward()

    def timed_step(self, loss: Callable[[], Tensor]) -> tuple[float, float]:
        """Wall and CPU time of a step in milliseconds."""
        start = self._now()
        self.step(loss)
        return tuple(e - s for s, e in zip(start, self._now(), strict=True))  # type: ignore[return-value]

    def _now(self) -> tuple[float, float]:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter() * 1e3, time.process_time() * 1e3

    def peak_memory(self, loss: Callable[[], Tensor]) -> int | None:
        """Bytes a step takes beside the weights; gradients of weights included."""
        for model in (self.model, self.plain):
            model.zero_grad(set_to_none=True)
        if self.model.device.type == "cpu":
            return peak_memory(lambda: self.step(loss))
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        self.step(loss)
        return torch.cuda.max_memory_allocated() - held

    def llm_tokens(self, loss: Callable[[], Tensor]) -> int:
        """Tokens the LLM reads in a forward, all passes together, padding included."""
        counts: list[int] = []
        handles = [
            model.model.language_model.layers[0].input_layernorm.register_forward_pre_hook(
                lambda module, args: counts.append(args[0].shape[0] * args[0].shape[1])
            )
            for model in (self.model, self.plain)
        ]
        with torch.no_grad():
            loss()
        for handle in handles:
            handle.remove()
        return sum(counts)

    def check_equal(self) -> dict[str, dict[str, float]]:
        """Compare ours with two passes, with and without masks; a difference ends the benchmark."""
        pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "ours": (self._ours, self._two_passes)
        }
        if self.batch.looks:
            rows = self.batch.rows_without_question
            masked = functools.partial(self._two_passes, rows)
            pairs["ours, half masked"] = (self.losses()["ours, half masked"], masked)
        for_loss, for_gradients = TOLERANCES[self.dtype]
        found = {}
        for name, (ours, theirs) in pairs.items():
            (loss, gradients), (other_loss, others) = map(self._learn, (ours, theirs))
            worst = max(float((gradients[k] - others[k]).norm() / others[k].norm()) for k in others)
            off = abs(loss - other_loss) / other_loss
            found[name] = {"loss": loss, "loss_off": off, "gradients_off": worst}
            if off > for_loss or worst > for_gradients or gradients.keys() != others.keys():
                raise SystemExit(f"{name} differs from two passes: {found[name]}")
        return found

    def _learn(self, loss: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
        """Loss, and the gradients that are compared."""
        self.model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        gradients = {
            name: parameter.grad.float()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and name.endswith(CHECKED)
        }
        self.model.zero_grad(set_to_none=True)
        return value.item(), gradients


def measure_batch(bench: Bench) -> dict[str, Any]:
    """All contestants on one batch."""
    equal = bench.check_equal()
    losses = bench.losses()
    facts = {
        name: {"llm_tokens": bench.llm_tokens(loss), "peak_memory_bytes": bench.peak_memory(loss)}
        for name, loss in losses.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    for _ in range(bench.repeats):
        for name, loss in losses.items():
            times[name].append(bench.timed_step(loss))
    return {
        "rows": len(bench.batch.inputs["input_ids"]),
        "tokens": bench.batch.num_tokens,
        "padded_tokens": bench.batch.inputs["input_ids"].numel(),
        "trained_tokens": bench.batch.num_trained,
        "against_two_passes": equal,
        "contestants": {
            name: {**facts[name], "ms": {k: [t[i] for t in ts] for i, k in enumerate(KINDS)}}
            for name, ts in times.items()
        },
        "times_sft": {
            name: {
                kind: [t[i] / s[i] for t, s in zip(ts, times["sft"], strict=True)]
                for i, kind in enumerate(KINDS)
            }
            for name, ts in times.items()
        },
    }


def print_batch(name: str, section: dict[str, Any]) -> None:
    """Table of one batch."""
    off = max(found["loss_off"] for found in section["against_two_passes"].values())
    print(
        f"{name}: {section['rows']} rows, {section['tokens']} tokens ({section['padded_tokens']} "
        f"with padding), {section['trained_tokens']} trained; loss off two passes by {off:.0e}"
    )
    rows = []
    for contestant, facts in section["contestants"].items():
        peak = facts["peak_memory_bytes"]
        times_sft = section["times_sft"][contestant]
        row = [contestant, *(spread(facts["ms"][kind], 0) for kind in KINDS)]
        row += [spread(times_sft[kind], 2) for kind in KINDS]
        memory = "n/a" if peak is None else f"{peak / 1e6:.0f} MB"
        rows.append([*row, str(facts["llm_tokens"]), memory])
    header = ["", "step, ms, wall", "cpu", "times sft, wall", "cpu", "LLM tokens", "peak memory"]
    print_table(header, rows)


def judge(batches: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Compare what was measured with the goals, by wall or CPU time."""
    goals = []
    for name, section in batches.items():
        for contestant, limit in GOALS.items():
            if contestant in section["times_sft"]:
                ratio = statistics.median(section["times_sft"][contestant][kind])
                goal = f"{name}: {contestant} / sft <= {limit}"
                goals.append({"goal": goal, "ratio": ratio, "met": ratio <= limit})
    return goals


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one size, printed as they come."""
    device = torch.device(args.device)
    size = SIZES[name]
    model, processor = build(size, device, getattr(torch, args.dtype))
    model.config.para_mask_ratio = 0.5
    for part in (model.model.visual, model.branches):
        part.requires_grad_(False)
    plain = plain_model(model)
    plain.model.visual.requires_grad_(False)
    num = sum(p.numel() for p in model.model.language_model.parameters())
    print(f"== {name}: LLM of {num / 1e6:.2f} million parameters; picture {size.image_wh} px ==\n")
    result: dict[str, Any] = {"llm_parameters": num, "batches": {}}
    for batch_name in args.batches:
        batch = make_batch(batch_name, model, processor, size.image_wh)
        bench = Bench(model.train(), plain.train(), batch, args.dtype, args.repeats)
        for checkpointed in (False, True) if batch_name in CHECKPOINTED else (False,):
            for each in (model, plain):
                getattr(each, f"gradient_checkpointing_{'en' if checkpointed else 'dis'}able")()
            label = batch_name + (", checkpointed" if checkpointed else "")
            result["batches"][label] = measure_batch(bench)
            print_batch(label, result["batches"][label])
        model.eval()
    kind = "cpu" if device.type == "cpu" else "wall"
    result["judged_by"], result["goals"] = kind, judge(result["batches"], kind)
    rows = [
        [g["goal"], f"{g['ratio']:.2f}", "met" if g["met"] else "not met"] for g in result["goals"]
    ]
    print_table([f"Goals, by {kind} time", "measured", ""], rows)
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what ``--json`` writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything here, raw repeats included")
    args = parser.parse_args(argv)
    if min(args.repeats, args.threads) < 1:
        parser.error("--repeats and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    about = announce(args)
    sizes = {name: measure(name, args) for name in args.size}
    report = {**about, "sizes": sizes}
    save(report, args.json)
    return report


if __name__ == "__main__":
    main()
