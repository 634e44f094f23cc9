"""Quantiles of a stream of any length: the KLL sketch of Apache DataSketches."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_vla_actions.errors import StatsError

K = 16_384
RANK_ERROR = 1.84e-4  # get_normalized_rank_error(16384, False), the single-sided one


def need_sketches(exact_rows: int) -> Any:
    """The package `datasketches`; a StatsError that says how to get it where it is not installed."""
    try:
        import datasketches
    except ImportError:
        raise StatsError(
            f"more than {exact_rows} rows need the package datasketches for quantiles in bounded memory, which is "
            "missing: pip install 'hf_vla_actions[data]' (or keep more rows: RunningStats(exact_rows=...))"
        ) from None
    return datasketches


class Sketch:
    """Quantiles of one number within `RANK_ERROR`, in about 0.35 MB whatever the length of the stream.

    KLL (Z. Karnin, K. Lang and E. Liberty, Optimal quantile approximation in streams, FOCS 2016) with k = 16384. The
    bound is the package's own: the 99th percentile of the largest error over all quantiles. Of the other sketches of
    the package, REQ keeps the tails better but holds float32 only, and t-digest has no bound at all.
    """

    def __init__(self, kll: Any = None):
        self._kll = need_sketches(0).kll_doubles_sketch(K) if kll is None else kll

    @property
    def count(self) -> int:
        """Numbers so far."""
        return int(self._kll.n)

    def update(self, column: np.ndarray) -> None:
        """Take in (n,) contiguous float64."""
        self._kll.update(column)

    def merge(self, other: Sketch) -> None:
        """Take in what another sketch has seen; it stays as it is."""
        self._kll.merge(other._kll)

    def quantiles(self, q: np.ndarray) -> np.ndarray:
        """(len(q),) values; of 0 and 1 too they are only near the ends."""
        return np.array(self._kll.get_quantiles(q.tolist(), True))

    def cumulative(self) -> tuple[np.ndarray, np.ndarray]:
        """Values rising, and the estimated number of values not above each."""
        pairs = np.array([(value, float(weight)) for value, weight in self._kll])
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        return pairs[:, 0], np.cumsum(pairs[:, 1]).astype(np.int64)

    def to_bytes(self) -> bytes:
        """The package's own form; inverse of `from_bytes`."""
        return self._kll.serialize()

    @classmethod
    def from_bytes(cls, data: bytes) -> Sketch:
        """Read what `to_bytes` wrote."""
        try:
            kll = need_sketches(0).kll_doubles_sketch.deserialize(data)
        except (RuntimeError, ValueError, IndexError) as error:  # all that its C++ raises arrives as one of these
            raise StatsError(f"a sketch cannot be read: {error}") from None
        if kll.k != K:
            raise StatsError(f"a sketch of size {kll.k} cannot be merged with those of this package, of size {K}")
        return cls(kll)
