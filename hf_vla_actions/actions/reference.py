"""Where the robot is when a chunk begins, as far as a conversion needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_vla_actions.actions.arrays import read_numbers
from hf_vla_actions.actions.plan import Plan
from hf_vla_actions.actions.rotations import euler_order, to_matrix
from hf_vla_actions.actions.space import ActionSpace
from hf_vla_actions.actions.units import factor
from hf_vla_actions.errors import ActionSpaceError

Orientation = tuple[np.ndarray | None, tuple[str, np.ndarray] | None]


@dataclass(frozen=True, eq=False)
class Reference:
    """The state in the units that a conversion works in; None or absent for what it does not need.

    Args:
        numbers: dimensions of the source that go by themselves: (...) in the source's units, by index.
        position: (..., 3) m.
        matrix: (..., 3, 3) orientation.
        euler: its Euler angles as they were given, by form.
        is_open: (...) bool.
    """

    numbers: dict[int, np.ndarray] = field(default_factory=dict)
    position: np.ndarray | None = None
    matrix: np.ndarray | None = None
    euler: tuple[str, np.ndarray] | None = None
    is_open: np.ndarray | None = None

    @classmethod
    def read(cls, state: Any, plan: Plan, leading: tuple[int, ...], space: ActionSpace | None = None) -> Reference:
        """What a plan needs of a state.

        Args:
            state: numbers or a mapping, see `convert`; None if nobody has given it.
            plan: what they are needed for.
            leading: leading axes of the actions, without horizon.
            space: space of the state, all absolute; None if its numbers are those of the plan's source.
        """
        needs = plan.needs_text()
        if not needs or (state is None and needs.startswith("needs base=")):
            return cls()
        if state is None:
            raise ActionSpaceError(f"this conversion {needs}")
        if space is None:
            return _of_source(_table(state, plan.source, leading), plan)
        if any(kind is True for kind in space.delta):
            raise ActionSpaceError(f"the state is a space of changes: {[space.describe(i) for i in range(space.dof)]}")
        _check_frame(space, plan)
        return _of_space(_table(state, space, leading), space, plan)


def _table(state: Any, space: ActionSpace, leading: tuple[int, ...]) -> dict[int, np.ndarray]:
    """(...) numbers by index of the dimension."""
    if isinstance(state, Mapping):
        table = {space.index(dim): read_numbers(f"the state of {dim!r}", value) for dim, value in state.items()}
    else:
        array = read_numbers("the state", state)
        if array.ndim < 1 or not 0 < array.shape[-1] <= space.dof:
            raise ActionSpaceError(
                f"the state is (n,) or {(*leading, 'n')} for the first n of {list(space.names)}, got {array.shape}. Give a "
                "mapping {name: number}, or Actions in a space of its own"
            )
        table = {i: array[..., i] for i in range(array.shape[-1])}
    for i, value in table.items():
        if value.shape not in ((), leading):
            raise ActionSpaceError(
                f"the state of {space.names[i]!r} is one number or one for each chunk {leading}, got {value.shape}"
            )
    return table


def _pick(table: dict[int, np.ndarray], dims: list[int], space: ActionSpace, what: str) -> np.ndarray:
    absent = [space.names[i] for i in dims if i not in table]
    if absent or not dims:
        raise ActionSpaceError(f"the state lacks {absent or what}, which is needed for {what}")
    return np.stack(np.broadcast_arrays(*[table[i] for i in dims]), axis=-1)


def _of_source(table: dict[int, np.ndarray], plan: Plan) -> Reference:
    """A state in the numbers of the source."""
    source, pose = plan.source, plan.pose
    numbers = {i: _pick(table, [i], source, repr(source.names[i]))[..., 0] for i in plan.needs_numbers}
    position = None
    orientation: Orientation = (None, None)
    if pose is not None and pose.needs.position:
        dims, factors = pose.read[0]
        position = _pick(table, list(dims), source, "the position") * factors
    if pose is not None and pose.needs.rotation:
        dims, factors = pose.read[1]
        values = _pick(table, list(dims), source, "the orientation of the tool")
        orientation = _orientation(values * factors, pose.source.form)
    is_open = None
    if plan.needs_opening and plan.gripper is not None:
        a, b = source.gripper, plan.to.gripper
        value = _pick(table, [plan.gripper[0]], source, "the gripper")[..., 0]
        is_open = (b if a is not None and a.relative else a).is_open(value)  # type: ignore[union-attr]
    return Reference(numbers, position, *orientation, is_open)


def _of_space(table: dict[int, np.ndarray], space: ActionSpace, plan: Plan) -> Reference:
    """A state in a space of its own: by name, position, rotation and gripper by their role."""
    numbers, pose, known = {}, plan.pose, space.known_pose()
    for i in plan.needs_numbers:
        j = space.index(plan.source.names[i])
        scale = factor(space.units[j], plan.source.units[i], space.describe(j))
        numbers[i] = _pick(table, [j], space, repr(space.names[j]))[..., 0] * scale
    position = None
    orientation: Orientation = (None, None)
    if pose is not None and pose.needs.position:
        dims = _indices(space, None if known is None else known.position, "position")
        scales = [factor(space.units[i], "m", space.describe(i)) for i in dims]
        position = _pick(table, dims, space, "the position") * scales
    if pose is not None and pose.needs.rotation:
        dims = _indices(space, None if known is None else known.rotation, "rotation")
        form = None if known is None else known.form
        unit = "rad" if form == "axis_angle" or (form and euler_order(form)) else None
        scales = [factor(space.units[i], unit, space.describe(i)) for i in dims]
        orientation = _orientation(_pick(table, dims, space, "the orientation") * scales, form)
    is_open = None
    if plan.needs_opening:
        if space.gripper is None or space.gripper.relative:
            raise ActionSpaceError("the space of the state does not say when the gripper is open: give it gripper=")
        is_open = space.gripper.is_open(_pick(table, [space.index(space.gripper.dim)], space, "the gripper")[..., 0])
    return Reference(numbers, position, *orientation, is_open)


def _orientation(values: np.ndarray, form: str | None) -> Orientation:
    if form is None:
        raise ActionSpaceError("nobody has said how the rotation of the state is written: say PoseDims(..., form=)")
    return to_matrix(values, form), (form, values) if euler_order(form) else None


def _indices(space: ActionSpace, dims, what: str) -> list[int]:
    if dims is None:
        raise ActionSpaceError(
            f"the space of the state has no {what} ({list(space.names)}): say pose=PoseDims({what}=)"
        )
    return [space.index(dim) for dim in dims]


def _check_frame(space: ActionSpace, plan: Plan) -> None:
    if plan.pose is None:
        return
    here, there = plan.pose.source.frame, plan.pose.to.frame
    wanted = there if here == "tcp" else here
    if space.frame == "tcp" or (wanted not in ("tcp", None) and space.frame != wanted):
        raise ActionSpaceError(
            f"the state has to be in the frame {wanted if wanted != 'tcp' else 'world or base'}, it is in {space.frame!r}"
        )
