"""The last stage of the embedded model: its language model learns, on features computed once.

Run ``python -m recipes.embedded.language configs/embedded/3-language.yaml``. No encoder is trained
here, so all pictures are encoded before the first step (:mod:`recipes.embedded.bank`); a step then
takes a GPU some 30 milliseconds. The loss is that of the model's own forward. A stopped run goes on
where it last saved. In place of ``python -m``, ``torchrun --standalone --nproc-per-node 2 -m``
divides each batch among processes, such as one per core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface

from recipes.embedded.bank import Bank, Rows, load_bank
from recipes.embedded.settings import read_settings, warm_cosine
from vpt.errors import NonFiniteError, VPTError
from vpt.files import replace_atomically
from vpt.model.modeling import VPTForConditionalGeneration, load_model
from vpt.model.processing import VPTProcessor
from vpt.training.processes import Processes

_ATTENTION = "shared_heads_sdpa"
_PATIENCE = timedelta(hours=6)  # one process encodes all pictures, the others wait
_SORTED = 8  # batches' worth of rows that are sorted by length together

Chosen = NDArray[np.integer[Any]]
"""``[B]`` numbers of the rows of a batch."""


@dataclass(frozen=True)
class Settings:
    """What the YAML says.

    Attributes:
        model: folder to start from.
        output_dir: folder of the trained model.
        phases: from which share of the steps on: the share of the batches of each file of rows.
        steps: of one batch, with rows of one file.
        batch_size: rows.
        learning_rate: at its height.
        restarts: its later heights (arXiv 1608.03983), by the share of the steps from which on it
            rises again.
        warmup_steps: until a height.
        weight_decay: of all that is trained.
        hidden_questions: share of the rows with a call whose question is hidden from the answer,
            so that the control state has to tell it.
        bank: file to keep encoded rows and pictures in, for runs on the same ones.
        num_held_out: last rows of each file, which are not trained on but measured.
        save_steps: between states to go on from, and lines of the log.
        num_workers: processes that read rows and pictures.
        bf16: multiply matrices in bfloat16; with compile, faster on a CPU with AMX.
        compile: compile the layers: minutes before the first step, then faster ones. On a CPU it
            needs a C++ compiler.
        seed: of the order.
    """

    model: str
    output_dir: str
    phases: Mapping[float, Mapping[str, float]]
    steps: int
    batch_size: int = 96
    learning_rate: float = 5e-3
    restarts: Mapping[float, float] = field(default_factory=dict)
    warmup_steps: int = 100
    weight_decay: float = 0.02
    hidden_questions: float = 0.0
    bank: str = ""
    num_held_out: int = 96
    save_steps: int = 500
    num_workers: int = 2
    bf16: bool = False
    compile: bool = False
    seed: int = 1


def batches_of(lengths: NDArray[Any], batch_size: int, seed: Sequence[int]) -> Iterator[Chosen]:
    """Batches without end of rows of similar length; all rows occur about equally often.

    Args:
        lengths: ``[R]`` tokens of each row.
        batch_size: rows of a batch.
        seed: of the order.
    """
    rng = np.random.default_rng(seed)
    waiting = np.empty(0, dtype=np.int64)
    room = _SORTED * batch_size
    while True:
        while len(waiting) < room:
            waiting = np.concatenate([waiting, rng.permutation(len(lengths))])
        taken, waiting = waiting[:room], waiting[room:]
        taken = taken[np.argsort(lengths[taken], kind="stable")]
        for place in rng.permutation(_SORTED):
            yield taken[place * batch_size : (place + 1) * batch_size]


def order_of(
    settings: Settings, lengths: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[str, Chosen]]:
    """File and rows of each step. Every batch has rows of one file.

    So little is padding, and a task whose answer is one token counts as much as one with a hundred.
    """
    rng = np.random.default_rng(settings.seed)
    sources = {
        file: batches_of(
            of_file[: -settings.num_held_out], settings.batch_size, [settings.seed, number]
        )
        for number, (file, of_file) in enumerate(lengths.items())
    }
    for step in range(settings.steps):
        done = step / settings.steps
        shares = settings.phases[max(start for start in settings.phases if start <= done)]
        weights = np.array(list(shares.values()))
        file = list(shares)[int(rng.choice(len(weights), p=weights / weights.sum()))]
        yield file, next(sources[file])


def learning_rate_at(step: int, settings: Settings) -> float:
    """Of a step: it rises and falls along a cosine, once and after each restart."""
    heights = {0.0: settings.learning_rate, **settings.restarts}
    starts = {math.ceil(share * settings.steps): height for share, height in heights.items()}
    begin = max(start for start in starts if start <= step)
    end = min((start for start in starts if start > step), default=settings.steps)
    return starts[begin] * warm_cosine(step - begin, end - begin, settings.warmup_steps)


class Table:
    """The rows of a file on the device, from which batches are gathered."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self.lengths, self.starts = rows.lengths, rows.starts
        self.calls, self.branches = rows.calls, rows.branches
        self.questions = rows.questions
        self._device = device
        self._ids = torch.from_numpy(rows.ids).to(device, torch.int32)
        self._features = torch.from_numpy(rows.features).to(device, torch.int32)
        self._is_target = torch.from_numpy(rows.is_target).to(device)
        self._positions = torch.from_numpy(rows.positions).to(device, torch.int16)

    def gather(self, chosen: Chosen) -> dict[str, Tensor]:
        """``ids``, ``features``, ``is_target`` ``[B, S]`` and ``positions`` ``[3, B, S]``."""
        lengths = self.lengths[chosen]
        width = int(-(-lengths.max() // 16) * 16)
        at = self.starts[chosen][:, None] + np.arange(width)
        is_there = np.arange(width) < lengths[:, None]
        places = torch.from_numpy(np.where(is_there, at, 0)).to(self._device, non_blocking=True)
        there = torch.from_numpy(is_there).to(self._device, non_blocking=True)
        flat = places.flatten()
        return {
            "ids": self._ids[flat].view(places.shape).long(),
            "features": self._features[flat].view(places.shape).long().masked_fill(~there, -1),
            "is_target": self._is_target[flat].view(places.shape) & there,
            "positions": self._positions[:, flat].view(3, *places.shape).long(),
        }


class Reader:
    """The model's forward in training, on features of a bank.

    Args:
        model: whose language model reads; its projectors' conditions are used as they are.
        features: ``[T, D]`` of a bank.
        hidden_questions: as in :class:`Settings`.
        bf16: as in :class:`Settings`.
    """

    def __init__(
        self,
        model: VPTForConditionalGeneration,
        features: Tensor,
        hidden_questions: float = 0.0,
        *,
        bf16: bool = False,
    ) -> None:
        self.model = model
        self.features = features
        self.hidden_questions = hidden_questions
        self._bf16 = bf16
        model.model.language_model.config._attn_implementation = _ATTENTION
        pads = [model.config.pad_id(name) for name in model.config.branches]
        self._pads = torch.tensor(pads, device=features.device)

    def compile(self) -> None:
        """Compile the layers for batches of any width."""
        self._run = torch.compile(self._run, dynamic=True)  # type: ignore[method-assign]

    def loss(
        self, table: Table, chosen: Chosen, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross entropy, what was predicted, and what was right, of all targets.

        Args:
            table: of the rows.
            chosen: their numbers.
            rng: decides which questions are hidden; ``None`` for none.
        """
        batch = table.gather(chosen)
        ids, in_bank = batch["ids"], batch["features"]
        embeds = self.model.get_input_embeddings()(ids)
        seen = self.features[in_bank.clamp(min=0)].to(embeds.dtype)
        embeds = torch.where((in_bank >= 0)[..., None], seen, embeds)
        calls = table.calls[chosen]
        calling = np.flatnonzero(calls >= 0)
        if len(calling) and self.model.config.is_conditioned:
            places = torch.from_numpy(calls[calling]).to(ids.device)
            rows = torch.from_numpy(calling).to(ids.device)
            width = int(calls[calling].max())
            states = self._run(embeds[rows, :width], batch["positions"][:, rows, :width])
            states = states[torch.arange(len(rows), device=ids.device), places - 1]
            embeds = self._condition(embeds, seen, ids, rows, states, table.branches[chosen])
            embeds = self._hide(embeds, table.questions[chosen], calling, rng)
            embeds = embeds.index_put((rows, places), states)
        hidden = self._run(embeds, batch["positions"])
        row, place = batch["is_target"].nonzero(as_tuple=True)
        logits = self.model.lm_head(hidden[row, place - 1])
        right = ids[row, place]
        return F.cross_entropy(logits.float(), right), logits.argmax(-1), right

    def _condition(
        self,
        embeds: Tensor,
        seen: Tensor,
        ids: Tensor,
        rows: Tensor,
        states: Tensor,
        branches: Chosen,
    ) -> Tensor:
        """The embeddings with the features that the calls asked for conditioned by their states."""
        conditions = torch.zeros_like(embeds[:, 0])
        of_row = torch.from_numpy(branches).to(ids.device)[rows]
        for number, name in enumerate(self.model.config.branches):
            project = self.model.projector(name)
            condition = project.linear_condition(project.layernorm_condition(states))
            is_its = (of_row == number)[:, None]
            conditions = conditions.index_add(0, rows, condition * is_its)
        is_pad = torch.isin(ids, self._pads)[..., None]
        scores = (seen * conditions[:, None]).sum(-1, keepdim=True)
        return torch.where(is_pad, seen + scores * conditions[:, None], embeds)

    def _hide(
        self,
        embeds: Tensor,
        questions: Chosen,
        calling: Chosen,
        rng: np.random.Generator | None,
    ) -> Tensor:
        if rng is None or not self.hidden_questions:
            return embeds
        places = np.arange(embeds.shape[1])
        is_hidden = (places >= questions[:, :1]) & (places < questions[:, 1:])
        drawn = np.zeros(len(questions), dtype=bool)
        drawn[calling] = rng.random(len(calling)) < self.hidden_questions
        mask = torch.from_numpy(is_hidden & drawn[:, None]).to(embeds.device)
        return embeds.masked_fill(mask[..., None], 0)

    def _run(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states; padding is on the right, where nothing attends to it."""
        language_model = self.model.model.language_model
        rotary = language_model.rotary_emb(embeds, positions)
        with torch.autocast(embeds.device.type, torch.bfloat16, enabled=self._bf16):
            for layer in language_model.layers:
                embeds = layer(embeds, attention_mask=None, position_embeddings=rotary)
            return cast(Tensor, language_model.norm(embeds)).float()


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention with each key-value head repeated: a GPU then keeps no scores in float32.

    On a CPU it is computed in float32: its gradient takes three times as long in bfloat16.
    """
    groups = module.num_key_value_groups
    key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)


class Muon:
    """Muon as LLaMA-Factory has it (arXiv 2502.16982), matrices of one shape together.

    torch's does one matrix after the other, in bfloat16: on a GPU that is a third of a small
    model's step, and on a CPU without bfloat16 longer than the rest of it.

    Args:
        matrices: what it updates.
        weight_decay: of them.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], weight_decay: float) -> None:
        self.weight_decay = weight_decay
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for one in matrices:
            by_shape.setdefault(one.shape, []).append(one)
        self.groups = list(by_shape.values())
        self.momenta = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update all matrices from their gradients."""
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            weights: list[Tensor] = list(group)
            gradient = torch.stack([cast(Tensor, one.grad) for one in group])
            momentum.mul_(0.95).add_(gradient)
            update = _orthogonalize(gradient.add(momentum, alpha=0.95))
            torch._foreach_mul_(weights, 1 - learning_rate * self.weight_decay)
            rate = learning_rate * 0.2 * math.sqrt(max(group[0].shape))
            torch._foreach_add_(weights, list(update.unbind()), alpha=-rate)


def _orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz steps towards the nearest orthogonal matrices ``[N, height, width]``."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


class Training:
    """A language model in training, with its optimizers.

    Args:
        model: whose language model is trained, and nothing else.
        settings: of the run.
        processes: whose gradients are added up.
    """

    def __init__(
        self, model: VPTForConditionalGeneration, settings: Settings, processes: Processes
    ) -> None:
        model.requires_grad_(False)
        self.parameters = list(model.model.language_model.requires_grad_(True).parameters())
        self.model = model
        self.settings = settings
        self.processes = processes
        embedding = model.get_input_embeddings().weight
        matrices = [one for one in self.parameters if one.ndim == 2 and one is not embedding]
        others = [one for one in self.parameters if one.ndim != 2 or one is embedding]
        self.muon = Muon(matrices, settings.weight_decay)
        self.adam = torch.optim.AdamW(
            others,
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
            fused=embedding.is_cuda,
        )
        self.step = 0

    def update(self, loss: Tensor) -> None:
        """Take a step down the gradient."""
        loss.backward()
        self.processes.sum_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        rate = learning_rate_at(self.step, self.settings)
        self.muon.step(rate)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        for one in self.parameters:
            one.grad = None
        self.step += 1

    def save(self, file: Path) -> None:
        """Save whole or not at all."""
        state = {
            "step": self.step,
            "weights": self.model.model.language_model.state_dict(),
            "muon": self.muon.momenta,
            "adam": self.adam.state_dict(),
        }
        with replace_atomically(file.parent) as draft:
            torch.save(state, draft / file.name)

    def restore(self, file: Path) -> None:
        """Go on from a saved state, if there is one."""
        if not file.exists():
            return
        state = torch.load(file, weights_only=True)
        self.step = int(state["step"])
        self.model.model.language_model.load_state_dict(state["weights"])
        self.muon.momenta = [one.to(self.parameters[0].device) for one in state["muon"]]
        self.adam.load_state_dict(state["adam"])


def train(settings: Settings, device: torch.device) -> None:
    """Train, save the model, and log accuracies on rows that are not trained on.

    Raises:
        VPTError: if several processes have no bank to share, if files have too few rows, or for
            phases or restarts outside of the run.
        NonFiniteError: if a loss is not finite.
    """
    processes = Processes(use_cpu=device.type == "cpu", patience=_PATIENCE)
    if processes.size > 1 and not settings.bank:
        raise VPTError(f"{processes.size} processes need a bank to share; set bank to a file")
    if processes.size > settings.batch_size:
        raise VPTError(
            f"expected a row per process, got {processes.size} processes and "
            f"batch_size={settings.batch_size}"
        )
    _check_shares(settings)
    torch.manual_seed(settings.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = load_model(settings.model, device=str(device), dtype=torch.float32).train()
    files = list(dict.fromkeys(file for phase in settings.phases.values() for file in phase))
    if not processes.is_main:
        processes.wait()  # until the bank is written
    bank = load_bank(model, settings.model, files, settings.bank, settings.num_workers)
    if processes.is_main:
        processes.wait()
    _check_rows(settings, bank)
    tables = {file: Table(rows, device) for file, rows in bank.rows.items()}
    features = bank.features.to(device)
    reader = Reader(model, features, settings.hidden_questions, bf16=settings.bf16)
    if settings.compile:
        reader.compile()
    training = Training(model, settings, processes)
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    training.restore(output / "language.pt")
    processes.wait()  # until all have read it
    batches = order_of(settings, {file: rows.lengths for file, rows in bank.rows.items()})
    bar = tqdm(
        islice(batches, training.step, None),
        desc="language model",
        initial=training.step,
        total=settings.steps,
        mininterval=5,
        disable=not processes.is_main,
    )
    means: dict[str, Tensor] = {}
    for file, chosen in bar:
        rng = np.random.default_rng([settings.seed, training.step, processes.rank])
        own = chosen[processes.rank :: processes.size]
        loss, _, right = reader.loss(tables[file], own, rng)
        training.update(loss * (len(right) / processes.total(len(right))))
        means[file] = 0.95 * means.get(file, loss.detach()) + 0.05 * loss.detach()
        is_pause = training.step % settings.save_steps == 0 or training.step == settings.steps
        if is_pause and processes.is_main:
            accuracies = measure(reader, tables, settings.num_held_out)
            _log(output / "language.jsonl", training.step, means, accuracies)
            training.save(output / "language.pt")
    if processes.is_main:
        model.save_pretrained(output)
        VPTProcessor.from_pretrained(settings.model).save_pretrained(output)


def _check_shares(settings: Settings) -> None:
    if 0 not in settings.phases:
        raise VPTError(f"phases: expected one from 0 on, got {list(settings.phases)}")
    if words := [share for share in settings.phases if isinstance(share, str)]:
        raise VPTError(f"phases: expected shares of the steps, got {words[0]!r}")
    for share, height in settings.restarts.items():
        if not (isinstance(share, float) and 0 < share < 1 and isinstance(height, float)):
            raise VPTError(
                "restarts: expected learning rates by shares of the steps between 0 and 1, "
                f"such as {{0.8: 1.0e-3}}; got {share!r}: {height!r}"
            )


def _check_rows(settings: Settings, bank: Bank) -> None:
    for file, rows in bank.rows.items():
        if (num := len(rows.lengths)) <= settings.num_held_out:
            raise VPTError(
                f"{file} has {num} rows; expected more than num_held_out, {settings.num_held_out}"
            )


@torch.no_grad()
def measure(reader: Reader, tables: Mapping[str, Table], num_rows: int) -> dict[str, float]:
    """By file, the share of the targets of its last rows that are predicted."""
    shares = {}
    for file, table in tables.items():
        num = len(table.lengths)
        _, guessed, right = reader.loss(table, np.arange(num - num_rows, num))
        shares[file] = float((guessed == right).float().mean())
    return shares


def _log(
    file: Path, step: int, losses: Mapping[str, Tensor], accuracies: Mapping[str, float]
) -> None:
    """Add a line of running means of the loss, and of accuracies.

    Raises:
        NonFiniteError: if a loss is not finite.
    """
    values = {name: loss.item() for name, loss in losses.items()}
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        raise NonFiniteError(
            f"the loss of {bad[0]} is {values[bad[0]]} at step {step}; "
            "train with a smaller learning rate"
        )
    means = {"loss": values, "accuracy": accuracies}
    line = {"step": step} | {
        f"{kind}_{Path(name).stem}": round(value, 4)
        for kind, of_kind in means.items()
        for name, value in of_kind.items()
    }
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def main() -> None:
    """Train what the YAML names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    try:
        settings = read_settings(Settings, args.config, args.overrides)
        train(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except (OSError, ValueError, VPTError) as exc:
        parser.error(str(exc))
    tqdm.write(f"the model is in {settings.output_dir}")


if __name__ == "__main__":
    main()
