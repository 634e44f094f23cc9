"""Constraints that couple steps or dimensions: Rate, MoveBy, Speed, Linear, Sticky; those of places are in `places`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.base import Constraint, OfDimensions, OfOneDimension, Part
from hf_vla_actions.constraints.language import Range
from hf_vla_actions.constraints.terms import Change, Hold, Known, Pull, WeightedSum
from hf_vla_actions.errors import ConstraintError

LONG_ENOUGH = 10**9  # steps that a gripper has kept its state if nobody has said


@dataclass(frozen=True)
class Rate(OfOneDimension):
    """|x[t] - x[t - 1]| <= max_step at its steps: a limit on how fast an action may change.

    Args:
        dim: name or index of the dimension.
        max_step: largest change from one step to the next, real units.
        from_last: the first step is compared with the action carried out last (`Context.last_action`). False: it is
            free, and only steps of the chunk are compared.
        steps: see `Constraint`; those whose change counts.

    Example: `Rate("x", 0.005)` with `Context(last_action=last_action)`.
    """

    max_step: float
    from_last: bool = True

    depths: ClassVar = {"max_step": 0}

    def _read(self) -> None:
        super()._read()
        self._set(max_step=self._numbers("max_step", self.max_step, least="at least 0"))
        if not isinstance(self.from_last, bool):
            raise self._refuse(f"from_last is True or False, got {self.from_last!r}")

    @property
    def needs(self) -> frozenset[str]:
        """The last action, if the first step is compared with it."""
        return frozenset({"last_action"} if self.from_last else ())

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        dim, steps = space.index(self.dim), self.steps_in(horizon)
        limits = np.full(horizon, np.inf)
        limits[steps] = self.max_step
        last = _last_value(self, space, known, dim) if self.from_last and 0 in steps else None
        if last is None:
            limits[0] = np.inf
        return [Change(dim, limits, last)]


@dataclass(frozen=True)
class MoveBy(OfOneDimension):
    """A total over the chunk: the deltas of its steps sum up to it.

    Args:
        dim: name or index of a delta dimension.
        total: wanted sum, real units.
        tolerance: hard: |sum - total| <= tolerance. None: half a bin on the token grid, exact to rounding elsewhere.
        sigma: makes it soft: a pull on each step, so that the total is spread around the wanted one by this much.
            At a step with n steps left (itself included) and S done, v gets
            -weight * (v - (total - S) / n)^2 / (2 sigma^2 / n) nats.
        weight: factor of the pull.
        steps: see `Constraint`; those that count towards the total.

    Example: `MoveBy("x", 0.05)`; `MoveBy("x", 0.05, sigma=0.005)`.
    """

    total: float
    tolerance: float | None = None
    sigma: float | None = None
    weight: float = 1.0

    depths: ClassVar = {"total": 0, "tolerance": 0, "sigma": 0, "weight": 0}

    def _read(self) -> None:
        super()._read()
        self._set(
            total=self._numbers("total", self.total),
            tolerance=self._numbers("tolerance", self.tolerance, none=None, least="at least 0"),
            sigma=self._numbers("sigma", self.sigma, none=None, least="above 0"),
            weight=self._numbers("weight", self.weight, least="above 0"),
        )

    def _check(self) -> None:
        if self.sigma is not None and self.tolerance is not None:
            raise self._refuse("tolerance belongs to the hard total and sigma to the soft one; give one of them")
        if self.sigma is None and self.weight != 1.0:
            raise self._refuse("weight is the factor of the soft total's pull; give sigma as well, in real units")

    @property
    def is_hard(self) -> bool:
        """With sigma it only pulls."""
        return self.sigma is None

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        dim, steps = space.index(self.dim), self.steps_in(horizon)
        _check_delta(self, space, dim)
        counted = np.zeros(horizon, dtype=bool)
        counted[steps] = True
        if self.sigma is not None:
            return [Pull(dim, counted, self.total, self.sigma, self.weight)]
        tolerance = self.tolerance
        if tolerance is None:
            size = max(1.0, abs(self.total))
            # Totals may lie exactly half a bin apart (two sums around 0): rounding must not exclude both.
            half = float(half_bin[dim]) * (1 + 1e-9) + 256 * np.spacing(abs(self.total))
            tolerance = half if half_bin[dim] > 0 else 1e-9 * size
        low, high = bounds_at([max(steps)], horizon, self.total - tolerance, self.total + tolerance)
        return [WeightedSum((dim,), np.ones(1), 1, low, high, cumulative=True, counted=counted)]


@dataclass(frozen=True)
class Speed(OfDimensions):
    """A limit on the length of one step: the norm over some delta dimensions is at most max.

    Args:
        dims: names or indices of delta dimensions, or a single one.
        max: largest norm of one step, real units; with `per_second` of one second, at the space's `rate_hz`.
        ord: 2 for the straight length, 1 for the sum of absolute values, "inf" (or infinity) for the largest of them.
        per_second: True: max is a speed (in units a second), divided by `space.rate_hz`.
        steps: see `Constraint`.

    Example: `Speed(["x", "y", "z"], 0.05, per_second=True)`: 5 cm a second.
    """

    max: float
    ord: int | float | str = 2
    per_second: bool = False

    depths: ClassVar = {"max": 0}

    def _read(self) -> None:
        super()._read()
        ord = "inf" if self.ord in ("inf", math.inf) else self.ord
        if isinstance(ord, bool) or ord not in (1, 2, "inf"):
            raise self._refuse(f"ord is 1, 2 or 'inf', got {self.ord!r}")
        if not isinstance(self.per_second, bool):
            raise self._refuse(f"per_second is True or False, got {self.per_second!r}")
        self._set(
            max=self._numbers("max", self.max, least="at least 0"), ord=ord if isinstance(ord, str) else int(ord)
        )

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        indices, steps = self.indices(space), self.steps_in(horizon)
        for i in indices:
            _check_delta(self, space, i)
        limit = self.max
        if self.per_second:
            if space.rate_hz is None:
                raise ConstraintError(
                    f"{self}: per_second needs the control rate; give ActionSpace(..., rate_hz=...) or a limit per step"
                )
            limit = self.max / space.rate_hz
        if len(indices) == 1 or self.ord == "inf":
            return [Range(i, -limit, limit, steps=self.steps) for i in indices]
        low, high = bounds_at(steps, horizon, -math.inf, limit)
        return [WeightedSum(tuple(indices), np.ones(len(indices)), "abs" if self.ord == 1 else 2, low, high)]


@dataclass(frozen=True)
class Linear(OfDimensions):
    """low <= weighted sum of some dimensions <= high: a plane, a virtual wall, or an axis of another frame.

    Args:
        dims: names or indices of dimensions, or a single one.
        weights: one a dimension (or one number for all), or (batch, dimensions).
        low: smallest sum, real units times weights; None for no bound.
        high: largest sum, likewise.
        cumulative: the sum of this step and all before it, plus `origin`, instead of this step alone.
        origin: of a cumulative sum: its value before the chunk.
        steps: see `Constraint`; those whose sum counts.

    Deltas in the frame of the tool, and a wall in the robot's frame: `weights` is the wall's row of the rotation
    from tool to robot, `origin` the position along it.

    Example: `Linear(["x", "y", "z"], rotation[2], low=0.02, cumulative=True, origin=height)`.
    """

    weights: Sequence[float]
    low: float | None = None
    high: float | None = None
    cumulative: bool = False
    origin: float = 0.0

    depths: ClassVar = {"weights": 1, "low": 0, "high": 0, "origin": 0}

    def _read(self) -> None:
        super()._read()
        if not isinstance(self.cumulative, bool):
            raise self._refuse(f"cumulative is True or False, got {self.cumulative!r}")
        self._set(
            weights=self._row("weights", self.weights, self.n_dims),
            low=self._numbers("low", self.low, none=-math.inf, infinite=True),
            high=self._numbers("high", self.high, none=math.inf, infinite=True),
            origin=self._numbers("origin", self.origin),
        )

    def _check(self) -> None:
        if self.low > self.high or self.low == math.inf or self.high == -math.inf:  # type: ignore[operator]
            raise self._refuse(f"low must not be above high, got low={self.low}, high={self.high}")
        if self.low == -math.inf and self.high == math.inf:
            raise self._refuse("give low, high or both")
        if not any(self.weights):
            raise self._refuse("all weights are 0")
        if self.origin and not self.cumulative:
            raise self._refuse("origin belongs to cumulative=True")

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        low, high = bounds_at(self.steps_in(horizon), horizon, float(self.low), float(self.high))  # type: ignore[arg-type]
        weights = np.array(self.weights, dtype=np.float64)
        return [
            WeightedSum(
                tuple(self.indices(space)), weights, 1, low, high, cumulative=self.cumulative, origin=self.origin
            )
        ]


@dataclass(frozen=True)
class Sticky(OfOneDimension):
    """A gripper that does not flutter: it keeps each state for a while, and changes it a few times at most.

    Args:
        dim: name or index of the gripper's dimension; its state is the nearer of open and closed.
        min_hold: steps for which a state is kept before it may change, counted from before the chunk
            (`Context.held_steps`; unknown means long enough).
        max_switches: changes of state within a chunk; None for any number.
        hysteresis: a change needs more than this probability of the other state under the policy; 0 <= p < 1.

    It holds for the whole chunk and has no steps. It needs `Context.last_action`.

    Example: `Sticky("gripper", min_hold=5)` with `Context(last_action=last_action, held_steps=2)`.
    """

    min_hold: int = 1
    max_switches: int | None = None
    hysteresis: float | None = None

    depths: ClassVar = {"min_hold": 0, "max_switches": 0, "hysteresis": 0}

    def _read(self) -> None:
        super()._read()
        if self.steps is not None:
            raise self._refuse("a state is kept over the whole chunk: it has no steps")
        self._set(
            min_hold=self._numbers("min_hold", self.min_hold, whole=True, least="at least 1"),
            max_switches=self._numbers("max_switches", self.max_switches, none=None, whole=True, least="at least 0"),
            hysteresis=self._numbers("hysteresis", self.hysteresis, none=None, least="at least 0"),
        )

    def _check(self) -> None:
        if self.hysteresis is not None and self.hysteresis >= 1:
            raise self._refuse(f"hysteresis is a probability below 1, got {self.hysteresis}")

    @property
    def needs(self) -> frozenset[str]:
        """The last action, for the state before the chunk."""
        return frozenset({"last_action"})

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        dim, gripper = space.index(self.dim), space.gripper
        if gripper is None or space.index(gripper.dim) != dim:
            has = "declares no gripper" if gripper is None else f"has its gripper in {space.describe(gripper.dim)}"
            raise ConstraintError(f"{self}: the action space {has}; give ActionSpace(..., gripper=Gripper(...))")
        if gripper.relative:
            raise ConstraintError(f"{self}: a relative gripper has commands, no state to hold: see Gripper(sticky=)")
        last = _last_value(self, space, known, dim)
        held = LONG_ENOUGH if known.held_steps is None else int(known.held_steps)
        opened, closed = float(gripper.open), float(gripper.closed)
        return [Hold(dim, opened, closed, self.min_hold, self.max_switches, last, held, self.hysteresis)]


def bounds_at(steps: list[int], horizon: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """(horizon,) bounds that are open but at `steps`."""
    lows, highs = np.full(horizon, -np.inf), np.full(horizon, np.inf)
    lows[steps], highs[steps] = low, high
    return lows, highs


def _last_value(constraint: Constraint, space: ActionSpace, known: Known, i: int) -> float:
    if known.last_action is None or not np.isfinite(known.last_action[i]):
        free = ", or from_last=False to leave the first step free" if isinstance(constraint, Rate) else ""
        raise ConstraintError(
            f"{constraint}: needs the action carried out last, for {space.describe(i)}; pass "
            f"Context(last_action=...) with the call{free}"
        )
    return float(known.last_action[i])


def _check_delta(constraint: Constraint, space: ActionSpace, i: int) -> None:
    if space.delta[i] is None:
        raise ConstraintError(
            f"{constraint}: nobody has said whether {space.describe(i)} is a change or a position; declare it: "
            "ActionSpace(names, units, delta=...)"
        )
    if not space.delta[i]:
        raise ConstraintError(
            f"{constraint}: {space.describe(i)} is a position, not a change per step; use Range, Rate or Workspace"
        )
