"""Constraints on where the robot is and how it gets there: Workspace, KeepOut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.base import Constraint, OfDimensions, Part
from hf_vla_actions.constraints.coupled import bounds_at
from hf_vla_actions.constraints.language import Range
from hf_vla_actions.constraints.terms import Known, WeightedSum, Zone
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError


@dataclass(frozen=True)
class Workspace(OfDimensions):
    """The robot stays between low and high: low <= pose + sum of the deltas so far <= high at its steps.

    Args:
        dims: names or indices of dimensions, or a single one. Delta dimensions need `Context.pose`; absolute ones are
            the position themselves. A space in the frame "tcp" is refused: its axes turn with the tool.
        low: lowest position, one number or one a dimension, or (batch, dimensions); None for no bound. Real units.
        high: highest position, likewise.
        on_outside: where the robot is outside already. "raise": an error, if step 0 counts. "recover": it may not go
            further outside than it is now. "return": the bounds stay as they are, its first counted step has to lie
            within.
        steps: see `Constraint`; those whose position counts.

    Example: `Workspace(["x", "y"], [-0.2, -0.3], 0.3)` with `Context(pose={"x": 0.1, "y": 0.0})`.
    """

    low: float | Sequence[float] | None = None
    high: float | Sequence[float] | None = None
    on_outside: str = "raise"

    depths: ClassVar = {"low": 1, "high": 1}

    def _read(self) -> None:
        super()._read()
        self._set(
            low=self._row("low", self.low, self.n_dims, none=-math.inf, infinite=True),
            high=self._row("high", self.high, self.n_dims, none=math.inf, infinite=True),
        )
        if self.on_outside not in ("raise", "recover", "return"):
            raise self._refuse(f"on_outside is 'raise', 'recover' or 'return', got {self.on_outside!r}")

    def _check(self) -> None:
        _check_box(self)

    @property
    def needs(self) -> frozenset[str]:
        """The pose (for delta dimensions)."""
        return frozenset({"pose"})

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        steps = self.steps_in(horizon)
        parts: list[Part] = []
        for i, low, high in zip(self.indices(space), self.low, self.high, strict=True):  # type: ignore[arg-type]
            if _is_position(self, space, i):
                parts.append(Range(i, low, high, steps=self.steps))
            elif low > -math.inf or high < math.inf:  # a dimension without bounds needs no pose
                parts.append(self._sum(space, known, i, low, high, horizon, steps))
        return parts

    def _sum(self, space, known, i: int, low: float, high: float, horizon: int, steps: list[int]) -> WeightedSum:
        origin = _pose(self, space, known, i)
        if not low <= origin <= high:
            if self.on_outside == "raise" and 0 in steps:
                raise self._outside(space, i, low, high, origin)
            if self.on_outside == "recover":
                low, high = min(low, origin), max(high, origin)
        lows, highs = bounds_at(steps, horizon, low, high)
        return WeightedSum((i,), np.ones(1), 1, lows, highs, cumulative=True, origin=origin)

    def _outside(self, space: ActionSpace, i: int, low: float, high: float, origin: float):
        face, bound = ("low", low) if origin < low else ("high", high)
        return InfeasibleConstraintError(
            sample=0,
            step=0,
            dim=space.describe(i),
            names=(str(self),),
            wanted=f"a position in {low:g}..{high:g}",
            reachable=(origin, origin),
            nearest=origin,
            bin_width=None,
            unit=space.units[i],
            suggestion=f"The pose {origin:.6g} is already outside the {face} face by {abs(origin - bound):.3g}: give "
            'on_outside="recover" to go on from there, never further outside',
        )


@dataclass(frozen=True)
class KeepOut(OfDimensions):
    """A box that the robot does not touch, not even on the straight way from one step to the next.

    Args:
        dims: one to three names or indices. Delta dimensions are summed up from the pose, absolute ones are the
            position themselves; both need `Context.pose`. A space in the frame "tcp" is refused.
        low: lowest corner, one number or one a dimension, or (batch, dimensions). Real units.
        high: highest corner, likewise. For a wall without a back side use `Workspace`.
        margin: the box is this much larger on every side.
        steps: see `Constraint`; those whose piece of the way (from the step before) counts.

    Example: `KeepOut(["x", "y"], [0.1, -0.05], [0.2, 0.05], margin=0.01)` with `Context(pose={"x": 0, "y": 0})`.
    """

    low: float | Sequence[float]
    high: float | Sequence[float]
    margin: float = 0.0

    depths: ClassVar = {"low": 1, "high": 1, "margin": 0}

    def _read(self) -> None:
        super()._read()
        if self.n_dims > 3:
            raise self._refuse(f"a box has one to three dimensions, got {self.n_dims}")
        self._set(
            low=self._row("low", self.low, self.n_dims),
            high=self._row("high", self.high, self.n_dims),
            margin=self._numbers("margin", self.margin, least="at least 0"),
        )

    def _check(self) -> None:
        _check_box(self)

    @property
    def needs(self) -> frozenset[str]:
        """The pose, from where the way begins."""
        return frozenset({"pose"})

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        indices = self.indices(space)
        delta = np.array([not _is_position(self, space, i) for i in indices])
        origin = np.array([_pose(self, space, known, i) for i in indices])
        steps = np.zeros(horizon, dtype=bool)
        steps[self.steps_in(horizon)] = True
        low, high = np.array(self.low) - self.margin, np.array(self.high) + self.margin
        return [Zone(tuple(indices), low, high, origin, delta, steps)]


def _check_box(box: Workspace | KeepOut) -> None:
    for dim, low, high in zip(box.dims, box.low, box.high, strict=True):  # type: ignore[arg-type]
        if low > high or low == math.inf or high == -math.inf:
            raise box._refuse(f"low must not be above high, got low={low}, high={high} for {dim!r}")


def _pose(constraint: Constraint, space: ActionSpace, known: Known, i: int) -> float:
    if known.pose is None or not np.isfinite(known.pose[i]):
        raise ConstraintError(
            f"{constraint}: needs to know where {space.describe(i)} is now; pass "
            f"Context(pose={{{space.names[i]!r}: ...}}) with the call"
        )
    return float(known.pose[i])


def _is_position(constraint: Constraint, space: ActionSpace, i: int) -> bool:
    """Whether the number is a position (True) or a change of it (False), in axes that stay where they are."""
    if space.delta[i] is None:
        raise ConstraintError(
            f"{constraint}: nobody has said whether {space.describe(i)} is a change or a position; declare it: "
            "ActionSpace(names, units, delta=...), or use Linear(..., cumulative=True)"
        )
    if space.frame == "tcp":
        raise ConstraintError(
            f"{constraint}: {space.describe(i)} moves along axes that turn with the tool; use "
            "Linear(dims, weights, ..., cumulative=True) with the rows of the rotation from tool to base as weights"
        )
    return not space.delta[i]
