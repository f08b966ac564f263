"""The network of the depth tokenizer: encoder, codebook, decoder, named as in the release.

The codebook is our own code because the released weights have names of their own for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt.errors import DataError


class Codebook(nn.Module):
    """Nearest-vector quantiser with moving averages (arXiv 1711.00937, appendix A.1).

    Buffers have the names of https://github.com/SwinTransformer/AiT `vae/models/VQVAE.py`, whose
    weights Aurora released. `num_codes` is K, `code_dim` is D.
    """

    def __init__(self, num_codes: int, code_dim: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("_embedding", torch.zeros(num_codes, code_dim))
        self.register_buffer("_ema_cluster_size", torch.zeros(num_codes))
        self.register_buffer("_ema_w", torch.zeros(num_codes, code_dim))
        self._embedding: Tensor
        self._ema_cluster_size: Tensor
        self._ema_w: Tensor
        nn.init.normal_(self._embedding)
        self._ema_w.copy_(self._embedding)

    @property
    def num_codes(self) -> int:
        """K, the number of vectors."""
        return len(self._embedding)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes ``[N]`` of the vectors nearest to ``[N, D]``, the lowest among equals."""
        squares = self._embedding.square().sum(1)
        return (squares - 2 * vectors @ self._embedding.T).argmin(1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors ``[..., D]`` of int64 codes ``[...]``; `DataError` if there is no such code."""
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise DataError(
                f"expected codes of 0 to {self.num_codes - 1}, "
                f"got {int(codes.min())} to {int(codes.max())}"
            )
        return self._embedding[codes]

    @property
    def vectors(self) -> Tensor:
        """``[K, D]``, one per code."""
        return self._embedding

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor) -> None:
        """Move codes towards the vectors ``[N, D]`` of a step, whose nearest codes are ``[N]``."""
        counts = torch.bincount(codes, minlength=self.num_codes).to(vectors)
        sums = torch.zeros_like(self._ema_w).index_add_(0, codes, vectors)
        self._ema_cluster_size.lerp_(counts, 1 - self.decay)
        self._ema_w.lerp_(sums, 1 - self.decay)
        self._refresh()

    @torch.no_grad()
    def revive(self, vectors: Tensor, least_share: float, generator: torch.Generator) -> int:
        """Move dead codes to random vectors ``[N, D]`` of a step; returns how many were moved.

        A code is dead if it is used less than ``least_share`` of an even use.
        """
        even = self._ema_cluster_size.mean()
        dead = (self._ema_cluster_size < least_share * even).nonzero()[:, 0]
        order = torch.randperm(len(vectors), generator=generator)
        dead = dead[: len(order)]  # each takes a different vector; the rest waits
        self._ema_cluster_size[dead] = even
        self._ema_w[dead] = vectors[order[: len(dead)]] * even
        self._refresh()
        return len(dead)

    @torch.no_grad()
    def start_from(self, vectors: Tensor, generator: torch.Generator, num_rounds: int = 20) -> None:
        """Initialise the codes from at least K vectors ``[N, D]`` by k-means."""
        if len(vectors) < self.num_codes:
            raise DataError(
                f"expected at least {self.num_codes} vectors to start the codebook from, "
                f"got {len(vectors)}; use more or larger maps"
            )
        order = torch.randperm(len(vectors), generator=generator)
        self._embedding.copy_(vectors[order[: self.num_codes]])
        for _ in range(num_rounds):
            codes = self.nearest(vectors)
            counts = torch.bincount(codes, minlength=self.num_codes).to(vectors)
            sums = torch.zeros_like(self._ema_w).index_add_(0, codes, vectors)
            empty = counts == 0
            spare = torch.randperm(len(vectors), generator=generator)[: int(empty.sum())]
            sums[empty], counts[empty] = vectors[spare], 1
            self._embedding.copy_(sums / counts[:, None])
        self._ema_cluster_size.copy_(counts / counts.mean())
        self._ema_w.copy_(self._embedding * self._ema_cluster_size[:, None])

    def _refresh(self) -> None:
        """Set the vectors to the averages; sizes are smoothed against division by zero."""
        epsilon, total = 1e-5, self._ema_cluster_size.sum()
        sizes = self._ema_cluster_size + epsilon
        sizes *= total / (total + self.num_codes * epsilon)
        self._embedding.copy_(self._ema_w / sizes[:, None])


def perplexity(counts: Tensor) -> float:
    """Perplexity, 1 to K, of codes that occur ``counts`` ``[K]`` times; not all are 0."""
    shares = counts.double() / counts.sum()
    return float(torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum()))


@dataclass(frozen=True)
class Forward:
    """Result of one pass over maps."""

    decoded: Tensor  # [B, 1, H, W]
    vectors: Tensor  # [N, D], of the encoder, one per code
    codes: Tensor | None  # [N] int64; ``None`` without quantisation
    commitment: Tensor  # mean squared distance of the vectors from those of their codes, or 0


class DepthVQVAE(nn.Module):
    """VQ-VAE of depth maps (arXiv 2412.03548), of the shape of AiT's (arXiv 2301.02229).

    Layers are in the order of https://github.com/SwinTransformer/AiT `vae/models/VQVAE.py`
    (``residul_type='v1'``, ``use_norm=False``), so that weights trained there fit. Each convolution
    after the first doubles the channels; a code stands for ``2**num_downsamplings`` pixels a side.
    """

    def __init__(
        self,
        num_codes: int = 128,
        code_dim: int = 512,
        hidden_dim: int = 16,
        num_downsamplings: int = 5,
        num_residual_blocks: int = 2,
    ) -> None:
        super().__init__()
        widths = [hidden_dim * 2**i for i in range(num_downsamplings)]
        widest = widths[-1]
        residual = [_ResidualBlock(widest) for _ in range(2 * num_residual_blocks)]
        down: list[nn.Module] = []
        for before, after in zip([1, *widths], widths, strict=False):
            down += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        up: list[nn.Module] = []
        for before, after in zip([widest, *widths[::-1]], widths[::-1], strict=False):
            up += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(
            *down, *residual[:num_residual_blocks], nn.Conv2d(widest, code_dim, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, widest, 1),
            nn.ReLU(),
            *residual[num_residual_blocks:],
            *up,
            nn.Conv2d(hidden_dim, 1, 1),
        )
        self._vq_vae = Codebook(num_codes, code_dim)

    @property
    def codebook(self) -> Codebook:
        """The quantiser; the names of its parameters begin with ``_vq_vae``, as released."""
        return self._vq_vae

    def encode(self, maps: Tensor) -> Tensor:
        """Encode maps ``[B, 1, H, W]`` of 0 to 1 as int64 codes ``[B, h, w]``."""
        vectors = self.encoder(maps)  # [B, D, h, w]
        batch, _, height, width = vectors.shape
        return self.codebook.nearest(_flatten(vectors)).view(batch, height, width)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes ``[B, h, w]`` to maps ``[B, 1, H, W]`` of about 0 to 1."""
        return self.decoder(self.codebook.lookup(codes).permute(0, 3, 1, 2))

    def forward(self, maps: Tensor, *, quantise: bool = True) -> Forward:
        """Encode and decode maps ``[B, 1, H, W]``, with gradients straight through the codebook.

        Without ``quantise`` the decoder receives the output of the encoder.
        """
        encoded = self.encoder(maps)  # [B, D, h, w]
        vectors = _flatten(encoded)  # [N, D]
        if not quantise:
            return Forward(self.decoder(encoded), vectors, None, encoded.new_zeros(()))
        codes = self.codebook.nearest(vectors.detach())
        batch, width, *grid = encoded.shape
        chosen = self.codebook.lookup(codes).view(batch, *grid, width).permute(0, 3, 1, 2)
        commitment = F.mse_loss(encoded, chosen)
        straight = encoded + (chosen - encoded).detach()
        return Forward(self.decoder(straight), vectors, codes, commitment)


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def _flatten(encoded: Tensor) -> Tensor:
    """``[B, D, h, w]`` to ``[B * h * w, D]``, in reading order."""
    return encoded.permute(0, 2, 3, 1).reshape(-1, encoded.shape[1])
