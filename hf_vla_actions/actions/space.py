"""What each number of an action means: name, unit, frame, delta or absolute, gripper convention, control rate."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_vla_actions.actions.frames import ANCHORS
from hf_vla_actions.actions.gripper import Gripper as Gripper
from hf_vla_actions.actions.pose import PoseDims, infer_pose
from hf_vla_actions.errors import ActionSpaceError

if TYPE_CHECKING:
    from hf_vla_actions.actions.convert import Actions

FRAMES = ("world", "base", "tcp", "joint")


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
        named: false if the names are only indices.
        pose: which dimensions are position and rotation, and how the rotation is written; only conversions need it.
        anchor: what changes are relative to: "step" (each to the state before it, so they add up) or "chunk" (all to
            the state when the chunk begins); None if nobody has said. Only conversions need it.
    """

    names: tuple[str, ...]
    units: tuple[str | None, ...]
    delta: tuple[bool | None, ...]
    frame: str | None = None
    gripper: Gripper | None = None
    rate_hz: float | None = None
    named: bool = True
    pose: PoseDims | None = None
    anchor: str | None = None

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
        pose: PoseDims | None = None,
        anchor: str | None = None,
    ):
        names = tuple(names)
        units = (None,) * len(names) if units is None else tuple(units)
        delta = (delta,) * len(names) if delta is None or isinstance(delta, bool) else tuple(delta)
        values: dict[str, Any] = {"names": names, "units": units, "delta": delta, "frame": frame, "gripper": gripper}
        values |= {"rate_hz": rate_hz, "named": named, "pose": pose, "anchor": anchor}
        for field, value in values.items():
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
        if self.anchor is not None and self.anchor not in ANCHORS:
            raise ActionSpaceError(f"anchor must be one of {list(ANCHORS)} or None, got {self.anchor!r}")
        if self.pose is not None:
            self._check_pose(self.pose)

    def _check_pose(self, pose: PoseDims) -> None:
        dims = [self.index(dim) for dim in (*(pose.position or ()), *(pose.rotation or ()))]
        if self.gripper is not None:
            dims.append(self.index(self.gripper.dim))
        if len(set(dims)) != len(dims):
            raise ActionSpaceError(f"a dimension is position, rotation or gripper, not two of them: {pose}")
        if self.frame == "joint":
            raise ActionSpaceError("a space in the frame 'joint' has no pose: its numbers are joint angles")

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
        dim = self.index(self.gripper.dim)
        settled = np.array(actions, dtype=np.float64)
        settled[..., dim] = self.gripper.settle(settled[..., dim])
        return settled

    def known_pose(self) -> PoseDims | None:
        """`pose`, or what the names leave no doubt about: x, y, z are a position, qx, qy, qz, qw a quaternion."""
        return self.pose if self.pose is not None or not self.named else infer_pose(self.names)

    def convert(
        self, actions: Any, to: ActionSpace, state: Any = None, *, base: Any = None, drop: tuple[str, ...] = ()
    ) -> Any:
        """Say actions of this space in another one: `actions.convert.convert`, where the arguments are explained."""
        from hf_vla_actions.actions.convert import convert

        return convert(actions, self, to, state, base=base, drop=drop)

    def explain(self, to: ActionSpace, horizon: int | None = None, drop: tuple[str, ...] = ()) -> list[str]:
        """What `convert` would do, one text a step; raises what it would raise.

        Args:
            to: the other space.
            horizon: steps of the chunks; more than one if None.
            drop: as in `convert`.
        """
        from hf_vla_actions.actions.convert import explain

        return explain(self, to, horizon, drop)

    def wrap(self, actions: Any) -> Actions:
        """Numbers that know their space, so that nobody can convert them twice: `actions.convert.Actions`."""
        from hf_vla_actions.actions.convert import Actions

        return Actions(actions, self)

    def describe(self, dim: str | int) -> str:
        """One dimension in words, for messages: `'x' (m, delta, base frame)`."""
        i = self.index(dim)
        kind = {True: "delta", False: "absolute", None: "delta or absolute not said"}[self.delta[i]]
        facts = [self.units[i] or "no unit", kind]
        if not self.named:
            return f"dimension {i}"
        return f"{self.names[i]!r} ({', '.join(facts)}{f', {self.frame} frame' if self.frame else ''})"

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON-ready values; inverse of `from_dict`. `pose` and `anchor` are left out where they are None."""
        values = {"names": list(self.names), "units": list(self.units), "delta": list(self.delta), "frame": self.frame}
        gripper = None if self.gripper is None else self.gripper.to_dict()
        values |= {"gripper": gripper, "rate_hz": self.rate_hz, "named": self.named}
        values |= {} if self.pose is None else {"pose": self.pose.to_dict()}
        return values if self.anchor is None else {**values, "anchor": self.anchor}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActionSpace:
        """Read what `to_dict` wrote."""
        values = dict(values)
        try:
            for name, kind in (("gripper", Gripper), ("pose", PoseDims)):
                if values.get(name) is not None:
                    values[name] = kind(**values[name])
            return cls(**values)
        except TypeError as error:
            raise ActionSpaceError(f"not the description of an action space ({error}): {values}") from None
