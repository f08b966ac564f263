"""Processes that train one model together, as ``torchrun`` starts them; one alone is the rest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """The processes of a run; their group is made from torchrun's environment if there is one.

    Args:
        use_cpu: even where there is a GPU.
        patience: how long one waits for the others before it fails; torch's own if ``None``.

    Attributes:
        rank: number of this process, from 0.
        size: number of all.
    """

    def __init__(self, *, use_cpu: bool, patience: timedelta | None = None) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.size > 1 else 0
        self._device = torch.device("cpu")
        if self.size == 1:
            return
        if not use_cpu and torch.cuda.is_available():
            self._device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self._device)
        if not dist.is_initialized():
            backend = "gloo" if self._device.type == "cpu" else "nccl"
            dist.init_process_group(backend, timeout=patience)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all others."""
        if self.size > 1:
            dist.barrier()

    def total(self, number: float) -> float:
        """The sum over all processes."""
        return sum(self.gather([number]))

    def gather(self, own: Sequence[Any]) -> list[Any]:
        """What all processes have, in the order of their ranks."""
        if self.size == 1:
            return list(own)
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, list(own))
        return [one for part in every for one in part]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up gradients; a parameter without one in this process counts as 0."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def means(self, figures: Mapping[str, float], largest: Sequence[str]) -> dict[str, float]:
        """Means over all processes by name, a name that is missing somewhere left out there.

        Of the names in ``largest``, the largest value.
        """
        every = self.gather([figures])
        merged = {}
        for name in dict.fromkeys(name for one in every for name in one):
            values = [one[name] for one in every if name in one]
            merged[name] = max(values) if name in largest else sum(values) / len(values)
        return merged
