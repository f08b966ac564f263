"""The codebook: vectors that stand for all others, kept by moving averages and kept alive.

Own code rather than a library's, for released weights hold the codebook under names of their own,
and reading them must need nothing more than torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vpt.errors import DataError


class Codebook(nn.Module):
    """Nearest-vector quantiser with moving averages (arXiv 1711.00937, appendix A.1).

    Buffers are called as in https://github.com/SwinTransformer/AiT `vae/models/VQVAE.py`, whose
    weights Aurora released.

    Args:
        num_codes: K, how many vectors.
        code_dim: D, their width.
        decay: of the moving averages.
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
        """K, how many vectors there are."""
        return len(self._embedding)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes of the nearest vectors.

        Args:
            vectors: ``[N, D]``.

        Returns:
            ``[N]`` int64, the lowest code where several are equally near.
        """
        squares = self._embedding.square().sum(1)
        return (squares - 2 * vectors @ self._embedding.T).argmin(1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors of codes.

        Args:
            codes: int64 of any shape.

        Returns:
            The same shape with D behind it.

        Raises:
            DataError: if there is no such code.
        """
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
        """Move every code towards the vectors that it stands for.

        Args:
            vectors: ``[N, D]`` of one step.
            codes: ``[N]``, their nearest.
        """
        counts = torch.bincount(codes, minlength=self.num_codes).to(vectors)
        sums = torch.zeros_like(self._ema_w).index_add_(0, codes, vectors)
        self._ema_cluster_size.lerp_(counts, 1 - self.decay)
        self._ema_w.lerp_(sums, 1 - self.decay)
        self._refresh()

    @torch.no_grad()
    def revive(self, vectors: Tensor, least_share: float, generator: torch.Generator) -> int:
        """Give codes that hardly any vector falls on the place of one that was just seen.

        Args:
            vectors: ``[N, D]`` of one step.
            least_share: a code is dead if it is used less than this share of an even use.
            generator: picks the vectors.

        Returns:
            How many were dead.
        """
        even = self._ema_cluster_size.mean()
        dead = (self._ema_cluster_size < least_share * even).nonzero()[:, 0]
        order = torch.randperm(len(vectors), generator=generator)
        dead = dead[: len(order)]  # each gets a vector of its own; the rest waits
        self._ema_cluster_size[dead] = even
        self._ema_w[dead] = vectors[order[: len(dead)]] * even
        self._refresh()
        return len(dead)

    @torch.no_grad()
    def start_from(self, vectors: Tensor, generator: torch.Generator, num_rounds: int = 20) -> None:
        """Place the codes where vectors are, by k-means.

        Args:
            vectors: ``[N, D]`` with N at least K.
            generator: picks the first centers.
            num_rounds: of k-means.

        Raises:
            DataError: if there are fewer vectors than codes.
        """
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
        """Set the vectors to the averages; sizes are smoothed, so that none is divided by zero."""
        epsilon, total = 1e-5, self._ema_cluster_size.sum()
        sizes = self._ema_cluster_size + epsilon
        sizes *= total / (total + self.num_codes * epsilon)
        self._embedding.copy_(self._ema_w / sizes[:, None])


def perplexity(counts: Tensor) -> float:
    """How many equally frequent codes would be as varied as these: 1 to K.

    Args:
        counts: ``[K]``, how often each code occurs; not all 0.
    """
    shares = counts.double() / counts.sum()
    return float(torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum()))
