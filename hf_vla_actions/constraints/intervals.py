"""Sets of real numbers as closed intervals: the one representation behind token masks and projection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from hf_vla_actions.errors import ConstraintError


@dataclass(frozen=True, eq=False)
class IntervalSet:
    """A set of float64 numbers: the union of closed intervals [low, high], sorted and disjoint.

    It is canonical: intervals that overlap, touch, or have no float64 between them are one, so equal sets have equal
    bounds. Being closed under `intersect` and `complement` in float64 is what makes "inclusive, zero tolerance" exact.

    Args:
        pairs: (n, 2) lower and upper bounds, in any order; both may be infinite. No pairs: the empty set.
    """

    pairs: np.ndarray
    lows: np.ndarray = field(init=False, repr=False)
    highs: np.ndarray = field(init=False, repr=False)

    def __post_init__(self):
        pairs = np.array(self.pairs, dtype=np.float64).reshape(-1, 2) + 0.0  # + 0.0 turns -0.0 into 0.0
        if np.isnan(pairs).any() or (pairs[:, 0] > pairs[:, 1]).any():
            raise ConstraintError(f"an interval is a pair low <= high of numbers, got {pairs.tolist()}")
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        reach = np.maximum.accumulate(pairs[:, 1])
        # A new interval starts where the next float64 after all that came before is still below its lower bound.
        starts = np.ones(len(pairs), dtype=bool)
        starts[1:] = pairs[1:, 0] > np.nextafter(reach[:-1], np.inf)
        first = np.flatnonzero(starts)
        last = np.append(first[1:], len(pairs)) - 1 if len(pairs) else first
        merged = np.stack([pairs[first, 0], reach[last]], axis=1)
        merged.setflags(write=False)
        object.__setattr__(self, "pairs", merged)
        object.__setattr__(self, "lows", merged[:, 0])
        object.__setattr__(self, "highs", merged[:, 1])

    @classmethod
    def everything(cls) -> IntervalSet:
        """All numbers."""
        return cls(np.array([[-np.inf, np.inf]]))

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[float, float]]) -> IntervalSet:
        """The union of closed intervals [low, high]; a pair of equal numbers is a point."""
        return cls(np.array(list(pairs), dtype=np.float64))

    @classmethod
    def points(cls, values) -> IntervalSet:
        """The set of these numbers only."""
        values = np.asarray(values, dtype=np.float64).reshape(-1)
        return cls(np.stack([values, values], axis=1))

    @property
    def is_empty(self) -> bool:
        """True if no number is in the set."""
        return not len(self.pairs)

    def intersect(self, other: IntervalSet) -> IntervalSet:
        """The numbers that are in both."""
        low = np.maximum.outer(self.lows, other.lows).reshape(-1)
        high = np.minimum.outer(self.highs, other.highs).reshape(-1)
        return IntervalSet(np.stack([low, high], axis=1)[low <= high])

    def complement(self) -> IntervalSet:
        """The float64 numbers that are not in the set: bounds move to the neighboring float64, so it is closed."""
        low = np.append(-np.inf, np.nextafter(self.highs, np.inf))
        high = np.append(np.nextafter(self.lows, -np.inf), np.inf)
        covers_low = len(self.lows) > 0 and self.lows[0] == -np.inf
        covers_high = len(self.highs) > 0 and self.highs[-1] == np.inf
        keep = slice(1 if covers_low else 0, len(low) - 1 if covers_high else None)
        return IntervalSet(np.stack([low, high], axis=1)[keep])

    def contains(self, values) -> np.ndarray:
        """Which numbers are in the set: bool of the same shape, bounds included, no tolerance; NaN is in no set."""
        values = np.asarray(values, dtype=np.float64)
        if self.is_empty:
            return np.zeros(values.shape, dtype=bool)
        at = np.searchsorted(self.lows, values, side="right") - 1
        return (at >= 0) & (values <= self.highs[at])

    def nearest(self, values) -> np.ndarray:
        """The closest member to each number: float64 of the same shape.

        A member is returned as it is, bit by bit. Of two members at the same distance the lower one is returned.
        """
        if self.is_empty:
            raise ConstraintError("the empty set has no nearest member")
        values = np.asarray(values, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ConstraintError(
                "NaN and infinity have no nearest member; look for the model or sensor that made them"
            )
        below, above = self.neighbors(values)
        closer = np.where(values - below <= above - values, below, above)
        return np.where(self.contains(values), values, closer)

    def closest(self, value: float) -> IntervalSet:
        """All members at the smallest distance from one number: a point, or two at the same distance."""
        if self.is_empty:
            return self
        if self.contains(value):
            return IntervalSet.points(value)
        below, above = (float(bound) for bound in self.neighbors(np.float64(value)))
        down, up = value - below, above - value
        if np.isclose(down, up, rtol=1e-9, atol=0.0):
            return IntervalSet.points([below, above])
        return IntervalSet.points(below if down < up else above)

    def neighbors(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Members next to each number outside the set, below and above it; infinite where there is none."""
        at = np.searchsorted(self.lows, values, side="right")
        return np.append(-np.inf, self.highs)[at], np.append(self.lows, np.inf)[at]

    def __eq__(self, other) -> bool:
        return isinstance(other, IntervalSet) and np.array_equal(self.pairs, other.pairs)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        if self.is_empty:
            return "nothing"
        parts = [f"{a:.6g}" if a == b else f"[{a:.6g}, {b:.6g}]" for a, b in self.pairs[:6].tolist()]
        more = len(self.pairs) - len(parts)
        return " or ".join(parts) + (f" or {more} more" if more else "")
