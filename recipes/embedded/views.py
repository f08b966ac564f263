"""The encoders of the embedded model on batches of square views, as stage 1 trains them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt.model.modeling import VPTForConditionalGeneration
from vpt.model.processing import VPTProcessor
from vpt.model.projectors import Projector


class TowerView(nn.Module):
    """The tower on equally large square views, all in one batch.

    transformers runs attention image by image; here it is one call, which is faster to train.

    Args:
        model: whose tower.
        processor: whose pixel settings.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: VPTForConditionalGeneration, processor: VPTProcessor) -> None:
        super().__init__()
        self.visual = model.model.visual
        settings = processor.image_processor
        self.register_buffer("mean", torch.tensor(settings.image_mean) * 255)
        self.register_buffer("std", torch.tensor(settings.image_std) * 255)

    def patches(self, pixels: Tensor) -> Tensor:
        """uint8 ``[B, V, V, 3]`` -> ``[B, p, 3 * 14 * 14]``, in the order of the processor.

        The processor repeats each for the two frames of a patch; the embedding adds them up.
        """
        values = (pixels.float() - self.mean) / self.std
        num, side = values.shape[:2]
        cells = side // 28
        blocks = values.permute(0, 3, 1, 2).reshape(num, 3, cells, 2, 14, cells, 2, 14)
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, h, w, 2, 2, 3, 14, 14]
        return blocks.reshape(num, -1, 3 * 14 * 14)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 ``[B, V, V, 3]`` -> ``[B, n * n, D]``."""
        visual = self.visual
        patches = self.patches(pixels)
        num, count = patches.shape[:2]
        hidden = F.linear(patches, visual.patch_embed.proj.weight.sum(2).flatten(1))
        cells = pixels.shape[1] // 14
        head_dim = hidden.shape[-1] // visual.blocks[0].attn.num_heads
        angles = _rotary_angles(cells, head_dim).to(hidden.device)
        cos, sin = angles.cos(), angles.sin()
        for block in visual.blocks:
            hidden = hidden + self._attend(block.attn, block.norm1(hidden), cos, sin)
            hidden = hidden + _feed_forward(block.mlp, block.norm2(hidden))
        return visual.merger(hidden.flatten(0, 1)).view(num, count // 4, -1)

    @staticmethod
    def _attend(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        num, count, width = hidden.shape
        qkv = attention.qkv(hidden).view(num, count, 3, attention.num_heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # [3, B, heads, p, d]
        (query, key), value = _turned(qkv[:2], cos, sin), qkv[2]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return attention.proj(mixed.transpose(1, 2).reshape(num, count, width))


def _rotary_angles(num_cells: int, head_dim: int) -> Tensor:
    """Angles ``[p, head_dim / 2]`` of the tower's rotary positions, for a square of patches.

    Written out because transformers names the function for it otherwise in each of its releases.
    """
    frequencies = 10000.0 ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    rows = torch.arange(num_cells)[:, None].expand(num_cells, num_cells)
    half = num_cells // 2
    places = [  # patches that are merged into one token follow each other
        grid.reshape(half, 2, half, 2).permute(0, 2, 1, 3).flatten() for grid in (rows, rows.T)
    ]
    return torch.cat([place[:, None] * frequencies for place in places], -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[..., d]`` by angles whose cosines and sines are ``[..., d / 2]``."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _feed_forward(mlp: Any, hidden: Tensor) -> Tensor:
    """The layers of a block with their activation, x * sigmoid(1.702 x), as one fused function."""
    one, other = mlp.fc1, mlp.fc2
    hidden = F.linear(hidden, 1.702 * one.weight, 1.702 * one.bias)
    return F.linear(F.silu(hidden), other.weight / 1.702, other.bias)


class BranchView(nn.Module):
    """A branch on square views: its encoder, and its projector without a condition.

    Args:
        branch: DINO or SAM.
        projector: of the branch.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, branch: Any, projector: Projector) -> None:
        super().__init__()
        self.branch = branch
        self.projector = projector
        settings = branch.preprocess_config
        self.register_buffer("mean", torch.tensor(settings["image_mean"]) * 255)
        self.register_buffer("std", torch.tensor(settings["image_std"]) * 255)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 ``[B, V, V, 3]`` -> ``[B, N, D]``."""
        values = ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        features = self.branch.encode(values)
        stacked = torch.stack([one.values for one in features])  # [B, h * w, C]
        return self.projector.project_features(stacked, features[0].grid_hw)


def whiten_patches(weight: Tensor, patches: Tensor, generator: torch.Generator) -> None:
    """Make a patch embedding whose outputs are uncorrelated over real patches, in place.

    Half of the outputs are the strongest components of the patches, which are smooth; the other
    half is mixed of the many weaker ones, where fine lines are.

    Args:
        weight: ``[E, ...]``, of the embedding.
        patches: ``[P, ...]``, as many inputs as weights per output.
        generator: of the mixing.
    """
    width = len(weight)
    flat = patches.reshape(len(patches), -1).double()
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    values, vectors = values.flip(0), vectors.flip(1)
    whitening = (vectors * (values + 0.02 * values[:width].mean()).rsqrt()).T  # [inputs, inputs]
    strong = width // 2
    weaker = whitening[strong : strong + 6 * width]
    draw = torch.randn(len(weaker), width - strong, generator=generator).double()
    mixed = torch.linalg.qr(draw)[0].T @ weaker
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator).double())[0]
    rows = 0.6 * turn @ torch.cat([whitening[:strong], mixed])
    weight.data.copy_(rows.view_as(weight))
