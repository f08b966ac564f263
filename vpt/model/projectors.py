"""Projectors: features of a vision branch -> LLM width, conditioned on a control state.

One class, three stems (``identity`` for the backbone's own tower, ``linear`` for DINOv2,
``conv`` for SAM), as in arXiv 2502.17425, section 3. Parameter names are the released ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vpt.branches import Features

CONV_STRIDE = 4  # 64x64 SAM features -> 16x16 tokens, as released


def token_grid(stem: str, grid_hw: tuple[int, int]) -> tuple[int, int]:
    """Grid of the tokens a stem makes from features on ``grid_hw``."""
    if stem != "conv":
        return grid_hw
    return grid_hw[0] // CONV_STRIDE, grid_hw[1] // CONV_STRIDE


@dataclass(frozen=True)
class Projected:
    """What a projector makes of one image.

    Attributes:
        values: ``[N, D]``.
        scores: ``[N]``, ``f_i . c``; ``None`` without a condition.
        grid_hw: ``N == h * w``, row-major.
    """

    values: Tensor
    scores: Tensor | None
    grid_hw: tuple[int, int]


class Projector(nn.Module):
    """``y_i = f_i + (f_i . c) c``, with ``f = stem(features)`` and ``c = project(condition)``.

    Args:
        stem: ``"identity"``, ``"linear"`` or ``"conv"``.
        feature_dim: ``C``, width of the branch's features.
        hidden_size: ``D``, width of the LLM.
        condition_scale: number of control states that make one condition.
        freeze_stem: let no gradient into the stem, whatever a trainer sets ``requires_grad`` to.
    """

    def __init__(
        self,
        stem: str,
        feature_dim: int,
        hidden_size: int,
        condition_scale: int = 1,
        *,
        freeze_stem: bool = False,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.feature_dim = feature_dim
        self.freeze_stem = freeze_stem
        self.condition_scale = condition_scale
        if stem == "linear":
            self.layernorm_feature = nn.LayerNorm(feature_dim)
            self.linear_feature = nn.Linear(feature_dim, hidden_size)
        elif stem == "conv":
            self.layernorm_feature = nn.LayerNorm(feature_dim)
            self.conv_feature = nn.Conv2d(feature_dim, hidden_size, CONV_STRIDE, CONV_STRIDE)
        elif stem != "identity":
            raise ValueError(f"unknown stem {stem!r}; available: conv, identity, linear")
        self.layernorm_condition = nn.LayerNorm(hidden_size * condition_scale)
        self.linear_condition = nn.Linear(hidden_size * condition_scale, hidden_size)

    def reset_parameters(self) -> None:
        """Xavier weights, zero biases, unit norms: the released initialisation."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()

    def reset_conditioning(self) -> None:
        """Fresh weights of the condition, ten times smaller than released: ``y`` is nearly ``f``.

        With a long ``c`` the second term hides the features, and nothing is learned from them.
        """
        self.layernorm_condition.reset_parameters()
        nn.init.xavier_uniform_(self.linear_condition.weight, gain=0.1)
        nn.init.zeros_(self.linear_condition.bias)

    def output_grid(self, grid_hw: tuple[int, int]) -> tuple[int, int]:
        """Grid of the tokens made from features on ``grid_hw``."""
        return token_grid(self.stem, grid_hw)

    def forward(self, features: Features, condition: Tensor | None = None) -> Projected:
        """Project the features of one image; ``condition``: ``[condition_scale * D]``."""
        # A tower may have more, for the LLM's first layers: of plain images only.
        values = features.values[:, : self.feature_dim]
        projected = self.project_features(values, features.grid_hw)  # [N, D]
        if self.freeze_stem:
            projected = projected.detach()
        grid_hw = self.output_grid(features.grid_hw)
        if condition is None:
            return Projected(projected, None, grid_hw)
        c = self.linear_condition(self.layernorm_condition(condition))  # [D]
        scores = projected @ c  # [N]
        return Projected(torch.addcmul(projected, scores[:, None], c[None]), scores, grid_hw)

    def project_features(self, values: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """The stem alone, without condition: ``[..., h * w, C]`` -> ``[..., N, D]``."""
        if self.stem == "identity":
            return values
        values = self.layernorm_feature(values.to(self.layernorm_feature.weight.dtype))
        if self.stem == "linear":
            return self.linear_feature(values)
        maps = values.transpose(-1, -2).unflatten(-1, grid_hw)  # [..., C, h, w]
        return self.conv_feature(maps).flatten(-2).transpose(-1, -2)
