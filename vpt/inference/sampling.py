"""How a token is chosen from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vpt.inference.options import real_number, whole_number
from vpt.model.logits import NOT_FINITE, likeliest

_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: keep so many of the likeliest; 0 for all.
        top_p: keep the likeliest that hold this much probability together; 1 for all.
        seed: of the random generator, 0 to 2**64 - 1; the same seed gives the same tokens.

    Raises:
        PromptError: naming the attribute that has another type or is out of bounds.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checked = {
            "temperature": real_number("temperature", self.temperature, 0),
            "top_k": whole_number("top_k", self.top_k, 0),
            "top_p": real_number("top_p", self.top_p, 0, 1, above=True),
            "seed": whole_number("seed", self.seed, 0, 2**64),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def generator(self) -> torch.Generator | None:
        """A fresh random generator, or ``None`` if none is needed."""
        return None if self.temperature == 0 else torch.Generator().manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> int:
        """Draw one id from logits ``[V]``, in float32 on the CPU, so that devices agree.

        Returns:
            The id, or ``NOT_FINITE`` if the largest logit is NaN or infinite.
        """
        if generator is None:
            return int(likeliest(logits))
        logits = logits.float().cpu()
        if not (largest := logits.max()).isfinite():
            return NOT_FINITE
        # Differences to the largest: quotients of extreme temperatures stay numbers.
        scaled = (logits - largest) / min(max(self.temperature, _FLOAT32.tiny), _FLOAT32.max)
        order = scaled.argsort(descending=True, stable=True)
        probabilities = scaled[order].softmax(-1)
        keep = probabilities.cumsum(-1) - probabilities < self.top_p
        if 0 < self.top_k < len(keep):
            keep[self.top_k :] = False
        keep[0] = True  # also where top_p is 0 in float32
        drawn = torch.multinomial(probabilities * keep, 1, generator=generator)
        return int(order[drawn])
