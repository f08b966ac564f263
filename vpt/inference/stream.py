"""A token stream, and what appending to it results in."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from torch import Tensor

from vpt.inference.prefixes import Atoms


@dataclass
class Stream:
    """One growing token stream.

    Attributes:
        position: M-RoPE position of the next token.
        hidden: ``[D]`` final hidden state of the last token: the next control state.
        conditions: branch -> control state of its latest call.
        max_position: of the model; no token has this position or a later one.
        capacity: tokens that its slot can hold.
    """

    slot: int
    length: int = 0
    position: int = 0
    hidden: Tensor | None = None
    conditions: dict[str, Tensor] = field(default_factory=dict)
    max_position: int = sys.maxsize
    capacity: int = sys.maxsize
    atoms: Atoms = field(default_factory=Atoms)

    @property
    def is_full(self) -> bool:
        """Whether no further token can be read."""
        return self.position >= self.max_position or self.length >= self.capacity


@dataclass(frozen=True)
class AppendedImage:
    """An image, plain or re-encoded, that was appended to a stream.

    Attributes:
        branch: ``PLAIN`` for a plain image.
        reused: whether its features were cached.
        scores: ``[h * w]`` answers to the control state, ``None`` for a plain image.
    """

    branch: str
    grid_hw: tuple[int, int]
    num_tokens: int
    reused: bool
    scores: Tensor | None


@dataclass(frozen=True)
class Extension:
    """The result of appending pieces to a stream.

    Attributes:
        token_ids: all appended ids, placeholders included.
        logits: ``[V]`` after the last of them.
        run_ms: wall time of the LLM passes that read them, shared with other streams.
        num_reused: tokens of them that a kept prefix began the stream with.
    """

    token_ids: list[int]
    logits: Tensor
    images: list[AppendedImage]
    run_ms: float
    num_reused: int = 0
