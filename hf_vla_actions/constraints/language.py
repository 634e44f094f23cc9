"""The constraint language: what may be asked of one dimension of an action, in real units.

Every constraint is a small frozen dataclass about one dimension. `narrow` is its hard part (which values remain),
`nats` its soft part (how much likelier each value becomes); the units are those of `ActionSpace`, never normalized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.errors import ConstraintError

Steps = int | slice | Sequence[int] | None
WHOLE = (int, np.integer)


@dataclass(frozen=True)
class Constraint:
    """What all constraints share: a dimension, the steps of the chunk, JSON. Use one of the subclasses.

    Args:
        dim: name or index of the dimension.
        steps: steps of the chunk it holds for: None for all, an int, a slice or a sequence of ints; negative ones
            count from the end of the chunk.
    """

    dim: str | int
    steps: Steps = field(default=None, kw_only=True)

    def __post_init__(self):
        if not isinstance(self.dim, (str, *WHOLE)) or isinstance(self.dim, bool):
            raise ConstraintError(f"dim is the name or index of a dimension, got {self.dim!r}")
        self._set(dim=self.dim if isinstance(self.dim, str) else int(self.dim), steps=_read_steps(self.steps))

    def _set(self, **values) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _refuse(self, what: str) -> ConstraintError:
        return ConstraintError(f"{type(self).__name__} of dimension {self.dim!r}: {what}")

    def _number(self, name: str, value, infinite: bool = False) -> float:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (float, np.floating, *WHOLE)):
            raise self._refuse(f"{name} must be a number, got {value!r}")
        number = float(value)
        if math.isnan(number) or (math.isinf(number) and not infinite):
            raise self._refuse(f"{name} must be finite, got {number}")
        return number

    def _optional(self, name: str, value, least: str) -> float | None:
        if value is None:
            return None
        number = self._number(name, value)
        if number < 0 or (least == "above 0" and number == 0):
            raise self._refuse(f"{name} must be {least}, got {number}")
        return number

    def steps_in(self, horizon: int) -> list[int]:
        """The steps it holds for in a chunk of `horizon` actions; steps outside the chunk raise."""
        steps = self.steps
        if steps is None:
            return list(range(horizon))
        if isinstance(steps, slice):
            chosen = list(range(horizon)[steps])
            outside = not chosen or any(abs(bound) > horizon for bound in (steps.start or 0, steps.stop or 0))
        else:
            wanted = [steps] if isinstance(steps, int) else list(steps)
            chosen = sorted({step % horizon for step in wanted})
            outside = any(not -horizon <= step < horizon for step in wanted)
        if outside:
            raise ConstraintError(f"{self}: its steps are not all in a chunk of {horizon} (0..{horizon - 1})")
        return chosen

    def resolve(self, space: ActionSpace) -> Constraint:
        """The same constraint with the index of its dimension in `space`; a dimension it does not have raises."""
        return replace(self, dim=space.index(self.dim))

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, tagged with the type; inverse of `constraint_from_dict`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
            elif isinstance(value, slice):
                values[name] = {"start": value.start, "stop": value.stop, "step": value.step}
            elif isinstance(value, float) and math.isinf(value):
                values[name] = None  # JSON has no infinity; None as a bound means the same
        return {"type": type(self).__name__, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Constraint:
        """Read what `to_dict` wrote; a constraint of another type than this class raises."""
        constraint = constraint_from_dict(values)
        if not isinstance(constraint, cls):
            raise ConstraintError(f"expected the description of a {cls.__name__}, got {values}")
        return constraint

    def __str__(self) -> str:
        parts = [repr(self.dim)]
        for f in sorted(fields(self), key=lambda f: f.name == "steps"):
            value = getattr(self, f.name)
            silent = value is None or value == f.default or value in (-math.inf, math.inf)
            if f.name != "dim" and not silent:
                parts.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True)
class _Bounds(Constraint):
    low: float | None
    high: float | None

    def __post_init__(self):
        super().__post_init__()
        low = -math.inf if self.low is None else self._number("low", self.low, infinite=True)
        high = math.inf if self.high is None else self._number("high", self.high, infinite=True)
        if low > high or low == math.inf or high == -math.inf:
            raise self._refuse(f"low must not be above high, got low={low}, high={high}")
        self._set(low=low, high=high)

    def _interval(self) -> IntervalSet:
        return IntervalSet.from_pairs([(float(self.low), float(self.high))])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Range(_Bounds):
    """low <= value <= high, both included; None or an infinity for no bound.

    Args:
        dim: name or index of the dimension.
        low: smallest value allowed, real units.
        high: largest value allowed, real units.
        steps: see `Constraint`.
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
    """

    def narrow(self, members: IntervalSet, half_bin: float) -> IntervalSet:
        """The members outside the band."""
        return members.intersect(self._interval().complement())


@dataclass(frozen=True)
class InSet(Constraint):
    """One of a few values.

    Args:
        dim: name or index of the dimension.
        values: the values, real units.
        tolerance: distance at which a value still counts. None: half a bin on the token grid (the value or values
            closest to it that a token can express), exact where values are continuous.
        steps: see `Constraint`.
    """

    values: Sequence[float]
    tolerance: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.values, (str, bytes)) or not np.iterable(self.values):
            raise self._refuse(f"values must be a list of numbers, got {self.values!r}")
        values = tuple(self._number("values", value) for value in self.values)
        if not values:
            raise self._refuse("values must hold at least one number")
        self._set(values=values, tolerance=self._optional("tolerance", self.tolerance, "at least 0"))

    def narrow(self, members: IntervalSet, half_bin: float) -> IntervalSet:
        """The members within the tolerance of one of the values."""
        return members.intersect(_around(self.values, self.tolerance, half_bin))


@dataclass(frozen=True)
class Fix(Constraint):
    """Exactly one value, or a state of the gripper: `Fix("gripper", "open")`.

    Args:
        dim: name or index of the dimension.
        value: the value in real units, or "open" or "closed" for the gripper's dimension, whatever its convention.
        tolerance: see `InSet`.
        steps: see `Constraint`.
    """

    value: float | str
    tolerance: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.value not in ("open", "closed"):
            if isinstance(self.value, str):
                raise self._refuse(f"value is a number, 'open' or 'closed', got {self.value!r}")
            self._set(value=self._number("value", self.value))
        self._set(tolerance=self._optional("tolerance", self.tolerance, "at least 0"))

    def resolve(self, space: ActionSpace) -> Constraint:
        """Also turn "open" or "closed" into the number of this robot's gripper."""
        dim = space.index(self.dim)
        if not isinstance(self.value, str):
            return replace(self, dim=dim)
        gripper = space.gripper
        if gripper is None or space.index(gripper.dim) != dim:
            which = "declares no gripper" if gripper is None else f"has its gripper in {space.describe(gripper.dim)}"
            raise ConstraintError(f"{self}: the action space {which}; give the value as a number")
        return replace(self, dim=dim, value=float(gripper.state(self.value)))

    def narrow(self, members: IntervalSet, half_bin: float) -> IntervalSet:
        """The members within the tolerance of the value."""
        return members.intersect(_around([float(self.value)], self.tolerance, half_bin))


