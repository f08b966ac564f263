"""Training of the depth tokenizer. The data of a step follow from its number: runs can resume."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vpt.depth.maps import Floats, fit_map, read_map
from vpt.depth.tokenizer import DepthTokenizer, DepthTokenizerConfig
from vpt.depth.vqvae import perplexity
from vpt.errors import DataError, NonFiniteError, PromptError
from vpt.files import replace_atomically

STATE = "training_state.pt"

_COMMITMENT = 0.25  # of the released training
_MOST_GRADIENT = 1.0
_RISE_STEPS = 50  # in which the learning rate reaches its value
_LEAST_RATE = 0.02  # of it, at the end
_LEAST_SHARE = 0.1  # of an even use, below which a code counts as dead
_REVIVE_EVERY = 20
_REVIVE_UNTIL = 0.8  # of all steps; then the codebook may settle
_VECTORS_PER_CODE = 40  # that k-means sees
_NUM_VARIANCE_MAPS = 64
_LOG_EVERY = 25


@dataclass(frozen=True)
class TrainingSettings:
    """Hyperparameters; together with the maps and the shape they decide the result.

    Most steps use crops, which are cheaper and more varied than whole maps. A step has fewer whole
    maps than crops, so that it costs the same. A `PromptError` names an impossible number.
    """

    steps: int = 3000
    batch_size: int = 16  # crops of a step
    crop_cells: int = 5  # side of the crops, in codes
    learning_rate: float = 1e-3  # of Adam, with linear warm-up and cosine decay
    warmup: float = 0.15  # share of the steps before the codebook is initialised and used
    whole: float = 0.2  # share of the steps, at the end, that use whole maps
    seed: int = 0  # of all random choices

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.crop_cells) < 1 or self.learning_rate <= 0:
            raise PromptError(f"expected steps, batch, crop and rate above 0, got {self}")
        if not (0 <= self.warmup < 1 and 0 <= self.whole <= 1):
            raise PromptError(f"expected shares of the steps of 0 to 1, got {self}")

    @property
    def first_coded(self) -> int:
        """The first step with the codebook."""
        return round(self.steps * self.warmup)

    @property
    def whole_from(self) -> int:
        """The first step with whole maps."""
        return self.steps - round(self.steps * self.whole)


@dataclass
class Trainer:
    """A network in training on depth maps, whose state can be saved and resumed.

    Two runs are bitwise equal on a CPU only.
    """

    files: Sequence[Path]
    settings: TrainingSettings
    config: DepthTokenizerConfig = field(default_factory=DepthTokenizerConfig)
    device: str = "cpu"
    distances: bool = False

    def __post_init__(self) -> None:
        if not self.files:
            raise DataError("there are no depth maps to train on")
        if self.settings.crop_cells > self.config.grid_size:
            raise PromptError(
                f"crops of {self.settings.crop_cells} codes a side do not fit maps of "
                f"{self.config.grid_size}"
            )
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._network = self.config.build(self.settings.seed).to(self.device).train()
        self._optimizer = torch.optim.Adam(self._network.parameters(), self.settings.learning_rate)
        self._variance = self._measure_variance()
        self._order: tuple[int, Any] = (-1, None)  # number of an epoch, and its order of the maps
        self._counts = torch.zeros(self.config.num_codes)

    @property
    def tokenizer(self) -> DepthTokenizer:
        """The tokenizer as it is now; sets the network to evaluation."""
        return DepthTokenizer(self._network, self.config)

    def run(self) -> Iterator[int]:
        """Train to the end; yields the number of steps done, after each."""
        while self.step < self.settings.steps:
            self._train_step()
            yield self.step

    def _train_step(self) -> None:
        settings, step = self.settings, self.step
        coded = step >= settings.first_coded
        if step == settings.first_coded:
            self._start_codebook()
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, settings.steps)
        maps = self._batch(step)
        done = self._network(maps, quantise=coded)
        error = F.mse_loss(done.decoded, maps)
        # As in the code of arXiv 1711.00937, so that the weight 0.25 does not depend on the maps.
        loss = error / self._variance + _COMMITMENT * done.commitment
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), _MOST_GRADIENT)
        self._optimizer.step()
        num_dead = 0
        if coded:
            vectors, book = done.vectors.detach(), self._network.codebook
            book.update(vectors, done.codes)
            self._counts += torch.bincount(done.codes, minlength=book.num_codes).cpu()
            if step % _REVIVE_EVERY == 0 and step < _REVIVE_UNTIL * settings.steps:
                num_dead = book.revive(vectors, _LEAST_SHARE, self._generator(step))
        self.step += 1
        self._log(error, num_dead)

    def _log(self, error: Tensor, num_dead: int) -> None:
        """Add a line to the history every few steps."""
        if self.step % _LOG_EVERY and self.step != self.settings.steps:
            return
        if not math.isfinite(mse := error.item()):
            raise NonFiniteError(
                f"the error of step {self.step} is {mse}; train again with a smaller learning rate"
            )
        line = {"step": self.step, "mse": round(mse, 6)}
        if self._counts.any():
            line["codes_used"] = int((self._counts > 0).sum())
            line["perplexity"] = round(perplexity(self._counts), 2)
            line["revived"] = num_dead
            self._counts.zero_()
        self.history.append(line)

    def _start_codebook(self) -> None:
        vectors: list[Tensor] = []
        with torch.no_grad():
            while sum(map(len, vectors)) < _VECTORS_PER_CODE * self.config.num_codes:
                # Batches after the last one of the training.
                maps = self._batch(self.settings.steps + len(vectors))
                vectors.append(self._network(maps, quantise=False).vectors)
        self._network.codebook.start_from(torch.cat(vectors), self._generator(-1))

    def _batch(self, step: int) -> Tensor:
        """Maps or crops of a step, ``[B, 1, H, W]``; some are mirrored."""
        settings, grid = self.settings, self.config.grid_size
        cells = grid if step >= settings.whole_from else settings.crop_cells
        whole_size = max(1, settings.batch_size * settings.crop_cells**2 // grid**2)
        num_crops = min(step, settings.whole_from) * settings.batch_size
        start = num_crops + max(step - settings.whole_from, 0) * whole_size
        size = settings.batch_size if step < settings.whole_from else whole_size
        rng = np.random.default_rng([settings.seed, 1, step])
        scale = self.config.size_px // grid
        side = cells * scale
        crops = []
        for position in range(start, start + size):
            depth = self._read(position)
            top, left = rng.integers((grid - cells) * scale + 1, size=2)
            crop = depth[top : top + side, left : left + side]
            crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        return torch.from_numpy(np.stack(crops))[:, None].to(self.device)

    def _read(self, position: int) -> Floats:
        """The map at a position in an endless sequence of epochs, each shuffled by itself."""
        epoch, index = divmod(position, len(self.files))
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.settings.seed, 2, epoch])
            self._order = epoch, rng.permutation(len(self.files))
        file = self.files[self._order[1][index]]
        return fit_map(read_map(file, distances=self.distances), self.config.size_px)

    def _measure_variance(self) -> float:
        """Variance of the values of a sample of the maps."""
        rng = np.random.default_rng([self.settings.seed, 3])
        chosen = rng.permutation(len(self.files))[:_NUM_VARIANCE_MAPS]
        maps = (read_map(self.files[i], distances=self.distances) for i in chosen)
        values = np.stack([fit_map(one, 32) for one in maps])
        if (variance := float(values.var())) < 1e-8:
            raise DataError("all depth maps have one and the same value; there is nothing to learn")
        return variance

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.settings.seed * 2**20 + step + 1)

    # State

    def save_state(self, folder: Path) -> None:
        """Write the file that :meth:`load_state` reads, whole or not at all."""
        state = {
            "run": self.identity,
            "step": self.step,
            "history": self.history,
            "counts": self._counts,
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        with replace_atomically(folder) as draft:
            torch.save(state, draft / STATE)

    def load_state(self, folder: Path) -> bool:
        """Resume a stopped run of the same settings; returns whether there is one."""
        file = folder / STATE
        if not file.exists():
            return False
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
        except (OSError, RuntimeError, UnpicklingError, EOFError) as exc:
            raise PromptError(
                f"cannot read {file} ({str(exc).splitlines()[0]}); delete it to start again"
            ) from exc
        check_same_run(state["run"], self.identity, folder)
        self.step, self.history = state["step"], state["history"]
        self._counts = state["counts"].cpu()
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        return True

    @property
    def identity(self) -> dict[str, Any]:
        """See :func:`run_identity`."""
        return run_identity(self.files, self.settings, self.config, self.distances)


def run_identity(
    files: Sequence[Path],
    settings: TrainingSettings,
    config: DepthTokenizerConfig,
    distances: bool = False,
) -> dict[str, Any]:
    """Settings, shape, and names and sizes of the maps: runs with equal ones are the same."""
    held = {"distances": distances or None}  # older runs have no such key
    named = "".join(f"{file.name} {file.stat().st_size}\n" for file in files)
    digest = hashlib.sha256(named.encode()).hexdigest()[:16]
    return {**asdict(settings), **asdict(config), "num_maps": len(files), "maps": digest, **held}


def check_same_run(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuse a run in a folder that is not the wanted one, naming the first difference."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise PromptError(
                f"{folder} holds a run with {name} {found.get(name)}, not {value}; "
                "repeat its options to resume it, or choose another folder"
            )


def _rate(step: int, num_steps: int) -> float:
    """Learning rate as a share of its highest value."""
    rise = min((step + 1) / _RISE_STEPS, 1)
    fall = (1 + math.cos(math.pi * step / num_steps)) / 2
    return rise * (_LEAST_RATE + (1 - _LEAST_RATE) * fall)
