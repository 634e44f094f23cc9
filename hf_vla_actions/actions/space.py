"""What each number of an action means: name, unit, frame, delta or absolute, gripper convention, control rate."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_vla_actions.errors import ActionSpaceError

FRAMES = ("world", "base", "tcp", "joint")


@dataclass(frozen=True)
class Gripper:
    """The gripper's dimension and its convention, always named because every data set has its own.

    Args:
        dim: name or index of the gripper's dimension.
        open: value that means fully open.
        closed: value that means fully closed.
        binary: if true, only these two values are ever sent to the robot: whatever is decoded goes to the nearer one.
    """

    dim: str | int
    open: float = 1.0
    closed: float = 0.0
    binary: bool = True

    def __post_init__(self):
        if not (math.isfinite(self.open) and math.isfinite(self.closed)) or self.open == self.closed:
            raise ActionSpaceError(
                f"Gripper needs two different finite values, got open={self.open} and closed={self.closed}"
            )

    def state(self, word: str) -> float:
        """Return the value of `"open"` or `"closed"`."""
        if word not in ("open", "closed"):
            raise ActionSpaceError(f"a gripper can be 'open' or 'closed', not {word!r}")
        return self.open if word == "open" else self.closed


@dataclass(frozen=True)
class ActionSpace:
    """The meaning of one action vector, shape (dof,).

    Args:
        names: one name a dimension, or None for a space that only knows how many there are.
        units: one unit a dimension (`"m"`, `"rad"`, ...; None where the number has none).
        delta: per dimension (or once for all): true if the number is a change of the current state, false if it is
            the target itself, None where nobody has said.
        frame: axes in which the numbers are expressed: "world", "base", "tcp" or "joint"; None if unknown.
        gripper: convention of the gripper's dimension, if there is one.
        rate_hz: control rate at which the actions are meant to be carried out.
    """

    names: tuple[str, ...]
    units: tuple[str | None, ...]
    delta: tuple[bool | None, ...]
    frame: str | None = None
    gripper: Gripper | None = None
    rate_hz: float | None = None
    named: bool = True

    def __init__(
        self,
        names,
        units=None,
        delta: bool | tuple[bool | None, ...] | None = None,
        frame: str | None = None,
        gripper: Gripper | None = None,
        rate_hz: float | None = None,
        *,
        named: bool = True,
    ):
        names = tuple(names)
        units = (None,) * len(names) if units is None else tuple(units)
        delta = (delta,) * len(names) if delta is None or isinstance(delta, bool) else tuple(delta)
        values = {"names": names, "units": units, "delta": delta, "frame": frame, "gripper": gripper}
        for field, value in {**values, "rate_hz": rate_hz, "named": named}.items():
            object.__setattr__(self, field, value)
        self._check()

    def _check(self) -> None:
        if not self.names:
            raise ActionSpaceError("an action space needs at least one dimension")
        if not all(isinstance(name, str) and name for name in self.names) or len(set(self.names)) != self.dof:
            raise ActionSpaceError(f"names must be different non-empty strings, got {list(self.names)}")
        for what, entries in (("units", self.units), ("delta", self.delta)):
            if len(entries) != self.dof:
                raise ActionSpaceError(f"{what} has {len(entries)} entries for {self.dof} names {list(self.names)}")
        if not all(d is None or isinstance(d, bool) for d in self.delta):
            raise ActionSpaceError(f"delta is True, False or None a dimension, got {list(self.delta)}")
        if self.frame is not None and self.frame not in FRAMES:
            raise ActionSpaceError(f"frame must be one of {list(FRAMES)} or None, got {self.frame!r}")
        if self.rate_hz is not None and not (math.isfinite(self.rate_hz) and self.rate_hz > 0):
            raise ActionSpaceError(f"rate_hz must be a positive number, got {self.rate_hz}")
        if self.gripper is not None:
            self.index(self.gripper.dim)

    @classmethod
    def unnamed(cls, dof: int) -> ActionSpace:
        """A space of which only the size is known: dimensions go by index, nothing is said of units or frames."""
        if dof < 1:
            raise ActionSpaceError(f"dof must be at least 1, got {dof}")
        return cls([f"dim_{i}" for i in range(dof)], named=False)

    @property
    def dof(self) -> int:
        """Numbers in one action."""
        return len(self.names)

    def index(self, dim: str | int) -> int:
        """Return the index of a dimension given by name or by index."""
        if isinstance(dim, str):
            if dim in self.names:
                return self.names.index(dim)
            near = difflib.get_close_matches(dim, self.names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ActionSpaceError(f"no dimension is named {dim!r}; there are {list(self.names)}{hint}")
        if not isinstance(dim, (int, np.integer)) or isinstance(dim, bool) or not -self.dof <= dim < self.dof:
            raise ActionSpaceError(f"dimension {dim!r} is outside 0..{self.dof - 1} ({list(self.names)})")
        return int(dim) % self.dof

    def settle(self, actions: np.ndarray) -> np.ndarray:
        """Put un-normalized numbers into what the robot accepts: a binary gripper goes to its nearer state.

        Args:
            actions: (..., dof) real units.

        Returns:
            (..., dof), a new array; halfway counts as open.
        """
        if self.gripper is None or not self.gripper.binary:
            return actions
        dim, gripper = self.index(self.gripper.dim), self.gripper
        settled = np.array(actions, dtype=np.float64)
        is_open = np.abs(settled[..., dim] - gripper.open) <= np.abs(settled[..., dim] - gripper.closed)
        settled[..., dim] = np.where(is_open, gripper.open, gripper.closed)
        return settled

    def describe(self, dim: str | int) -> str:
        """One dimension in words, for messages: `'x' (m, delta, base frame)`."""
        i = self.index(dim)
        kind = {True: "delta", False: "absolute", None: "delta or absolute not said"}[self.delta[i]]
        facts = [self.units[i] or "no unit", kind]
        if not self.named:
            return f"dimension {i}"
        return f"{self.names[i]!r} ({', '.join(facts)}{f', {self.frame} frame' if self.frame else ''})"

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON-ready values; inverse of `from_dict`."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActionSpace:
        """Read what `to_dict` wrote."""
        values = dict(values)
        if values.get("gripper") is not None:
            values["gripper"] = Gripper(**values["gripper"])
        try:
            return cls(**values)
        except TypeError as error:
            raise ActionSpaceError(f"not the description of an action space ({error}): {values}") from None
