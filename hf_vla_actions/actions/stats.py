"""Statistics of one vector, and the pair `normalize` / `unnormalize` that they define."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_vla_actions.errors import StatsError

MODES = ("bounds_q99", "bounds", "normal")
VECTORS = ("mean", "std", "min", "max", "q01", "q99")
NEEDED = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max"), "normal": ("mean", "std")}


@dataclass(frozen=True, eq=False)
class ActionStats:
    """Statistics of an action (or proprio) vector, each (dof,) float64, and how they are used.

    `mode` says which of them define the normalized space: "bounds_q99" (q01..q99 to [-1, 1]; OpenVLA's default),
    "bounds" (min..max to [-1, 1]) or "normal" (mean 0, std 1). It is stored, so that `normalize` and `unnormalize`
    can never disagree. `mask` is True where a dimension is normalized; the others (usually the gripper) pass through
    unchanged. Statistics that are not known are None.

    The rules are OpenVLA's (openvla/openvla, `prismatic/vla/datasets/rlds/utils/data_utils.py`): bounds clip to
    [-1, 1] on the way in; a constant dimension normalizes to 0 and un-normalizes to its constant, so the way there
    and back is the identity on it and no token can move it.
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

    def __post_init__(self):
        if self.mode not in MODES:
            raise StatsError(f"mode must be one of {list(MODES)}, got {self.mode!r}")
        sizes = {}
        for name in VECTORS:
            vector = getattr(self, name)
            if vector is not None:
                sizes[name] = len(self._freeze(name, vector, np.float64))
        missing = [name for name in NEEDED[self.mode] if name not in sizes]
        if missing:
            raise StatsError(f"mode {self.mode!r} needs {missing}, and only {sorted(sizes)} are given")
        dof = sizes[NEEDED[self.mode][0]]
        mask = np.ones(dof, dtype=bool) if self.mask is None else self.mask
        sizes["mask"] = len(self._freeze("mask", mask, bool))
        if set(sizes.values()) != {dof}:
            raise StatsError(f"statistics of different sizes: {sizes}")
        low, high = (getattr(self, name) for name in NEEDED[self.mode])
        if self.mode == "normal" and (high < 0).any():
            raise StatsError(f"std must not be negative, got {high.tolist()}")
        if self.mode != "normal" and (high < low).any():
            names = NEEDED[self.mode]
            raise StatsError(f"{names[0]} is above {names[1]} in dimensions {np.flatnonzero(high < low).tolist()}")

    def _freeze(self, name: str, value, dtype) -> np.ndarray:
        try:
            vector = np.array(value, dtype=dtype)
        except (TypeError, ValueError):
            raise StatsError(f"{name} must be a list of numbers, got {value!r}") from None
        if vector.ndim != 1 or not vector.size:
            raise StatsError(f"{name} must be a vector (dof,), got shape {vector.shape}")
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

        Quantiles are the true ones of all rows (linear interpolation, as `numpy.quantile`).
        """
        rows = _finite(array, "the data")
        if rows.ndim < 2 or not rows.size:
            raise StatsError(f"statistics need rows of actions (n, dof), got shape {rows.shape}")
        rows = rows.reshape(-1, rows.shape[-1])
        q01, q99 = np.quantile(rows, [0.01, 0.99], axis=0)
        return cls(
            mean=rows.mean(0),
            std=rows.std(0),
            min=rows.min(0),
            max=rows.max(0),
            q01=q01,
            q99=q99,
            mask=mask,
            count=len(rows),
            mode=mode,
        )

    @classmethod
    def from_ranges(cls, low, high, mask=None) -> ActionStats:
        """Statistics of a robot whose limits are known instead of measured: low..high becomes [-1, 1]."""
        return cls(min=low, max=high, mask=mask, mode="bounds")

    @property
    def dof(self) -> int:
        """Numbers in one vector."""
        return len(self._scale()[0])

    @property
    def constant(self) -> np.ndarray:
        """(dof,) bool: normalized dimensions that have only one value."""
        low, high = self._scale()
        same = high == low if self.mode != "normal" else high == 0
        if self.mode == "bounds_q99" and self.min is not None and self.max is not None:
            same = same | (self.min == self.max)
        return same & self.mask

    @property
    def _normalized(self) -> np.ndarray:
        """(dof,) bool: dimensions that are scaled: not masked, not constant."""
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
        x = _finite(array, what)
        if x.ndim == 0 or x.shape[-1] != self.dof:
            raise StatsError(f"{what} of shape {x.shape} do not fit statistics of {self.dof} dimensions (last axis)")
        return x

    def range_text(self) -> str:
        """The span of real values per dimension, for messages."""
        low, high = self._scale()
        if self.mode == "normal":
            low, high = low - 2 * high, low + 2 * high
        return "[" + ", ".join(f"{a:.3g}..{b:.3g}" for a, b in zip(low, high, strict=True)) + "]"

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

    def __eq__(self, other) -> bool:
        return isinstance(other, ActionStats) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _finite(array, what: str) -> np.ndarray:
    x = np.asarray(array, dtype=np.float64)
    if not np.isfinite(x).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise StatsError(f"{what} have NaN or infinite values, first at index {index}")
    return x
