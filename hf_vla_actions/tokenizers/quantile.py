"""Bins that each hold the same share of the data, as a yardstick for equal ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_vla_actions.errors import ActionTokenError


@dataclass(frozen=True, eq=False)
class QuantileBins:
    """Bins of equal mass, a grid of its own for each dimension; fine where the data are, wide where they are rare.

    A policy speaks uniform bins, FAST or VQ: these bins are for comparison (`hf-vla tokens-report`). Their largest error
    is as wide as the rarest bin, which a uniform grid bounds by half a bin.

    Args:
        edges: (dof) arrays, rising: the inner boundaries of the bins of each dimension.
        values: (dof) arrays, one longer: the mean of the data in each bin, which has the least squared error.
        n_bins: bins asked for. A dimension of few distinct values has fewer.
    """

    edges: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]
    n_bins: int

    @classmethod
    def fit(cls, chunks: np.ndarray, n_bins: int = 256) -> QuantileBins:
        """Bins of equal mass of normalized chunks (n, horizon, dof)."""
        rows = _finite(chunks)
        if isinstance(n_bins, bool) or not isinstance(n_bins, (int, np.integer)) or n_bins < 2:
            raise ActionTokenError(f"n_bins must be a whole number of at least 2, got {n_bins!r}")
        rows = rows.reshape(-1, rows.shape[-1])
        edges, values = [], []
        for column in rows.T:
            # Values that take more than a bin's share would make empty bins: equal boundaries are one. A boundary
            # below all data would be another.
            inner = np.unique(np.quantile(column, np.arange(1, n_bins) / n_bins, method="higher"))
            inner = inner[inner > column.min()]
            place = np.searchsorted(inner, column, side="right")
            count = np.bincount(place, minlength=len(inner) + 1)
            edges.append(inner)
            values.append(np.bincount(place, weights=column, minlength=len(inner) + 1) / count)
        return cls(tuple(edges), tuple(values), int(n_bins))

    @property
    def n_codes(self) -> int:
        """How many codes a number can have."""
        return self.n_bins

    def encode(self, normalized: np.ndarray) -> np.ndarray:
        """Codes (n, horizon * dof) of chunks (n, horizon, dof)."""
        x = self._checked(normalized)
        codes = [np.searchsorted(edges, x[..., d], side="right") for d, edges in enumerate(self.edges)]
        return np.stack(codes, axis=-1).reshape(len(x), -1)

    def decode(self, codes: np.ndarray, horizon: int, dof: int) -> np.ndarray:
        """Chunks (n, horizon, dof) of codes (n, horizon * dof)."""
        codes = np.asarray(codes).reshape(-1, horizon, dof)
        sizes = np.array([len(values) for values in self.values])
        if dof != len(sizes) or codes.dtype.kind not in "iu" or (codes < 0).any() or (codes >= sizes).any():
            raise ActionTokenError(f"codes of the {len(sizes)} dimensions are whole numbers below {sizes.tolist()}")
        return np.stack([values[codes[..., d]] for d, values in enumerate(self.values)], axis=-1)

    def _checked(self, normalized: np.ndarray) -> np.ndarray:
        x = _finite(normalized)
        if x.shape[-1] != len(self.edges):
            raise ActionTokenError(f"bins of {len(self.edges)} dimensions cannot encode chunks of shape {x.shape}")
        return x


def _finite(chunks) -> np.ndarray:
    x = np.asarray(chunks, dtype=np.float64)
    if x.ndim != 3 or not x.size or not np.isfinite(x).all():
        raise ActionTokenError(f"chunks are finite numbers of shape (n, horizon, dof), got shape {x.shape}")
    return x
