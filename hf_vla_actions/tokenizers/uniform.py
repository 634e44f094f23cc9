"""One code a number: the bins of RT-2 and OpenVLA."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_vla_actions.actions.bins import BinGrid
from hf_vla_actions.errors import ActionTokenError


class UniformActionTokenizer:
    """Puts every number of a normalized chunk into one of `n_bins` bins, step by step, dimension by dimension.

    Args:
        n_bins: size of the grid, at least 2.
        scheme: "uniform" (RT-2: equal bins, bin centers) or "openvla" (edges and the centers between them); see
            `BinGrid` for the difference.
    """

    def __init__(self, n_bins: int = 256, scheme: str = "uniform"):
        self.grid = BinGrid(n_bins, scheme)

    def __repr__(self) -> str:
        return f"UniformActionTokenizer(n_bins={self.grid.n_bins}, scheme={self.grid.scheme!r})"

    def __eq__(self, other) -> bool:
        return isinstance(other, UniformActionTokenizer) and self.grid == other.grid

    def __hash__(self) -> int:
        return hash(self.grid)

    @property
    def n_codes(self) -> int:
        """How many different codes there are."""
        return self.grid.n_bins

    def encode(self, normalized) -> np.ndarray:
        """Codes of a chunk: (..., horizon, dof) normalized float to (..., horizon * dof) int64; clips to [-1, 1]."""
        x = np.asarray(normalized, dtype=np.float64)
        if x.ndim < 2:
            raise ActionTokenError(f"a chunk has shape (..., horizon, dof), got {x.shape}")
        return self.grid.encode(x).reshape(*x.shape[:-2], -1)

    def decode(self, codes, horizon: int, dof: int) -> np.ndarray:
        """Chunk of codes: (..., horizon * dof) int to (..., horizon, dof) float64 normalized."""
        codes = np.asarray(codes)
        if codes.ndim == 0 or codes.shape[-1] != horizon * dof:
            raise ActionTokenError(
                f"a chunk of {horizon} x {dof} actions is {horizon * dof} codes, got shape {codes.shape}"
            )
        return self.grid.decode(codes).reshape(*codes.shape[:-1], horizon, dof)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description; inverse of `from_dict`."""
        return {"type": "uniform", "n_bins": int(self.grid.n_bins), "scheme": self.grid.scheme}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UniformActionTokenizer:
        """Read what `to_dict` wrote."""
        if values.get("type") != "uniform":
            raise ActionTokenError(f"action tokenizers that can be read here: ['uniform'], got {values.get('type')!r}")
        return cls(values["n_bins"], values["scheme"])
