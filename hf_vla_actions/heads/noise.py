"""Random numbers for heads: the same ones on every device and in every dtype from a generator of one seed."""

from __future__ import annotations

import torch


def normal(shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Standard normal numbers of this shape, of the dtype and on the device of `like`."""
    return torch.randn(shape, generator=generator, device=_place(like, generator), dtype=torch.float32).to(like)


def uniform(n: int, like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """(n,) numbers between 0 and 1, of the dtype and on the device of `like`."""
    return torch.rand(n, generator=generator, device=_place(like, generator), dtype=torch.float32).to(like)


def _place(like: torch.Tensor, generator: torch.Generator | None) -> torch.device:
    # A generator draws on its own device only.
    return like.device if generator is None else generator.device
