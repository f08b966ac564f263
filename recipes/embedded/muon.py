"""Trains as ``llamafactory-cli train`` does, with Muon in float32 where it runs on a CPU.

Run ``python -m recipes.embedded.muon configs/embedded/aurora-count.yaml``. Muon rounds the matrices
that it orthogonalizes to bfloat16. On a CPU without instructions for bfloat16 that took 12 times as
long as in float32, longer than the rest of a small model's step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from llamafactory.third_party.muon import muon
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _NoRounding(TorchFunctionMode):
    """``tensor.bfloat16()`` gives float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.bfloat16:
            func = Tensor.float
        return func(*args, **(kwargs or {}))


def orthogonalize_in_float32_on_cpu() -> None:
    """Wrap Muon's orthogonalization; harmless when done twice.

    Where LLaMA-Factory has another one than the tested it is left alone: only speed is lost.
    """
    stock = getattr(muon, "zeropower_via_newtonschulz5", None)
    if (
        stock is None
        or hasattr(stock, "__wrapped__")
        or list(inspect.signature(stock).parameters) != ["G", "steps"]
        or "bfloat16" not in stock.__code__.co_names
    ):
        return

    @wraps(stock)
    def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
        if matrix.device.type != "cpu":
            return stock(matrix, steps)
        with _NoRounding():
            return stock(matrix, steps)

    muon.zeropower_via_newtonschulz5 = orthogonalize


def main() -> None:
    """Train what the arguments name."""
    from llamafactory.train.tuner import run_exp

    orthogonalize_in_float32_on_cpu()
    run_exp()


if __name__ == "__main__":
    main()
