"""Residual codebooks: each quantizes what those before it left over."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Quantized(NamedTuple):
    """What `ResidualCodebooks` makes of some vectors.

    vectors: (rows, code_dim) sum of the chosen entries; differentiable in the codebooks, not in the input.
    entries: (rows, n_codebooks) int64, which entry of each codebook was nearest.
    residuals: (n_codebooks, rows, code_dim) what each codebook was given to quantize; differentiable in the input.
    chosen: (n_codebooks, rows, code_dim) the chosen entries themselves.
    """

    vectors: torch.Tensor
    entries: torch.Tensor
    residuals: torch.Tensor
    chosen: torch.Tensor


class ResidualCodebooks(nn.Module):
    """`n_codebooks` tables of `codebook_size` vectors; a vector becomes the sum of one entry of each.

    The first codebook takes the nearest entry, the second the one nearest to the remainder, and so on (residual groups
    of VQ-BeT, arXiv 2403.03181, after SoundStream, arXiv 2107.03312). Which entry is nearest is found greedily, codebook
    by codebook; of equally near ones the first is taken.

    Attributes:
        vectors: (n_codebooks, codebook_size, code_dim) the entries.
        counts: (n_codebooks, codebook_size) running mean of how many rows of a batch took each entry.
        sums: (n_codebooks, codebook_size, code_dim) running mean of the sum of those rows.
    """

    counts: torch.Tensor
    sums: torch.Tensor

    def __init__(self, n_codebooks: int, codebook_size: int, code_dim: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(n_codebooks, codebook_size, code_dim), requires_grad=False)
        # What only training needs is not saved.
        self.register_buffer("counts", torch.zeros(n_codebooks, codebook_size), persistent=False)
        self.register_buffer("sums", torch.zeros(n_codebooks, codebook_size, code_dim), persistent=False)

    def forward(self, z: torch.Tensor) -> Quantized:
        """Quantize (rows, code_dim)."""
        total = torch.zeros_like(z)
        entries, residuals, chosen = [], [], []
        for vectors in self.vectors:
            residual = z - total.detach()
            entry = nearest(residual.detach(), vectors.detach())
            entries.append(entry)
            residuals.append(residual)
            chosen.append(vectors[entry])
            total = total + chosen[-1]
        return Quantized(total, torch.stack(entries, dim=1), torch.stack(residuals), torch.stack(chosen))

    def sum_of(self, entries: torch.Tensor) -> torch.Tensor:
        """(rows, code_dim) sum of the entries (rows, n_codebooks), added in the order of the codebooks."""
        total = torch.zeros(len(entries), self.vectors.shape[-1], dtype=self.vectors.dtype)
        for vectors, entry in zip(self.vectors, entries.unbind(1), strict=True):
            total = total + vectors[entry]
        return total

    @torch.no_grad()
    def start(self, z: torch.Tensor, batch_size: int, generator: torch.Generator) -> None:
        """Fill the codebooks, one after the other, with residuals of the rows of `z`.

        Args:
            z: (rows, code_dim).
            batch_size: rows of the batches to come; every entry starts with the even count of them.
            generator: which rows are taken.
        """
        n_codebooks, size, _ = self.vectors.shape
        residual = z
        for level in range(n_codebooks):
            self.vectors[level] = residual[_draw(len(residual), size, generator)]
            residual = residual - self.vectors[level][nearest(residual, self.vectors[level])]
        self.counts.fill_(batch_size / size)
        self.sums.copy_(self.vectors * self.counts[..., None])

    @torch.no_grad()
    def count(self, quantized: Quantized, decay: float) -> None:
        """Take one batch into `counts` and `sums`: new = decay * old + (1 - decay) * batch."""
        n_codebooks, size, dim = self.vectors.shape
        flat = (quantized.entries + torch.arange(n_codebooks) * size).T.reshape(-1)
        taken = torch.bincount(flat, minlength=n_codebooks * size).to(self.counts.dtype)
        rows = torch.zeros(n_codebooks * size, dim, dtype=self.sums.dtype)
        rows.index_add_(0, flat, quantized.residuals.detach().reshape(-1, dim))
        self.counts.lerp_(taken.reshape(n_codebooks, size), 1 - decay)
        self.sums.lerp_(rows.reshape(n_codebooks, size, dim), 1 - decay)

    @torch.no_grad()
    def follow(self) -> None:
        """Move each entry to the running mean of the rows that took it, `sums / counts`.

        van den Oord et al. 2017 (arXiv 1711.00937, appendix A.1). An entry that nobody takes keeps its place: both
        shrink alike.
        """
        held = self.counts > torch.finfo(self.counts.dtype).tiny
        means = self.sums / self.counts.clamp_min(torch.finfo(self.counts.dtype).tiny)[..., None]
        self.vectors.copy_(torch.where(held[..., None], means, self.vectors))

    @torch.no_grad()
    def reset_unused(self, residuals: torch.Tensor, below: float, generator: torch.Generator) -> int:
        """Put entries that hardly any row takes onto random residuals of the batch.

        Args:
            residuals: (n_codebooks, rows, code_dim) what each codebook was given.
            below: an entry is unused if its count is below this share of the even one, rows / codebook_size. A fresh
                entry starts with the even count, so that it has time to find its rows.
            generator: which residuals are taken.

        Returns:
            How many entries were moved.
        """
        even = residuals.shape[1] / self.vectors.shape[1]
        unused = self.counts < below * even
        for level in torch.nonzero(unused.any(dim=1)).flatten().tolist():
            which = torch.nonzero(unused[level]).flatten()
            fresh = residuals[level][_draw(residuals.shape[1], len(which), generator)]
            self.vectors[level, which] = fresh
            self.counts[level, which] = even
            self.sums[level, which] = fresh * even
        return int(unused.sum())


def nearest(rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Index of the nearest vector, (rows,) int64, for (rows, dim) against (size, dim)."""
    # |r - v|^2 without |r|^2, which is the same for all vectors
    return (vectors.square().sum(dim=1) - 2 * rows @ vectors.T).argmin(dim=1)


def _draw(n: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """`size` indices below `n`: all different where there are enough."""
    order = torch.randperm(n, generator=generator)
    return order[:size] if n >= size else order[torch.arange(size) % n]
