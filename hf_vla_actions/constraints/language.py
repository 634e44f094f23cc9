"""The constraint language for one dimension: which values it may take at a step, in real units.

`narrow` is the hard part of a constraint (which values remain), `nats` its soft part (how much likelier each value
becomes). Constraints that couple steps or dimensions are in `coupled`, those made of others in `combined`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.base import Constraint, OfOneDimension, Part, Steps, plain
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.errors import ConstraintError

__all__ = ["Constraint", "Fix", "Forbid", "InSet", "OneDimensional", "Range", "Steps", "Target"]


@dataclass(frozen=True)
class OneDimensional(OfOneDimension):
    """A constraint that each step of one dimension satisfies or not, whatever the other numbers are.

    Args:
        dim: name or index of the dimension.
        steps: see `Constraint`.
    """

    def resolve(self, space: ActionSpace) -> OneDimensional:
        """The same constraint with the index of its dimension in `space`; a dimension it does not have raises."""
        return replace(self, dim=space.index(self.dim))

    def _expand(self, space, horizon, known, half_bin) -> list[Part]:
        self.steps_in(horizon)
        return [self.resolve(space)]

    def narrow(self, members: IntervalSet, half_bin: float) -> IntervalSet:
        """What remains of `members`, the values (real units) that are possible so far.

        `half_bin` is the tolerance of constraints that name single values without one: half a bin on the token
        grid, 0 where values are continuous.
        """
        return members

    def nats(self, values: np.ndarray) -> np.ndarray | None:
        """What to add to the log-probability of each value (real units, any shape); None if it only excludes."""
        return None

    @property
    def picks(self) -> bool:
        """True if it chooses among what the other constraints leave, and therefore comes last."""
        return False


@dataclass(frozen=True)
class _Bounds(OneDimensional):
    low: float | None = None
    high: float | None = None

    depths: ClassVar = {"low": 0, "high": 0}

    def _read(self) -> None:
        super()._read()
        self._set(
            low=self._numbers("low", self.low, none=-math.inf, infinite=True),
            high=self._numbers("high", self.high, none=math.inf, infinite=True),
        )

    def _check(self) -> None:
        low, high = self._ends
        if low > high or low == math.inf or high == -math.inf:
            raise self._refuse(f"low must not be above high, got low={low}, high={high}")

    @property
    def _ends(self) -> tuple[float, float]:
        return float(self.low), float(self.high)  # type: ignore[arg-type]

    def _interval(self) -> IntervalSet:
        return IntervalSet.from_pairs([self._ends])


@dataclass(frozen=True)
class Range(_Bounds):
    """low <= value <= high, both included; None or an infinity for no bound.

    Args:
        dim: name or index of the dimension.
        low: smallest value allowed, real units.
        high: largest value allowed, real units.
        steps: see `Constraint`.

    Example: `Range("x", -0.01, 0.01)`; `Range("x", low=[0.0, 0.01])` for a batch of two.
    """

    def narrow(self, members: IntervalSet, half_bin: float) -> IntervalSet:
        """The members within the bounds."""
        return members.intersect(self._interval())


@dataclass(frozen=True)
class Forbid(_Bounds):
    """Not low <= value <= high: a band that stays empty, its bounds included; None or an infinity for no bound.

    Args:
        dim: name or index of the dimension.
        low: lower bound of the band, real units.
        high: upper bound of the band, real units.
        steps: see `Constraint`.

    Example: `Forbid("yaw", -0.02, 0.02)`.
    """

    def narrow(self, members: IntervalSet, half_bin: float) -> IntervalSet:
        """The members outside the band."""
        return members.intersect(self._interval().complement())


@dataclass(frozen=True)
class InSet(OneDimensional):
    """One of a few values.

    Args:
        dim: name or index of the dimension.
        values: the values, real units; the same ones for all samples.
        tolerance: distance at which a value still counts. None: half a bin on the token grid (the value or values
            closest to it that a token can express), exact where values are continuous.
        steps: see `Constraint`.

    Example: `InSet("yaw", [-0.1, 0.0, 0.1])`.
    """

    values: Sequence[float]
    tolerance: float | None = None

    depths: ClassVar = {"tolerance": 0}

    def _read(self) -> None:
        super()._read()
        values = plain(self.values)
        if not isinstance(values, list):
            raise self._refuse(f"values must be a list of numbers, got {self.values!r}")
        if not values:
            raise self._refuse("values must hold at least one number")
        self._set(
            values=tuple(self._number("values", value) for value in values),
            tolerance=self._numbers("tolerance", self.tolerance, none=None, least="at least 0"),
        )

    def narrow(self, members: IntervalSet, half_bin: float) -> IntervalSet:
        """The members within the tolerance of one of the values."""
        return members.intersect(_around(self.values, self.tolerance, half_bin))


@dataclass(frozen=True)
class Fix(OneDimensional):
    """Exactly one value, or a state of the gripper.

    Args:
        dim: name or index of the dimension.
        value: the value in real units, or "open" or "closed" for the gripper's dimension, whatever its convention.
        tolerance: see `InSet`.
        steps: see `Constraint`.

    Example: `Fix("gripper", "open")`; `Fix("x", 0.01, steps=0)`.
    """

    value: float | str
    tolerance: float | None = None

    depths: ClassVar = {"value": 0, "tolerance": 0}

    def _read(self) -> None:
        super()._read()
        self._set(
            value=self._numbers("value", self.value),
            tolerance=self._numbers("tolerance", self.tolerance, none=None, least="at least 0"),
        )

    def _number(self, name: str, value, **rules):
        if name == "value" and isinstance(value, str):
            if value not in ("open", "closed"):
                raise self._refuse(f"value is a number, 'open' or 'closed', got {value!r}")
            return value
        return super()._number(name, value, **rules)

    def resolve(self, space: ActionSpace) -> OneDimensional:
        """Also turn "open" or "closed" into the number of this robot's gripper."""
        dim = space.index(self.dim)
        words = self.value if isinstance(self.value, tuple) else (self.value,)
        if not any(isinstance(word, str) for word in words):
            return replace(self, dim=dim)
        gripper = space.gripper
        if gripper is None or space.index(gripper.dim) != dim:
            which = "declares no gripper" if gripper is None else f"has its gripper in {space.describe(gripper.dim)}"
            raise ConstraintError(f"{self}: the action space {which}; give the value as a number")
        states = tuple(float(gripper.state(word)) if isinstance(word, str) else word for word in words)
        return replace(self, dim=dim, value=states if isinstance(self.value, tuple) else states[0])

    def narrow(self, members: IntervalSet, half_bin: float) -> IntervalSet:
        """The members within the tolerance of the value."""
        return members.intersect(_around([float(self.value)], self.tolerance, half_bin))


