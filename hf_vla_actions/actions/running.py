"""Statistics of a stream: one pass, memory that does not grow, parts that merge in any order."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from hf_vla_actions.actions import running_json
from hf_vla_actions.actions.exact_sums import Moments
from hf_vla_actions.actions.sketch import RANK_ERROR, Sketch, need_sketches
from hf_vla_actions.errors import StatsError

EXACT_ROWS = 1_000_000
BLOCK = 65_536  # rows taken in at once; small updates wait for others


def finite_array(array, what: str) -> np.ndarray:
    """`array` as float64; NaN and infinite values raise with the index of the first."""
    try:
        x = np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError):
        raise StatsError(f"{what} must be numbers in an array, got {type(array).__name__}") from None
    if not np.isfinite(x).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise StatsError(f"{what} have NaN or infinite values, first at index {index}")
    return x


class RunningStats:
    """Statistics of rows that arrive in pieces, in one pass.

    Count, min and max are exact. Mean and std (`ddof=0`) are exact sums rounded once at the end, so they are the same
    bit for bit whatever the split of the rows and the order of the merges. Quantiles are those of `numpy.quantile`
    (linear interpolation) up to `exact_rows` rows, which are kept; beyond that every number goes into a KLL sketch and
    is forgotten, and a quantile is the value whose share of smaller values is q within `rank_error` (holds with 99 %
    confidence for all quantiles of a dimension at once; sketches draw random bits, so two passes differ within it).

    Args:
        shape: shape of one row: dof, or (horizon, dof) for statistics of every step of a chunk. None takes it from the
            first rows.
        exact_rows: how many rows are kept for exact quantiles. 1,000,000 rows of 7 float32 values take 28 MB.
    """

    def __init__(self, shape: int | tuple[int, ...] | None = None, *, exact_rows: int = EXACT_ROWS):
        shape = (shape,) if isinstance(shape, (int, np.integer)) else shape
        if shape is not None and (not 1 <= len(shape) <= 2 or min(shape) < 1):
            raise StatsError(f"a row is (dof,) or (horizon, dof), got the shape {tuple(shape)}")
        if exact_rows < 1:
            raise StatsError(f"exact_rows must be at least 1, got {exact_rows}")
        self.shape = None if shape is None else tuple(int(size) for size in shape)
        self.exact_rows = int(exact_rows)
        self._pending: list[np.ndarray] = []  # (n, columns) not yet in the moments, `_waiting` rows in all
        self._waiting = 0
        self._kept: list[np.ndarray] = []  # (n, columns) of every row, while quantiles are exact
        self._moments: Moments | None = None
        self._min = self._max = np.zeros(0)
        self._sketches: list[Sketch] = []

    def __repr__(self) -> str:
        return f"RunningStats({self.count} rows of shape {self.shape}, rank_error={self.rank_error:g})"

    def __reduce__(self):
        return RunningStats.from_dict, (self.to_dict(),)  # sketches cannot be copied to another process by themselves

    def update(self, rows) -> None:
        """Take in (n, *shape) rows in real units; they are copied.

        Raises:
            StatsError: NaN or infinite values (with the index of the first), rows of another shape, or more rows than
                `exact_rows` without the package for sketches. The statistics are then as they were before.
        """
        rows = finite_array(rows, "the rows")
        shape = self.shape or rows.shape[1:]
        if rows.ndim not in (2, 3) or rows.shape[1:] != shape or 0 in shape:
            expected = "(n, dof) or (n, horizon, dof)" if self.shape is None else f"(n, {', '.join(map(str, shape))})"
            raise StatsError(f"rows must have shape {expected}, got {rows.shape}")
        if not len(rows):
            return
        if self.count + len(rows) > self.exact_rows:
            need_sketches(self.exact_rows)
        self.shape = shape
        rows = rows.reshape(len(rows), -1)
        for start in range(0, len(rows), BLOCK):
            block = _narrow(rows[start : start + BLOCK])
            self._pending.append(block)
            self._waiting += len(block)
            if self._waiting >= BLOCK:
                self._settle()

    def merge(self, other: RunningStats) -> RunningStats:
        """Statistics of the rows of both, in any order; both stay as they are.

        Raises:
            StatsError: the rows have other shapes, or the two keep another number of rows.
        """
        if not isinstance(other, RunningStats):
            raise StatsError(f"RunningStats merge with RunningStats, got {type(other).__name__}")
        if self.exact_rows != other.exact_rows:
            raise StatsError(f"the parts keep {self.exact_rows} and {other.exact_rows} exact_rows; use one number")
        parts = [part for part in (self, other) if part.count]
        if len({part.shape for part in (self, other) if part.shape is not None}) > 1:
            raise StatsError(f"rows of shape {self.shape} and {other.shape} cannot be merged")
        both = RunningStats(self.shape or other.shape, exact_rows=self.exact_rows)
        if sum(part.count for part in parts) > self.exact_rows:
            need_sketches(self.exact_rows)
        for part in parts:
            both._moments = part.moments if both._moments is None else both._moments + part.moments
            both._min = np.minimum(both._min, part._min) if both._min.size else part._min
            both._max = np.maximum(both._max, part._max) if both._max.size else part._max
            both._kept += part._kept
        both._sketches = [Sketch() for _ in both._min] if any(part._sketches for part in parts) else []
        for part in parts:
            for mine, theirs in zip(both._sketches, part._sketches, strict=False):
                mine.merge(theirs)
        both._forget()
        return both

    def _settle(self) -> None:
        """Move the rows that wait into the moments, and into the rows kept or the sketches."""
        if not self._pending:
            return
        rows = np.concatenate(self._pending)
        self._pending, self._waiting = [], 0
        moments = Moments.of(rows)
        low, high = rows.min(axis=0).astype(np.float64), rows.max(axis=0).astype(np.float64)
        if self._moments is None:
            self._moments, self._min, self._max = moments, low, high
        else:
            self._moments = self._moments + moments
            self._min, self._max = np.minimum(self._min, low), np.maximum(self._max, high)
        self._kept.append(rows)
        self._forget()

    def _forget(self) -> None:
        """Beyond `exact_rows`, put the rows kept into sketches."""
        if not self._sketches and self.count <= self.exact_rows:
            return
        self._sketches = self._sketches or [Sketch() for _ in self._min]
        while self._kept:
            columns = np.sort(self._kept.pop().T.astype(np.float64), axis=1)  # halves the time of a sketch
            for sketch, column in zip(self._sketches, columns, strict=True):
                sketch.update(column)

    @property
    def count(self) -> int:
        """Rows so far."""
        return (0 if self._moments is None else self._moments.count) + self._waiting

    @property
    def exact(self) -> bool:
        """Whether quantiles are exact: not more than `exact_rows` rows so far."""
        return self.count <= self.exact_rows

    @property
    def rank_error(self) -> float:
        """Largest error of the rank of a quantile, as a share of the rows: 0.0 while all rows are kept."""
        return 0.0 if self.exact else RANK_ERROR

    @property
    def moments(self) -> Moments:
        """Exact sums of each number of a row, flat."""
        self._settle()
        if self._moments is None:
            raise StatsError("there are no statistics of no rows; call update(rows) first")
        return self._moments

    @property
    def mean(self) -> np.ndarray:
        """Mean, float64 of `shape`."""
        return self._shaped(self.moments.mean)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation (`ddof=0`), float64 of `shape`."""
        return self._shaped(self.moments.std)

    @property
    def min(self) -> np.ndarray:
        """Smallest values, float64 of `shape`."""
        return self._shaped(self._min) if self.moments else self._min

    @property
    def max(self) -> np.ndarray:
        """Largest values, float64 of `shape`."""
        return self._shaped(self._max) if self.moments else self._max

    def quantile(self, q) -> np.ndarray:
        """Any quantile.

        Args:
            q: one number from 0 to 1, or several.

        Returns:
            float64 of `shape`, with one more axis in front for several q.
        """
        asked = finite_array(q, "quantiles")
        if asked.ndim > 1 or (asked < 0).any() or (asked > 1).any():
            raise StatsError(f"quantiles are numbers from 0 to 1, got {q}")
        several = np.atleast_1d(asked)
        columns = range(len(self.moments.sums))
        found = np.stack([self._quantiles(column, several) for column in columns], axis=1)
        found = found.reshape(len(several), *(self.shape or ()))
        return found if asked.ndim else found[0]

    def _quantiles(self, column: int, q: np.ndarray) -> np.ndarray:
        if self._sketches:
            found = self._sketches[column].quantiles(q)
            return np.select([q == 0, q == 1], [self._min[column], self._max[column]], found)
        return np.quantile(self._column(column), q)

    def _column(self, column: int) -> np.ndarray:
        return np.concatenate([rows[:, column] for rows in self._kept]).astype(np.float64)

    def cumulative(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        """The distribution of one number of a row: its values rising, and how many rows are not above each of them.

        Beyond `exact_rows`, the values are a sample and the counts hold within `rank_error`.
        """
        self._settle()
        if self._sketches:
            return self._sketches[column].cumulative()
        values = np.sort(self._column(column))
        return values, np.arange(1, len(values) + 1)

    def _shaped(self, flat: np.ndarray) -> np.ndarray:
        return flat.reshape(self.shape or flat.shape).copy()

    def copy(self) -> RunningStats:
        """The same statistics; updating one leaves the other as it is."""
        return self.merge(RunningStats(exact_rows=self.exact_rows))

    def to_stats(self, mask=None, mode: str = "bounds_q99"):
        """`ActionStats` of these rows, which can be merged with others.

        Args:
            mask: (dof,) True where a dimension is to be normalized; all if None.
            mode: how the statistics will be used.
        """
        from hf_vla_actions.actions.stats import ActionStats

        return ActionStats.from_running(self, mask=mask, mode=mode)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values of the whole state; inverse of `from_dict`, the same for any order of exact rows."""
        self._settle()
        state: dict[str, Any] = {"exact_rows": self.exact_rows, "shape": self.shape and list(self.shape)}
        state["count"] = self.count
        if self._sketches:
            state["sums"] = running_json.write_integers(self.moments.sums)
            state["squares"] = running_json.write_integers(self.moments.squares)
            state["min"], state["max"] = self._min.tolist(), self._max.tolist()
            state["sketches"] = [running_json.write_bytes(sketch.to_bytes()) for sketch in self._sketches]
        elif self.count:
            state["columns"] = running_json.write_columns([self._column(i) for i in range(len(self._min))])
        return running_json.sign(state)

    @classmethod
    def from_dict(cls, state: Any) -> RunningStats:
        """Read what `to_dict` wrote; anything else, or a state that was damaged, is a StatsError."""
        state = running_json.checked(state)
        shape = state["shape"] and tuple(state["shape"])
        stats = cls(shape, exact_rows=state["exact_rows"])
        n_columns, count = math.prod(shape or ()), state["count"]
        if "sketches" in state:
            sums, squares = (tuple(running_json.read_integers(state[name])) for name in ("sums", "squares"))
            stats._moments = Moments(count, sums, squares)
            stats._min, stats._max = (np.array(state[name], dtype=np.float64) for name in ("min", "max"))
            stats._sketches = [Sketch.from_bytes(running_json.read_bytes(data)) for data in state["sketches"]]
            sizes = {len(sums), len(squares), stats._min.size, stats._max.size, len(stats._sketches), n_columns}
            if len(sizes) != 1 or {sketch.count for sketch in stats._sketches} != {count}:
                raise StatsError(f"the state of running statistics contradicts itself: {count} rows of shape {shape}")
        elif count:
            stats.update(running_json.read_columns(state["columns"], count, n_columns).reshape(count, *shape))
        return stats


def merged(parts: Iterable[RunningStats]) -> RunningStats:
    """All parts in one."""
    parts = list(parts)
    if not parts:
        raise StatsError("there are no statistics to merge")
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def _narrow(rows: np.ndarray) -> np.ndarray:
    """A copy in float32 where that holds the same numbers, half the memory; -0.0 becomes 0.0."""
    rows = rows + 0.0
    with np.errstate(over="ignore"):
        short = rows.astype(np.float32)
    return short if (short == rows).all() else rows
