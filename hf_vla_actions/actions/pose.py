"""Which dimensions of an action are a position and a rotation, and how the rotation is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_vla_actions.actions.frames import TURNS
from hf_vla_actions.actions.rotations import euler_order, size_of
from hf_vla_actions.errors import ActionSpaceError

POSITION = ("x", "y", "z")
# Names that can only be a rotation. Of all of them only the quaternion's say how it is written: roll, pitch and yaw are
# about fixed axes for some and about moving ones for others, rx, ry, rz are Euler angles or axis times angle.
ROTATIONS: dict[tuple[str, ...], str | None] = {
    ("qx", "qy", "qz", "qw"): "quat_xyzw",
    ("roll", "pitch", "yaw"): None,
    ("rx", "ry", "rz"): None,
    ("r6_0", "r6_1", "r6_2", "r6_3", "r6_4", "r6_5"): None,
}


@dataclass(frozen=True)
class PoseDims:
    """Which dimensions of an action are the pose of the tool.

    Args:
        position: names or indices of x, y and z; None if there is no position.
        rotation: names or indices of the numbers of the rotation in their order; None if there is none.
        form: how the rotation is written: "euler_xyz", "quat_xyzw", "axis_angle", "rot6d", ... (`rotations.to_matrix`);
            None if nobody has said: then everything is possible that leaves the rotation as it is.
        turns: what a change of Euler angles means: "difference" (of the angles) or "compose" (the rotation in between,
            see `frames`). Other forms are always composed, and so are changes in the frame of the tool.
    """

    position: tuple[str | int, ...] | None = None
    rotation: tuple[str | int, ...] | None = None
    form: str | None = None
    turns: str | None = None

    def __post_init__(self):
        for name in ("position", "rotation"):
            dims = getattr(self, name)
            if dims is not None:
                if isinstance(dims, str) or not isinstance(dims, Sequence):
                    raise ActionSpaceError(f"{name} is a list of dimensions, got {dims!r}")
                object.__setattr__(self, name, tuple(dims))
        if self.position is None and self.rotation is None:
            raise ActionSpaceError("PoseDims needs a position, a rotation or both")
        if self.position is not None and len(self.position) != 3:
            raise ActionSpaceError(f"a position has three dimensions, got {list(self.position)}")
        if self.form is not None and (self.rotation is None or len(self.rotation) != size_of(self.form)):
            dims = None if self.rotation is None else list(self.rotation)
            raise ActionSpaceError(f"{self.form} has {size_of(self.form)} dimensions, the rotation is {dims}")
        if self.turns is not None and self.turns not in TURNS:
            raise ActionSpaceError(f"turns is one of {list(TURNS)} or None, got {self.turns!r}")
        if self.turns == "difference" and (self.form is None or euler_order(self.form) is None):
            raise ActionSpaceError(f"only Euler angles can be subtracted, the rotation is written as {self.form!r}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; `PoseDims(**values)` reads them."""
        dims = {"position": self.position, "rotation": self.rotation}
        lists: dict[str, Any] = {name: value if value is None else list(value) for name, value in dims.items()}
        return {**lists, "form": self.form, "turns": self.turns}


def infer_pose(names: Sequence[str]) -> PoseDims | None:
    """What names leave no doubt about; None if that is nothing.

    Two sets of names that could both be the rotation are none.
    """
    position = POSITION if set(POSITION) <= set(names) else None
    found = [group for group in ROTATIONS if set(group) <= set(names)]
    rotation = found[0] if len(found) == 1 else None
    if position is None and rotation is None:
        return None
    return PoseDims(position, rotation, None if rotation is None else ROTATIONS[rotation])
