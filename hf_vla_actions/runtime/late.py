"""What a robot is told when the next chunk is not there yet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.errors import ExecutionError
from hf_vla_actions.runtime.anchor import check_adds_up
from hf_vla_actions.runtime.policy import check_steps

ON_LATE = ("hold", "brake", "last")


class LateRule:
    """The action of a late step: a function of the actions before it, as `constraints.bind(on_infeasible="hold")` holds.

    "hold": changes are 0, targets stay what they were. "brake": the last change goes to 0 in equal steps: at late step i
    of n it is 1 - i / (n + 1) of it; targets go on by such shares of the last difference, absolute rotations stay. "last":
    the last action again, so changes go on. A gripper keeps its state; a relative one is told nothing, but with "last".

    Args:
        space: meaning of the numbers.
        on_late: which of the three.
        brake_steps: n.
    """

    def __init__(self, space: ActionSpace, on_late: str = "hold", brake_steps: int = 4):
        if on_late not in ON_LATE:
            raise ExecutionError(f"on_late is one of {list(ON_LATE)}, got {on_late!r}")
        gripper = None if space.gripper is None else space.index(space.gripper.dim)
        unsaid = [space.describe(i) for i in range(space.dof) if space.delta[i] is None and i != gripper]
        if unsaid:
            raise ExecutionError(
                f"to keep a robot still, one has to know whether {unsaid[0]} is a change or a target: give the ActionSpace its delta"
            )
        check_adds_up(space, "held still or skipped")
        self.on_late, self.brake_steps = on_late, check_steps("brake_steps", brake_steps, 1)
        self._changes = np.array([space.delta[i] is True and i != gripper for i in range(space.dof)])
        pose = space.known_pose()
        turned = {space.index(dim) for dim in (pose.rotation or ())} if pose is not None else set()
        self._moving = np.array([i != gripper and i not in turned for i in range(space.dof)]) & ~self._changes
        self._command = gripper if space.gripper is not None and space.gripper.relative else None
        self._keep = 0.0 if space.gripper is None else space.gripper.middle

    def hold(self, last: np.ndarray) -> np.ndarray:
        """(dof,) that leaves the robot where the last action (dof,) has sent it."""
        action = np.where(self._changes, 0.0, last)
        if self._command is not None:
            action[self._command] = self._keep
        return action

    def action(self, before: Sequence[np.ndarray], n_late: int) -> np.ndarray:
        """(dof,) real units.

        Args:
            before: actions (dof,) before the robot had to wait, the newest last; one, or better two.
            n_late: 1 for the first late step after them.
        """
        last = before[-1]
        if self.on_late == "last":
            return np.array(last)
        action = self.hold(last)
        if self.on_late == "brake":
            shares = np.maximum(1 - np.arange(1, n_late + 1) / (self.brake_steps + 1), 0.0)
            action = np.where(self._changes, last * shares[-1], action)
            if len(before) > 1:
                action = np.where(self._moving, last + (last - before[-2]) * shares.sum(), action)
        return action
