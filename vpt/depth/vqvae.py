"""The network of the depth tokenizer: encoder, codebook, decoder, named as the released one's."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vpt.depth.codebook import Codebook


@dataclass(frozen=True)
class Forward:
    """What one pass over maps gives.

    Attributes:
        decoded: ``[B, 1, H, W]``.
        vectors: ``[N, D]``, of the encoder, one per code.
        codes: ``[N]`` int64; ``None`` if nothing was quantised.
        commitment: mean squared distance of the vectors from their codes' vectors; 0 without.
    """

    decoded: Tensor
    vectors: Tensor
    codes: Tensor | None
    commitment: Tensor


class DepthVQVAE(nn.Module):
    """VQ-VAE of depth maps (arXiv 2412.03548), of the shape of AiT's (arXiv 2301.02229).

    Layers stand in the order of https://github.com/SwinTransformer/AiT `vae/models/VQVAE.py`
    (``residul_type='v1'``, ``use_norm=False``), so that weights trained there fit.

    Args:
        num_codes: K, vectors of the codebook.
        code_dim: D, their width.
        hidden_dim: channels behind the first convolution; each further one doubles them.
        num_downsamplings: a code stands for ``2**num_downsamplings`` pixels a side.
        num_residual_blocks: of encoder and decoder each.
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
        """The quantiser; its parameters' names begin with ``_vq_vae``, as released."""
        return self._vq_vae

    def encode(self, maps: Tensor) -> Tensor:
        """Turn maps into codes.

        Args:
            maps: ``[B, 1, H, W]``, 0 to 1; sides are multiples of ``2**num_downsamplings``.

        Returns:
            ``[B, h, w]`` int64.
        """
        vectors = self.encoder(maps)  # [B, D, h, w]
        batch, _, height, width = vectors.shape
        return self.codebook.nearest(_flatten(vectors)).view(batch, height, width)

    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into maps.

        Args:
            codes: ``[B, h, w]`` int64.

        Returns:
            ``[B, 1, H, W]``, about 0 to 1.

        Raises:
            DataError: if there is no such code.
        """
        return self.decoder(self.codebook.lookup(codes).permute(0, 3, 1, 2))

    def forward(self, maps: Tensor, *, quantise: bool = True) -> Forward:
        """Encode and decode, with gradients straight through the codebook.

        Args:
            maps: ``[B, 1, H, W]``.
            quantise: else the decoder gets what the encoder gives.
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
    """``[B, D, h, w]`` to ``[B * h * w, D]``, rows of a map one after the other."""
    return encoded.permute(0, 2, 3, 1).reshape(-1, encoded.shape[1])
