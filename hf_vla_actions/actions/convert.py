"""Actions of one space said in another: units, names, frame, delta or absolute, gripper and rotation, in one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_vla_actions.actions.arrays import like, read_numbers
from hf_vla_actions.actions.motion import Here, move
from hf_vla_actions.actions.plan import Plan, make_plan
from hf_vla_actions.actions.reference import Reference
from hf_vla_actions.actions.space import ActionSpace
from hf_vla_actions.errors import ActionSpaceError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Actions:
    """Numbers together with the space they are in, so that they cannot be taken for others or converted twice.

    Args:
        values: (..., horizon, dof) or (dof,), NumPy or torch.
        space: what they mean.

    Example: `policy_space.wrap(chunk).to(robot_space, state).values`.
    """

    values: Any
    space: ActionSpace

    def __post_init__(self):
        shape = read_numbers("actions", self.values).shape
        if not shape or shape[-1] != self.space.dof:
            raise ActionSpaceError(f"actions {shape} for a space of {self.space.dof} dimensions {self.space.names}")

    def to(self, space: ActionSpace, state: Any = None, *, base: Any = None, drop: Sequence[str] = ()) -> Actions:
        """The same actions in another space; in their own one they are returned as they are. Arguments of `convert`."""
        if space == self.space:
            return self
        return Actions(convert(self.values, self.space, space, state, base=base, drop=drop), space)

    @staticmethod
    def join(parts: Sequence[Actions], axis: int = 0) -> Actions:
        """Actions one after the other as NumPy; parts in different spaces raise."""
        if not parts:
            raise ActionSpaceError("there are no actions to join")
        other = [part.space for part in parts if part.space != parts[0].space]
        if other:
            raise ActionSpaceError(
                f"actions in different spaces cannot be joined: {_brief(parts[0].space)} and {_brief(other[0])}. "
                "Bring them to one with .to(space)"
            )
        arrays = [read_numbers("actions", part.values) for part in parts]
        return Actions(np.concatenate(arrays, axis=axis), parts[0].space)


def convert(
    actions: Any,
    source: ActionSpace,
    to: ActionSpace,
    state: Any = None,
    *,
    base: Any = None,
    drop: Sequence[str] = (),
) -> Any:
    """Say actions of one space in another. `explain` says beforehand what happens; here it is logged (INFO).

    Only what follows from both spaces and the state is done: dimensions by name (position, rotation and gripper by
    their role), units, frame, delta or absolute, what changes are relative to, the form of the rotation, the gripper's
    convention. Everything else raises. Nothing is clipped, and no step is added or left out.

    Args:
        actions: (..., horizon, dof) or (dof,) for one step; NumPy, torch, or `Actions` in the space `source`.
        source: space of the actions.
        to: space that they shall be in.
        state: where the robot is when the chunk begins, if that is needed: numbers as in `source` but absolute, for
            its first dimensions ((n,) or (..., n) with the leading axes of the actions) or as a mapping
            {name: number or (...)}; or `Actions` in a space of its own, all of it absolute. Positions and rotations
            are in the frame of `source`, or of `to` if `source` is in the tool's; a gripper is in the convention of
            the side that is absolute.
        base: (4, 4) pose of the robot's base in the world, to get from one frame to the other.
        drop: names of dimensions of `source` to leave out; without it a dimension that `to` lacks raises.

    Returns:
        The same shape with `to.dof` on the last axis: float64, a tensor if tensors came.

    Raises:
        ActionSpaceError: what does not follow from the arguments, with what is missing; `Actions` of another space.
    """
    if isinstance(actions, Actions):
        if actions.space != source:
            twice = " They have been converted already." if actions.space == to else ""
            raise ActionSpaceError(
                f"these actions are in the space {_brief(actions.space)}, not in {_brief(source)}.{twice} Use their .to()"
            )
        actions = actions.values
    values = read_numbers("actions", actions)
    if not values.ndim or values.shape[-1] != source.dof:
        raise ActionSpaceError(f"actions {values.shape} for a space of {source.dof} dimensions {list(source.names)}")
    chunk = values[None] if values.ndim == 1 else values
    if not chunk.shape[-2]:
        raise ActionSpaceError(f"a chunk has at least one step, got actions {values.shape}")
    plan = make_plan(source, to, chunk.shape[-2], drop)
    where, where_space = (state.values, state.space) if isinstance(state, Actions) else (state, None)
    reference = Reference.read(where, plan, chunk.shape[:-2], where_space)
    result = _carry_out(chunk, plan, reference, _read_base(base, plan))
    logger.info("actions converted: %s", "; ".join(plan.texts))
    return like(actions)(result.reshape(*values.shape[:-1], to.dof))


def explain(source: ActionSpace, to: ActionSpace, horizon: int | None = None, drop: Sequence[str] = ()) -> list[str]:
    """What `convert` does between two spaces, one text a step, the last one what it needs to know."""
    plan = make_plan(source, to, horizon, drop)
    needs = plan.needs_text()
    return [*plan.texts, *([needs] if needs else [])]


def _carry_out(chunk: np.ndarray, plan: Plan, reference: Reference, base: np.ndarray | None) -> np.ndarray:
    result = np.empty((*chunk.shape[:-1], plan.to.dof))
    for copy in plan.copies:
        column = chunk[..., copy.source]
        if copy.way != "same":
            # Changes that stay changes, only of something else, do not depend on where they begin.
            start = np.asarray(reference.numbers.get(copy.source, 0.0))[..., None]
            column = column if copy.way == "delta" else start + _summed(column, plan)
            column = column if copy.way == "absolute" else _steps(column, start, plan)
        result[..., copy.to] = column * copy.factor
    if plan.gripper is not None:
        i, j = plan.gripper
        result[..., j] = plan.gripper_values(chunk[..., i], reference.is_open)
    if plan.pose is not None:
        pose = plan.pose
        parts = [chunk[..., list(dims)] * factors if dims else None for dims, factors in pose.read]
        here = Here(reference.position, reference.matrix, reference.euler)
        moved = move(parts[0], parts[1], pose.source, pose.to, here, base)
        for part, (dims, factors) in zip(moved, pose.write, strict=True):
            if part is not None:
                result[..., list(dims)] = part * factors
    return result


def _summed(column: np.ndarray, plan: Plan) -> np.ndarray:
    return np.cumsum(column, axis=-1) if plan.source_anchor == "step" else column


def _steps(column: np.ndarray, start: np.ndarray, plan: Plan) -> np.ndarray:
    before = np.concatenate([np.broadcast_to(start, (*column.shape[:-1], 1)), column[..., :-1]], axis=-1)
    return column - (before if plan.to_anchor == "step" else start)


def _read_base(base: Any, plan: Plan) -> np.ndarray | None:
    if not plan.needs_base:
        return None
    if base is None:
        raise ActionSpaceError("from 'world' to 'base' or back needs base=, the pose (4, 4) of the base in the world")
    pose = read_numbers("base", base)
    turned = pose[:3, :3] if pose.shape == (4, 4) else np.zeros((3, 3))
    if not (pose.shape == (4, 4) and (pose[3] == [0, 0, 0, 1]).all() and np.allclose(turned.T @ turned, np.eye(3))):
        raise ActionSpaceError(f"base is a homogeneous matrix (4, 4) ending in (0, 0, 0, 1), got {pose.tolist()}")
    return pose


def _brief(space: ActionSpace) -> str:
    kinds = {True: "delta", False: "absolute", None: "delta or absolute not said"}
    said = "/".join(dict.fromkeys(kinds[d] for d in space.delta))
    return f"({', '.join(space.names)}; {said}; {space.frame or 'no'} frame)"