@dataclass(frozen=True)
class Target(Constraint):
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
    """

    value: float
    sigma: float | None = None
    hard: bool = False
    weight: float = 1.0
    max_nats: float | None = None
    tolerance: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self._set(
            value=self._number("value", self.value),
            sigma=self._optional("sigma", self.sigma, "above 0"),
            weight=self._optional("weight", self.weight, "above 0"),
            max_nats=self._optional("max_nats", self.max_nats, "above 0"),
            tolerance=self._optional("tolerance", self.tolerance, "at least 0"),
        )
        if not isinstance(self.hard, bool) or self.weight is None:
            raise self._refuse(f"hard is True or False and weight a number, got {self.hard!r} and {self.weight!r}")
        if self.hard and (self.sigma is not None or self.max_nats is not None or self.weight != 1.0):
            raise self._refuse("sigma, weight and max_nats belong to a soft target; leave them out with hard=True")
        if not self.hard and self.sigma is None:
            raise self._refuse("a soft target needs sigma, in real units (or hard=True)")
        if not self.hard and self.tolerance is not None:
            raise self._refuse("tolerance belongs to a hard target; a soft one excludes nothing")

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


TYPES: dict[str, type[Constraint]] = {kind.__name__: kind for kind in (Range, Forbid, InSet, Fix, Target)}


def constraint_from_dict(values: dict[str, Any]) -> Constraint:
    """Read what `to_dict` of any constraint wrote."""
    if not isinstance(values, dict) or values.get("type") not in TYPES:
        raise ConstraintError(f"a constraint is an object whose 'type' is one of {sorted(TYPES)}, got {values!r}")
    arguments = {name: value for name, value in values.items() if name != "type"}
    steps = arguments.get("steps")
    if isinstance(steps, dict):
        arguments["steps"] = slice(steps.get("start"), steps.get("stop"), steps.get("step"))
    try:
        return TYPES[values["type"]](**arguments)
    except TypeError as error:
        raise ConstraintError(f"not the description of {values['type']} ({error}): {values}") from None


def _around(values: Sequence[float], tolerance: float | None, half_bin: float) -> IntervalSet:
    centers = np.array(values, dtype=np.float64)
    reach = np.full(centers.shape, half_bin if tolerance is None else tolerance)
    if tolerance is None and half_bin:
        # The outer values of a grid lie half a bin inside its bounds: rounding must not put the bounds out of reach.
        reach = reach * (1 + 1e-9) + 4 * np.spacing(np.abs(centers))
    return IntervalSet(np.stack([centers - reach, centers + reach], axis=1))


def _read_steps(steps: Any) -> Steps:
    if isinstance(steps, slice):
        parts = (steps.start, steps.stop, steps.step)
        whole = all(part is None or (isinstance(part, int) and not isinstance(part, bool)) for part in parts)
        if whole and steps.step != 0:
            return steps
    elif steps is None:
        return None
    elif isinstance(steps, WHOLE) and not isinstance(steps, bool):
        return int(steps)
    elif np.iterable(steps) and not isinstance(steps, (str, bytes)):
        chosen = tuple(steps)
        if chosen and all(isinstance(step, WHOLE) and not isinstance(step, bool) for step in chosen):
            return tuple(int(step) for step in chosen)
    raise ConstraintError(f"steps is None, an int, a slice or a list of ints, got {steps!r}")
