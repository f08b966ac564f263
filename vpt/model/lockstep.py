"""Lockstep of training processes: each runs the parts of the model that any of them needs.

Sharded weights are gathered, and sharded gradients reduced, by all processes in the same order. The
calls of a batch decide which parts its forward runs, so processes agree on them first. A process
without work for a part runs it on a blank input, of which ``[:0].sum()`` enters the graph: it is
exactly 0, and so are its gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vpt.branches import Features
from vpt.model.projectors import CONV_STRIDE, Projector
from vpt.model.segments import SegmentReader


@dataclass(frozen=True)
class Work:
    """Parts of the model that one forward runs.

    Attributes:
        num_rounds: passes through the LLM's layers before the last one, each up to some calls.
        num_images: kind of image -> number of images. A kind without images runs no encoder.
        min_projections: runs of every projector in a round, at least.
    """

    num_rounds: int
    num_images: Mapping[str, int]
    min_projections: int = 0

    def num_projections(self, branch: str) -> int:
        """Runs of a projector in each round: all images of a branch may belong to one."""
        return max(self.num_images[branch], self.min_projections)


def is_in_lockstep(model: Any) -> bool:
    """Whether this forward has to run the same parts in all processes.

    FSDP2 and ZeRO-3, which shard weights, are recognised. Where only gradients are sharded (ZeRO-1,
    ZeRO-2), the trainer sets ``model.trains_in_lockstep``.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    from torch.distributed.fsdp import FSDPModule  # slow to import, and not needed before

    layers = model.model.language_model.layers
    is_sharded = any(isinstance(module, FSDPModule) for module in (model, *layers))
    trains = model.trains_in_lockstep and model.training
    return bool(is_sharded or has_partitioned_weights(model) or trains)


def has_partitioned_weights(model: Any) -> bool:
    """Whether ZeRO-3 shards the weights.

    It repeats the last gradient of a weight without one, so whatever is trained has to run.
    """
    return hasattr(next(model.model.language_model.layers.parameters()), "ds_id")


def agree(own: Work, device: torch.device) -> Work:
    """The largest numbers of all processes; every one of them has to call this."""
    numbers = torch.tensor([own.num_rounds, *own.num_images.values()], device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    num_rounds, *num_images = numbers.tolist()
    return Work(num_rounds, dict(zip(own.num_images, num_images, strict=True)))


def read_blank(language_model: Any, embeds: Tensor, position_ids: Tensor) -> Tensor:
    """0, after a pass of one token through the LLM's layers."""
    reader = SegmentReader(language_model, None, position_ids[:, :1, :1])
    reader.read(embeds[:1, :1], {0: 1})
    return reader.last_state(0)[:0].sum()


def project_blank(projector: Projector, embeds: Tensor, *, is_conditioned: bool) -> Tensor:
    """0, after a projection of features that are zeros."""
    values = embeds.new_zeros(CONV_STRIDE**2, projector.feature_dim)
    condition = embeds[0, :1].expand(projector.condition_scale, -1).flatten()
    features = Features(values, (CONV_STRIDE, CONV_STRIDE))
    return projector(features, condition if is_conditioned else None).values[:0].sum()
