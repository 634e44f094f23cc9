"""Bin grids over the normalized interval [-1, 1]: RT-2's equal bins and OpenVLA's edges."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hf_vla_actions.errors import ActionTokenError

SCHEMES = ("uniform", "openvla")


@dataclass(frozen=True)
class BinGrid:
    """A fixed grid of `n_bins` codes over [-1, 1].

    "uniform" (RT-2, arXiv 2307.15818): `n_bins` equal bins, `clamp(floor(u * n), 0, n - 1)` with u in [0, 1]; a code
    decodes to the center of its bin.

    "openvla" (openvla/openvla, `prismatic/vla/action_tokenizer.py`): `n_bins` counts EDGES of `linspace(-1, 1, n)`, so
    there are n - 1 centers. Codes are 0..n-1; the last one holds only 1.0 itself (every clipped value, an open
    gripper) and decodes like the one before. A grid that clipped to n - 2 would relabel all of those.
    """

    n_bins: int = 256
    scheme: str = "uniform"

    def __post_init__(self):
        if not isinstance(self.n_bins, (int, np.integer)) or isinstance(self.n_bins, bool) or self.n_bins < 2:
            raise ActionTokenError(f"n_bins must be a whole number of at least 2, got {self.n_bins!r}")
        if self.scheme not in SCHEMES:
            raise ActionTokenError(f"scheme must be one of {list(SCHEMES)}, got {self.scheme!r}")

    @cached_property
    def edges(self) -> np.ndarray:
        """Boundaries between bins in float64: (n_bins + 1,) for "uniform", (n_bins,) for "openvla"."""
        return np.linspace(-1.0, 1.0, self.n_bins + (self.scheme == "uniform"))

    @cached_property
    def values(self) -> np.ndarray:
        """(n_bins,) float64: the normalized value that each code decodes to, in the order of the codes."""
        centers = (self.edges[:-1] + self.edges[1:]) / 2
        return centers if self.scheme == "uniform" else np.append(centers, centers[-1])

    @property
    def half_width(self) -> float:
        """Half the width of a bin: the largest rounding error inside [-1, 1]."""
        return float(self.edges[1] - self.edges[0]) / 2

    def encode(self, normalized: np.ndarray) -> np.ndarray:
        """Return the code of each value, clipped to [-1, 1] first. float64 in, int64 out, same shape."""
        x = np.clip(np.asarray(normalized, dtype=np.float64), -1.0, 1.0)
        if np.isnan(x).any():
            raise ActionTokenError("NaN cannot be put into a bin; look for missing values in the actions")
        if self.scheme == "openvla":
            return np.digitize(x, self.edges).astype(np.int64) - 1
        return np.clip(np.floor((x + 1.0) / 2.0 * self.n_bins), 0, self.n_bins - 1).astype(np.int64)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return the normalized value of each code (float64, same shape); any other code raises."""
        codes = np.asarray(codes)
        if codes.dtype.kind not in "iu":
            raise ActionTokenError(f"codes are whole numbers, got dtype {codes.dtype}")
        if codes.size and (codes.min() < 0 or codes.max() >= self.n_bins):
            bad = codes[(codes < 0) | (codes >= self.n_bins)]
            raise ActionTokenError(f"codes run 0..{self.n_bins - 1}, got {bad.reshape(-1)[:5].tolist()}")
        return self.values[codes]
