"""The network of a VQ tokenizer: encoder, residual codebooks, decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hf_vla_actions.errors import ActionTokenError
from hf_vla_actions.tokenizers.vq_codebooks import Quantized, ResidualCodebooks


@dataclass(frozen=True)
class VQShape:
    """The sizes of a VQ tokenizer.

    Args:
        dof: numbers in one action.
        horizon: actions in one chunk.
        code_dim: length of the vector that is quantized.
        codebook_size: entries of each codebook, at least 2.
        n_codebooks: codebooks, and codes of one chunk.
        hidden: widths of the hidden layers of the encoder; the decoder has them in reverse.
    """

    dof: int
    horizon: int
    code_dim: int
    codebook_size: int
    n_codebooks: int
    hidden: tuple[int, ...]

    def __post_init__(self):
        if isinstance(self.hidden, (str, bytes)) or not isinstance(self.hidden, Sequence):
            raise ActionTokenError(f"hidden is a list of layer widths such as (256, 128), got {self.hidden!r}")
        object.__setattr__(self, "hidden", tuple(self.hidden))
        least = {"dof": 1, "horizon": 1, "code_dim": 1, "codebook_size": 2, "n_codebooks": 1}
        sizes = [(name, getattr(self, name), low) for name, low in least.items()]
        for name, value, low in [*sizes, *(("hidden", width, 1) for width in self.hidden)]:
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
                raise ActionTokenError(f"{name} must be a whole number of at least {low}, got {value!r}")
        for name, value, _ in sizes:
            object.__setattr__(self, name, int(value))
        object.__setattr__(self, "hidden", tuple(int(width) for width in self.hidden))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `VQShape(**values)` reads them."""
        return {**asdict(self), "hidden": list(self.hidden)}


class VQLosses(NamedTuple):
    """Losses of one batch (scalars) and what was quantized.

    reconstruction: mean squared error of the normalized chunk, passed straight through the quantizer.
    commitment: mean squared distance of what is quantized to the chosen entries, moving the encoder only; the sum over
        the codebooks.
    codebook: the same distance, moving the codebooks only.
    """

    reconstruction: torch.Tensor
    commitment: torch.Tensor
    codebook: torch.Tensor
    quantized: Quantized


class VQNetwork(nn.Module):
    """Encoder (horizon * dof to code_dim), residual codebooks, decoder back; ReLU between the layers.

    The losses are those of van den Oord et al. 2017 (arXiv 1711.00937, equation 3), with one commitment and one codebook
    term for each codebook.
    """

    def __init__(self, shape: VQShape):
        super().__init__()
        flat = shape.horizon * shape.dof
        self.encoder = _mlp([flat, *shape.hidden, shape.code_dim])
        self.codebooks = ResidualCodebooks(shape.n_codebooks, shape.codebook_size, shape.code_dim)
        self.decoder = _mlp([shape.code_dim, *reversed(shape.hidden), flat])

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights from `generator` alone: uniform within 1 / sqrt(inputs) as `nn.Linear`'s, zero biases."""
        for layer in [*self.encoder, *self.decoder]:
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.zero_()

    def losses(self, x: torch.Tensor) -> VQLosses:
        """Losses of normalized chunks (rows, horizon * dof)."""
        z = self.encoder(x)
        quantized = self.codebooks(z)
        # straight through: the value is that of the quantized vector, the gradient goes to the encoder unchanged
        passed = z + (quantized.vectors - z).detach()
        reconstruction = (self.decoder(passed) - x).square().mean()
        to_entries = (quantized.residuals - quantized.chosen.detach()).square().mean(dim=(1, 2)).sum()
        to_rows = (quantized.residuals.detach() - quantized.chosen).square().mean(dim=(1, 2)).sum()
        return VQLosses(reconstruction, to_entries, to_rows, quantized)

    def entries(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, n_codebooks) int64 entries of normalized chunks (rows, horizon * dof)."""
        return self.codebooks(self.encoder(x)).entries

    def chunks(self, entries: torch.Tensor) -> torch.Tensor:
        """(rows, horizon * dof) normalized chunks of entries (rows, n_codebooks), not clipped."""
        return self.decoder(self.codebooks.sum_of(entries))


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
