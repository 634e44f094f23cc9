"""Statistics as LeRobot's `meta/stats.json` keeps them, but with true quantiles of all values, not envelopes."""

from __future__ import annotations

from typing import Any

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def vector_stats(values: np.ndarray) -> dict[str, list[Any]]:
    """Statistics of each dimension.

    Args:
        values: (n, length) numbers.

    Returns:
        `min`, `max`, `mean`, `std`, `q01` ... `q99`, each a list of `length` floats, and `count`, [n].
    """
    values = np.asarray(values, dtype=np.float64)
    stats = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        **dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values()), axis=0), strict=True)),
    }
    return {name: stat.tolist() for name, stat in stats.items()} | {"count": [len(values)]}


class PixelCounts:
    """How often each of the 256 values occurs in each color channel; `a + b` is the pictures of both.

    From these counts every statistic of uint8 pictures follows exactly, quantiles too, and no picture need be kept.
    """

    def __init__(self) -> None:
        self.counts = np.zeros((3, 256), dtype=np.int64)
        self.n_pictures = 0

    def add(self, picture: np.ndarray) -> None:
        """Count one picture, (height, width, 3) uint8."""
        self.counts += [np.bincount(picture[..., channel].ravel(), minlength=256) for channel in range(3)]
        self.n_pictures += 1

    def __add__(self, other: PixelCounts) -> PixelCounts:
        both = PixelCounts()
        both.counts = self.counts + other.counts
        both.n_pictures = self.n_pictures + other.n_pictures
        return both

    def stats(self) -> dict[str, list[Any]]:
        """Statistics of each channel, pixel values as 0..1; shape (3, 1, 1), `count` is pictures."""
        values = np.arange(256) / 255
        n = self.counts.sum(axis=1)
        mean = self.counts @ values / n
        spread = (values - mean[:, None]) ** 2
        stats = {
            "min": [values[np.flatnonzero(counts)[0]] for counts in self.counts],
            "max": [values[np.flatnonzero(counts)[-1]] for counts in self.counts],
            "mean": mean,
            "std": np.sqrt((self.counts * spread).sum(axis=1) / n),
            **{name: [self._quantile(counts, q) for counts in self.counts] for name, q in QUANTILES.items()},
        }
        return {name: np.reshape(stat, (3, 1, 1)).tolist() for name, stat in stats.items()} | {
            "count": [self.n_pictures]
        }

    @staticmethod
    def _quantile(counts: np.ndarray, q: float) -> float:
        """Quantile by linear interpolation between the two nearest pixels, as `np.quantile` has it."""
        upto = np.cumsum(counts)
        position = q * (upto[-1] - 1)
        below, above = np.searchsorted(upto, [np.floor(position), np.ceil(position)], side="right") / 255
        return float(below + (above - below) * (position - np.floor(position)))
