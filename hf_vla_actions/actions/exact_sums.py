"""Sums of numbers and of their squares without any rounding, so that mean and std do not depend on the order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

ROWS = 4096  # added up at once: a part of 53 - 13 bits of each number is summed without rounding
BAND = 400  # powers of two that are treated together; the squares of such numbers keep all their bits in float64
UNIT = 1074  # every float64 is a multiple of 2**-1074, and every square of 2**-2148


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of several columns, as whole numbers: exact, whatever was added first.

    Floats are multiples of a power of two, so their sums are too; Python's integers hold them without rounding. Only
    `mean` and `std` round, once, at the end. A standard deviation of 0.001 around 1000 keeps all its digits.

    Args:
        count: rows.
        sums: sum of each column in units of 2**-1074.
        squares: sum of the squares of each column in units of 2**-2148.
    """

    count: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]

    @classmethod
    def of(cls, rows: np.ndarray) -> Moments:
        """Moments of (n, columns) finite floats."""
        sums, squares = [0] * rows.shape[1], [0] * rows.shape[1]
        for start in range(0, len(rows), ROWS):
            _add(np.ascontiguousarray(rows[start : start + ROWS].T, dtype=np.float64), sums, squares)
        return cls(len(rows), tuple(sums), tuple(squares))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)),
            tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
        )

    @property
    def mean(self) -> np.ndarray:
        """(columns,) float64, the nearest to the true mean."""
        return np.array([total / (self.count << UNIT) for total in self.sums])

    @property
    def std(self) -> np.ndarray:
        """(columns,) float64: root of the mean squared distance from the mean (`ddof=0`)."""
        spread = [self.count * square - total**2 for total, square in zip(self.sums, self.squares, strict=True)]
        return np.array([root(value, self.count**2 << 2 * UNIT) for value in spread])


def mixed_moments(parts: Sequence[Moments], weights: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of a mixture in which `parts[i]` has the share `weights[i]`, however many rows it has.

    Args:
        parts: moments of the same columns.
        weights: shares that sum to 1.

    Returns:
        mean and std, each (columns,) float64, rounded once.
    """
    means, stds = [], []
    for column in range(len(parts[0].sums)):
        shares = [weight / part.count for part, weight in zip(parts, weights, strict=True)]
        mean = sum((s * Fraction(p.sums[column], 1 << UNIT) for s, p in zip(shares, parts, strict=True)), Fraction())
        square = sum(
            (s * Fraction(p.squares[column], 1 << 2 * UNIT) for s, p in zip(shares, parts, strict=True)), Fraction()
        )
        means.append(float(mean))
        stds.append(root(*(square - mean**2).as_integer_ratio()))
    return np.array(means), np.array(stds)


def root(numerator: int, denominator: int) -> float:
    """Square root of a fraction of whole numbers of any size, to the last bit or so of float64."""
    shift = 2 * max(0, 64 - (numerator.bit_length() - denominator.bit_length()) // 2)
    return math.isqrt((numerator << shift) // denominator) / (1 << shift // 2)


def _add(rest: np.ndarray, sums: list[int], squares: list[int]) -> None:
    """Add one block of (columns, n <= ROWS) to the sums, in bands of magnitude (nearly always one)."""
    while True:
        exponent = _exponent(rest)
        scaled = np.ldexp(rest, -exponent[:, None])  # below 1; what becomes inexact here is not in this band
        band = np.abs(scaled) >= 2.0**-BAND
        whole = bool((band | (rest == 0)).all())
        x = scaled if whole else np.where(band, scaled, 0.0)
        for part in _sums(x):
            _accumulate(sums, part, exponent + UNIT)
        for product in _squared(x):
            for part in _sums(product):
                _accumulate(squares, part, 2 * exponent + 2 * UNIT)
        if whole:
            return
        rest = np.where(band, 0.0, rest)


def _squared(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x * x as the sum of two floats without error (T. J. Dekker, Numerische Mathematik 18, 1971)."""
    product = x * x
    swollen = 134217729.0 * x
    high = swollen - (swollen - x)
    low = x - high
    return product, ((high * high - product) + 2.0 * high * low) + low * low


def _sums(x: np.ndarray):
    """Sums over (columns, n <= ROWS), as float64 vectors that add up to the exact sum.

    Each round cuts the upper bits off every number; what is cut is so short that its sum has no rounding (the
    extraction of S. M. Rump, T. Ogita and S. Oishi, Accurate floating-point summation I, SIAM J. Sci. Comput. 2008).
    """
    while True:
        cut = np.ldexp(1.0, _exponent(x) + 13)[:, None]
        upper = (cut + x) - cut
        yield upper.sum(axis=1)
        x = x - upper
        if not x.any():
            return


def _exponent(x: np.ndarray) -> np.ndarray:
    """(columns,) the power of two above the largest magnitude of each column."""
    return np.frexp(np.maximum(x.max(axis=1), -x.min(axis=1)))[1]


def _accumulate(totals: list[int], part: np.ndarray, exponent: np.ndarray) -> None:
    """Add part * 2**exponent, column by column, to whole numbers."""
    mantissa, power = np.frexp(part)
    shifts = (power + exponent - 53).tolist()
    for column, (digits, shift) in enumerate(
        zip(np.ldexp(mantissa, 53).astype(np.int64).tolist(), shifts, strict=True)
    ):
        totals[column] += digits << shift if shift >= 0 else digits >> -shift
