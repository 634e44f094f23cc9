"""Numbers clipped to a range and scaled to [-1, 1], with the share that was clipped: as CALVIN policies are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_vla_actions.actions.arrays import like, read_numbers
from hf_vla_actions.actions.stats import ActionStats
from hf_vla_actions.errors import ActionSpaceError

CALVIN_BOUND = 0.65


@dataclass(frozen=True, eq=False)
class Clipped:
    """How much of a data set lay outside a range.

    Args:
        share: (dof,) share of the numbers that were clipped.
        furthest: (dof,) largest distance from the range, in the numbers' units; 0 where nothing was clipped.
        names: names of the dimensions.
    """

    share: np.ndarray
    furthest: np.ndarray
    names: tuple[str, ...]

    def __str__(self) -> str:
        outside = [
            f"{name} {100 * share:.3g} % (by up to {far:.4g})"
            for name, share, far in zip(self.names, self.share, self.furthest, strict=True)
            if share > 0
        ]
        return f"clipped: {', '.join(outside) or 'nothing'}"


@dataclass(frozen=True, eq=False)
class ClippedRange:
    """A range per dimension that becomes [-1, 1]; numbers outside are clipped to it, and counted.

    Args:
        low: (dof,) lower ends, or one for all.
        high: (dof,) upper ends.
        keep: (dof,) bool, True where numbers stay as they are (the gripper).
        names: names of the dimensions, for the report.
    """

    low: Any
    high: Any
    keep: Any
    names: tuple[str, ...] = ()

    def __post_init__(self):
        keep = np.asarray(self.keep)
        if keep.dtype != bool or keep.ndim != 1 or not keep.size:
            raise ActionSpaceError(f"keep is one True or False for each dimension, got {self.keep!r}")
        try:
            low, high = (np.broadcast_to(read_numbers("the range", v), keep.shape) for v in (self.low, self.high))
        except ValueError:
            raise ActionSpaceError(
                f"low and high are one number or {keep.size}, got {self.low} and {self.high}"
            ) from None
        if (low[~keep] >= high[~keep]).any():
            dims = np.flatnonzero((low >= high) & ~keep).tolist()
            raise ActionSpaceError(f"low must be below high; in dimensions {dims} it is not: keep them as they are")
        names = tuple(self.names) or tuple(f"dimension {i}" for i in range(keep.size))
        if len(names) != keep.size:
            raise ActionSpaceError(f"{len(names)} names for {keep.size} dimensions")
        for name, value in {"low": low, "high": high, "keep": keep, "names": names}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def calvin(cls, names: Sequence[str] = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")) -> ClippedRange:
        """[-0.65, 0.65] to [-1, 1], the last dimension (gripper) kept: the setting of RoboVLMs for CALVIN.

        Source: Robot-VLAs/RoboVLMs, `norm_min`, `norm_max` of its configurations.
        """
        keep = np.arange(len(names)) == len(names) - 1
        return cls(-CALVIN_BOUND, CALVIN_BOUND, keep, tuple(names))

    @classmethod
    def percentiles(cls, stats: ActionStats, names: Sequence[str] = ()) -> ClippedRange:
        """q01..q99 of statistics; what they do not normalize (their mask) or what has one value is kept."""
        if stats.q01 is None or stats.q99 is None:
            raise ActionSpaceError("these statistics have no q01 and q99: compute them from the actions")
        keep = ~np.asarray(stats.mask) | (stats.q01 >= stats.q99)
        return cls(stats.q01, stats.q99, keep, tuple(names))

    def normalize(self, actions: Any) -> tuple[Any, Clipped]:
        """(..., dof) to [-1, 1], and what was clipped on the way; inverse of `unnormalize` inside the range."""
        x = self._checked(actions)
        rows = x.reshape(-1, x.shape[-1])
        beyond = np.where(self.keep, 0.0, np.maximum(np.maximum(self.low - rows, rows - self.high), 0.0))
        empty = np.zeros((1, x.shape[-1]))
        beyond = beyond if len(beyond) else empty
        report = Clipped((beyond > 0).mean(0), beyond.max(0), self.names)
        scaled = 2 * (np.clip(x, self.low, self.high) - self.low) / self._width - 1
        return like(actions)(np.where(self.keep, x, scaled)), report

    def unnormalize(self, normalized: Any) -> Any:
        """[-1, 1] back to (..., dof) in the range; numbers beyond go beyond it."""
        x = self._checked(normalized)
        return like(normalized)(np.where(self.keep, x, (x + 1) / 2 * self._width + self.low))

    @property
    def _width(self) -> np.ndarray:
        return np.where(self.keep, 1.0, self.high - self.low)

    def _checked(self, values: Any) -> np.ndarray:
        x = read_numbers("actions", values)
        if x.ndim < 1 or x.shape[-1] != len(self.names):
            raise ActionSpaceError(f"actions {x.shape} for a range of {len(self.names)} dimensions")
        return x
