"""A batch of streams, cut where control states are needed, and run piece by piece over a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from branches import Features
from vpt.cache import ATTENTION_NAME


@dataclass(frozen=True)
class Call:
    """A control token in a batch, and the images that are re-encoded for it."""

    branch: str
    row: int
    position: int
    looks: list[tuple[Features, Tensor]]  # features of an image, [N] positions of its pads


class Segments:
    """How a batch is cut so that each segment ends where a control state is needed.

    Rows with fewer calls than others are cut where the longest of the others is, so that the
    segments stay equally long and little is padded.
    """

    def __init__(self, calls: list[Call], input_ids: Tensor) -> None:
        num_rows, length = input_ids.shape
        self.device = input_ids.device
        by_row = [
            sorted((c for c in calls if c.row == row), key=lambda c: c.position)
            for row in range(num_rows)
        ]
        num_cuts = max(len(row) for row in by_row)
        self._calls = [[row[cut] for row in by_row if len(row) > cut] for cut in range(num_cuts)]
        self._bounds = [[0] * num_rows]
        for at_cut in self._calls:
            own = {call.row: call.position for call in at_cut}
            furthest = max(own.values())
            previous = self._bounds[-1]
            self._bounds.append(
                [own.get(row, max(furthest, previous[row])) for row in range(num_rows)]
            )
        self._bounds.append([length] * num_rows)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """``[B, L]`` indices into the stream, and ``[B, L]`` bool: which of them are meant."""
        first = torch.tensor(self._bounds[number], device=self.device)[:, None]
        last = torch.tensor(self._bounds[number + 1], device=self.device)[:, None]
        width = max(int((last - first).max()), 1)
        index = first + torch.arange(width, device=self.device)
        valid = index < last
        return torch.where(valid, index, 0), valid

    def calls_after(self, number: int) -> list[Call]:
        """Calls whose control state the segment has just produced."""
        return self._calls[number] if number < len(self._calls) else []


class SegmentRunner:
    """Runs segments one after the other over a growing cache, with gradients through it."""

    def __init__(
        self,
        language_model: nn.Module,
        attention_mask: Tensor | None,
        position_ids: Tensor,
    ) -> None:
        self.language_model: Any = language_model
        self.attention_mask = attention_mask
        self.position_ids = position_ids
        self.can_cache = self._can_cache()
        self.cache = DynamicCache(config=self.language_model.config)
        self.key_index: Tensor | None = None  # [B, K]; -1 where a key must not be seen

    def _can_cache(self) -> bool:
        checkpointed = self.language_model.gradient_checkpointing and self.language_model.training
        attention = self.language_model.config._attn_implementation
        return attention in ("eager", "sdpa", ATTENTION_NAME) and not checkpointed

    def __call__(self, embeds: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        """Run one segment.

        Args:
            embeds: ``[B, S, D]`` of the whole streams.
            index: ``[B, L]`` places of the segment in them.
            valid: ``[B, L]`` bool, which of these are meant.

        Returns:
            ``[B, L, D]`` final hidden states.
        """
        if not self.can_cache:
            return self._run_from_start(embeds, index)
        rows = torch.arange(len(index), device=index.device)[:, None]
        seen = valid
        if self.attention_mask is not None:
            seen = valid & self.attention_mask[rows, index].bool()
        new_keys = torch.where(seen, index, -1)
        keys = new_keys if self.key_index is None else torch.cat([self.key_index, new_keys], 1)
        self.key_index = keys
        # A padded query sees everything that is there: any finite answer will do.
        limit = torch.where(valid, index, embeds.shape[1])[:, :, None]
        mask = (keys[:, None] <= limit) & (keys[:, None] >= 0)  # [B, L, K]
        mask |= ~mask.any(-1, keepdim=True)
        return self.language_model(
            inputs_embeds=embeds[rows, index],
            position_ids=self.position_ids[:, rows, index],
            attention_mask={"full_attention": self._as_bias(mask[:, None], embeds.dtype)},
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _as_bias(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if self.language_model.config._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(dtype).min
        )

    def _run_from_start(self, embeds: Tensor, index: Tensor) -> Tensor:
        """Without a cache (gradient checkpointing, flash attention): prefix and all."""
        length = int(index.max()) + 1
        mask = None if self.attention_mask is None else self.attention_mask[:, :length]
        hidden = self.language_model(
            inputs_embeds=embeds[:, :length],
            attention_mask=mask,
            position_ids=self.position_ids[:, :, :length],
            use_cache=False,
        ).last_hidden_state
        rows = torch.arange(len(index), device=index.device)[:, None]
        return hidden[rows, index]