@dataclass(frozen=True)
class Target(OneDimensional):
    """A wanted value: a pull on the policy's distribution (soft), or the nearest value that is allowed (hard).

    Soft: adds -weight * (v - value)^2 / (2 sigma^2) nats to each value v, so that the distribution becomes the
    product of the policy's and a Gaussian (product of experts). It excludes nothing. Hard: only the member or members
    closest to the value among what the other constraints allow, if within the tolerance; hard targets of one
    dimension apply in the order given.

    Args:
        dim: name or index of the dimension.
        value: the value wanted, real units.
        sigma: standard deviation of the pull in real units; a soft target needs it, a hard one has none.
        hard: which of the two.
        weight: factor of the pull.
        max_nats: the pull takes at most this much from any value, so that a confident policy can overrule it.
        tolerance: of a hard target: how far the nearest allowed value may be; see `InSet` for None.
        steps: see `Constraint`.

    Example: `Target("x", 0.01, sigma=0.002)`.
    """

    value: float
    sigma: float | None = None
    hard: bool = False
    weight: float = 1.0
    max_nats: float | None = None
    tolerance: float | None = None

    depths: ClassVar = {"value": 0, "sigma": 0, "weight": 0, "max_nats": 0, "tolerance": 0}

    def _read(self) -> None:
        super()._read()
        self._set(
            value=self._numbers("value", self.value),
            sigma=self._numbers("sigma", self.sigma, none=None, least="above 0"),
            weight=self._numbers("weight", self.weight, least="above 0"),
            max_nats=self._numbers("max_nats", self.max_nats, none=None, least="above 0"),
            tolerance=self._numbers("tolerance", self.tolerance, none=None, least="at least 0"),
        )

    def _check(self) -> None:
        if not isinstance(self.hard, bool):
            raise self._refuse(f"hard is True or False, got {self.hard!r}")
        if self.hard and (self.sigma is not None or self.max_nats is not None or self.weight != 1.0):
            raise self._refuse("sigma, weight and max_nats belong to a soft target; leave them out with hard=True")
        if not self.hard and self.sigma is None:
            raise self._refuse("a soft target needs sigma, in real units (or hard=True)")
        if not self.hard and self.tolerance is not None:
            raise self._refuse("tolerance belongs to a hard target; a soft one excludes nothing")

    @property
    def is_hard(self) -> bool:
        """A soft target excludes nothing."""
        return self.hard

    @property
    def picks(self) -> bool:
        """A hard target chooses among what the other constraints leave."""
        return self.hard

    def narrow(self, members: IntervalSet, half_bin: float) -> IntervalSet:
        """Soft: all members. Hard: the closest member or members, if they are within the tolerance."""
        if not self.hard:
            return members
        return members.closest(self.value).intersect(_around([self.value], self.tolerance, half_bin))

    def nats(self, values: np.ndarray) -> np.ndarray | None:
        """Soft: the Gaussian pull on each value, in nats. Hard: None."""
        if self.hard or self.sigma is None:
            return None
        with np.errstate(over="ignore"):
            pull = -self.weight * ((values - self.value) / self.sigma) ** 2 / 2
        if self.max_nats is not None:
            return np.maximum(pull, -self.max_nats)
        return np.maximum(pull, -1e30)  # finite, also in float32: a pull excludes nothing


def _around(values: Sequence[float], tolerance: float | None, half_bin: float) -> IntervalSet:
    centers = np.array(values, dtype=np.float64)
    reach = np.full(centers.shape, half_bin if tolerance is None else tolerance)
    if tolerance is None and half_bin:
        # The outer values of a grid lie half a bin inside its bounds: rounding must not put the bounds out of reach.
        reach = reach * (1 + 1e-9) + 4 * np.spacing(np.abs(centers))
    return IntervalSet(np.stack([centers - reach, centers + reach], axis=1))
