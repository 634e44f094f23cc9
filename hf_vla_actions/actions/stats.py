"""Statistics of one vector, and the pair `normalize` / `unnormalize` that they define."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hf_vla_actions.actions.running import EXACT_ROWS, RunningStats, finite_array
from hf_vla_actions.actions.stats_report import report_text
from hf_vla_actions.errors import StatsError

MODES = ("bounds_q99", "bounds", "normal")
VECTORS = ("mean", "std", "min", "max", "q01", "q99")
NEEDED = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max"), "normal": ("mean", "std")}


@dataclass(frozen=True, eq=False)
class ActionStats:
    """Statistics of an action (or proprio) vector, each (dof,) float64, and how they are used.

    Statistics of every step of a chunk (horizon-indexed, as those of actions relative to a state need) are
    (horizon, dof), and normalize chunks (..., horizon, dof); `mask` stays (dof,).

    `mode` says which of them define the normalized space: "bounds_q99" (q01..q99 to [-1, 1]; OpenVLA's default),
    "bounds" (min..max to [-1, 1]) or "normal" (mean 0, std 1). It is stored, so that `normalize` and `unnormalize`
    can never disagree. `mask` is True where a dimension is normalized; the others (usually the gripper) pass through
    unchanged. Statistics that are not known are None.

    The rules are OpenVLA's (openvla/openvla, `prismatic/vla/datasets/rlds/utils/data_utils.py`): bounds clip to
    [-1, 1] on the way in; a constant dimension normalizes to 0 and un-normalizes to its constant, so the way there
    and back is the identity on it and no token can move it.

    Statistics that were computed here carry what they were computed from (`running`), so that they can be merged and
    asked for any quantile. It is neither written nor compared.
    """

    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    min: np.ndarray | None = None
    max: np.ndarray | None = None
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    mask: np.ndarray | None = None
    count: int | None = None
    mode: str = "bounds_q99"
    running: RunningStats | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.mode not in MODES:
            raise StatsError(f"mode must be one of {list(MODES)}, got {self.mode!r}")
        sizes: dict[str, Any] = {}
        for name in VECTORS:
            vector = getattr(self, name)
            if vector is not None:
                sizes[name] = self._freeze(name, vector, np.float64).shape
        missing = [name for name in NEEDED[self.mode] if name not in sizes]
        if missing:
            raise StatsError(f"mode {self.mode!r} needs {missing}, and only {sorted(sizes)} are given")
        shape = sizes[NEEDED[self.mode][0]]
        mask = np.ones(shape[-1], dtype=bool) if self.mask is None else self.mask
        masked = self._freeze("mask", mask, bool).shape
        if set(sizes.values()) != {shape} or masked != shape[-1:]:
            raise StatsError(f"statistics of different sizes, their shapes are {sizes | {'mask': masked}}")
        low, high = (getattr(self, name) for name in NEEDED[self.mode])
        if self.mode == "normal" and (high < 0).any():
            raise StatsError(f"std must not be negative, got {high.tolist()}")
        if self.mode != "normal" and (high < low).any():
            names = NEEDED[self.mode]
            places = np.argwhere(high < low)
            where = places.ravel() if low.ndim == 1 else places
            raise StatsError(f"{names[0]} is above {names[1]} in dimensions {where.tolist()}")

    def _freeze(self, name: str, value, dtype) -> np.ndarray:
        try:
            vector = np.array(value, dtype=dtype)
        except (TypeError, ValueError):
            raise StatsError(f"{name} must be a list of numbers, got {value!r}") from None
        if not vector.size or vector.ndim > 2 or (vector.ndim != 1 and dtype is bool) or vector.ndim == 0:
            expected = "(dof,)" if dtype is bool else "(dof,), or (horizon, dof)"
            raise StatsError(f"{name} must be a vector {expected}, got shape {vector.shape}")
        if dtype is np.float64 and not np.isfinite(vector).all():
            raise StatsError(f"{name} has NaN or infinite entries: {vector.tolist()}")
        vector.setflags(write=False)
        object.__setattr__(self, name, vector)
        return vector

    @classmethod
    def compute(cls, array, mask=None, mode: str = "bounds_q99") -> ActionStats:
        """Statistics of all rows of `array`.

        Args:
            array: (..., dof) in real units; every leading axis is counted.
            mask: (dof,) True where a dimension is to be normalized; all if None.
            mode: how the statistics will be used.

        Quantiles are the true ones of all rows (linear interpolation, as `numpy.quantile`). Of more than a million rows
        they are too, but such statistics do not keep the rows and cannot be merged; `RunningStats` can, and it has
        statistics of every step of a chunk.
        """
        rows = finite_array(array, "the data")
        if rows.ndim < 2 or not rows.size:
            raise StatsError(f"statistics need rows of actions (n, dof), got shape {rows.shape}")
        rows = rows.reshape(-1, rows.shape[-1])
        running = RunningStats(rows.shape[-1], exact_rows=max(EXACT_ROWS, len(rows)))
        running.update(rows)
        stats = cls.from_running(running, mask=mask, mode=mode)
        return stats if len(rows) <= EXACT_ROWS else replace(stats, running=None)

    @classmethod
    def from_running(cls, running: RunningStats, mask=None, mode: str = "bounds_q99") -> ActionStats:
        """Statistics of the rows that `running` has seen so far; what it sees later changes nothing here."""
        running = running.copy()
        q01, q99 = running.quantile([0.01, 0.99])
        vectors = {"mean": running.mean, "std": running.std, "min": running.min, "max": running.max}
        return cls(**vectors, q01=q01, q99=q99, mask=mask, count=running.count, mode=mode, running=running)

    def merge(self, other: ActionStats) -> ActionStats:
        """Statistics of the rows of both, as if they had been computed together.

        Raises:
            StatsError: one of them does not know its rows (it was read from a file, say: quantiles do not follow from
                quantiles), or they are used in different ways.
        """
        for stats in (self, other):
            if not isinstance(stats, ActionStats):
                raise StatsError(f"ActionStats merge with ActionStats, got {type(stats).__name__}")
            if stats.running is None:
                raise StatsError(
                    "quantiles of a whole do not follow from quantiles of its parts: only statistics that know their rows "
                    "can be merged, not those from a file. Compute each part with `hf-vla stats DATASET --shard i/n --output part.json` "
                    "and merge the files with `hf-vla stats --merge part*.json`"
                )
        if self.mode != other.mode or not np.array_equal(np.asarray(self.mask), np.asarray(other.mask)):
            raise StatsError(
                f"statistics with mode {self.mode!r} and mask {np.asarray(self.mask).tolist()} do not merge with mode "
                f"{other.mode!r} and mask {np.asarray(other.mask).tolist()}; use dataclasses.replace on one of them"
            )
        mine, theirs = self.running, other.running
        return self.from_running(mine.merge(theirs), mask=self.mask, mode=self.mode)  # type: ignore[union-attr, arg-type]

    def quantile(self, q) -> np.ndarray:
        """Any quantile of the rows, (dof,), or (len(q), dof) for several q.

        Statistics that do not know their rows have those of 0, 0.01, 0.99 and 1 at most; others raise.
        """
        if self.running is not None:
            return self.running.quantile(q)
        known = {0.0: self.min, 0.01: self.q01, 0.99: self.q99, 1.0: self.max}
        found = [known.get(float(one)) for one in np.atleast_1d(finite_array(q, "quantiles"))]
        if any(vector is None for vector in found):
            have = [one for one, vector in known.items() if vector is not None]
            raise StatsError(
                f"these statistics were read, not computed: they have the quantiles {have}, asked was {q}"
            )
        return np.stack(found) if np.ndim(q) else np.array(found[0])  # type: ignore[arg-type]

    @classmethod
    def from_ranges(cls, low, high, mask=None) -> ActionStats:
        """Statistics of a robot whose limits are known instead of measured: low..high becomes [-1, 1]."""
        return cls(min=low, max=high, mask=mask, mode="bounds")

    @property
    def dof(self) -> int:
        """Numbers in one action."""
        return self._scale()[0].shape[-1]

    @property
    def horizon(self) -> int | None:
        """Steps of the chunks that have statistics of their own; None where all actions share them."""
        first = self._scale()[0]
        return None if first.ndim == 1 else len(first)

    @property
    def constant(self) -> np.ndarray:
        """(dof,) or (horizon, dof) bool: normalized dimensions that have only one value."""
        low, high = self._scale()
        same = high == low if self.mode != "normal" else high == 0
        if self.mode == "bounds_q99" and self.min is not None and self.max is not None:
            same = same | (self.min == self.max)
        return same & self.mask

    @property
    def _normalized(self) -> np.ndarray:
        """Bool, as `constant`: dimensions that are scaled: not masked, not constant."""
        return np.asarray(self.mask) & ~self.constant

    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = (getattr(self, name) for name in NEEDED[self.mode])
        return low, high

    def normalize(self, actions) -> np.ndarray:
        """Real units to normalized. (..., dof) to (..., dof) float64; inverse of `unnormalize` inside the bounds."""
        x = self._checked(actions, "actions")
        first, second = self._scale()
        if self.mode == "normal":
            normalized = (x - first) / np.where(self._normalized, second, 1.0)
        else:
            width = np.where(self._normalized, second - first, 1.0)
            normalized = np.clip(2.0 * (x - first) / width - 1.0, -1.0, 1.0)
        return np.where(self._normalized, normalized, np.where(self.constant, 0.0, x))

    def unnormalize(self, normalized) -> np.ndarray:
        """Normalized to real units. (..., dof) to (..., dof) float64; values outside [-1, 1] are extrapolated."""
        x = self._checked(normalized, "normalized actions")
        first, second = self._scale()
        if self.mode == "normal":
            actions = x * second + first
        else:
            actions = 0.5 * (x + 1.0) * (second - first) + first
        return np.where(self._normalized, actions, np.where(self.constant, first, x))

    def _checked(self, array, what: str) -> np.ndarray:
        x = finite_array(array, what)
        if x.ndim == 0 or x.shape[-1] != self.dof:
            raise StatsError(f"{what} of shape {x.shape} do not fit statistics of {self.dof} dimensions (last axis)")
        if self.horizon is not None and (x.ndim < 2 or x.shape[-2] != self.horizon):
            raise StatsError(
                f"{what} of shape {x.shape} do not fit statistics of {self.horizon} steps (last axis but one): each step "
                "of a chunk has its own"
            )
        return x

    def range_text(self) -> str:
        """The span of real values per dimension, for messages; over all steps where each has its own."""
        low, high = self._scale()
        if self.mode == "normal":
            low, high = low - 2 * high, low + 2 * high
        if self.horizon is not None:
            low, high = low.min(axis=0), high.max(axis=0)
        return "[" + ", ".join(f"{a:.3g}..{b:.3g}" for a, b in zip(low, high, strict=True)) + "]"

    def report(self, names: Sequence[str] | None = None, units: Sequence[str | None] | None = None) -> str:
        """What these statistics alone tell, as text: ranges, and which dimensions are odd.

        Named are constant dimensions, those as narrow as rounding, those whose extremes lie far beyond what is
        normalized, what q01..q99 clip, and two values that are scaled like continuous numbers. `hf-vla inspect DATASET`
        looks at the rows themselves.

        Args:
            names: (dof) names of the dimensions.
            units: (dof) their units, None where there is none.
        """
        return report_text(self, names, units)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; inverse of `from_dict`."""
        vectors = {name: getattr(self, name) for name in (*VECTORS, "mask")}
        values: dict[str, Any] = {name: v.tolist() for name, v in vectors.items() if v is not None}
        if self.count is not None:
            values["count"] = self.count
        return {**values, "mode": self.mode}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActionStats:
        """Read what `to_dict` wrote, or one vector's entry of an OpenVLA or Octo file (p01/p99 are q01/q99)."""
        known = {"p01": "q01", "p99": "q99"}
        fields = {known.get(name, name): value for name, value in values.items()}
        wanted = {name: fields[name] for name in (*VECTORS, "mask", "count", "mode") if name in fields}
        return cls(**wanted)

    def is_close(self, other: ActionStats, rtol: float = 1e-9) -> bool:
        """Whether two statistics are the same up to rounding, as those that another release computed of the same rows.

        Mode, mask, count and what is known have to be equal; each number may differ by `rtol` of the largest magnitude
        of its dimension (a mean near zero is rounded as coarsely as the rows that it is the mean of).
        """
        mine, theirs = self.to_dict(), other.to_dict()
        known = [name for name in VECTORS if name in mine]
        if mine.keys() != theirs.keys() or any(mine[name] != theirs[name] for name in mine.keys() - set(known)):
            return False
        rows, others = (np.array([stats[name] for name in known]) for stats in (mine, theirs))
        return rows.shape == others.shape and bool((np.abs(rows - others) <= rtol * np.abs(rows).max(axis=0)).all())

    def __eq__(self, other) -> bool:
        return isinstance(other, ActionStats) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]
