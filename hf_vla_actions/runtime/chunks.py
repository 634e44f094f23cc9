"""Receding horizon: predict a chunk, carry out its first steps, look again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints import Context
from hf_vla_actions.constraints.retime import RetimedChunk
from hf_vla_actions.errors import ExecutionError
from hf_vla_actions.runtime.policy import ChunkRunner, ChunkSource, Observation, Policy, check_steps, read_chunk


def first_steps(chunk: np.ndarray | RetimedChunk, n_decoded: int | None) -> np.ndarray:
    """What is carried out of a chunk before the next look.

    Args:
        chunk: (horizon, dof), or a retimed one.
        n_decoded: steps of the chunk as it was decoded; of a retimed one each may be several actions. None: all.

    Returns:
        (steps, dof) actions.
    """
    return chunk.first(n_decoded) if isinstance(chunk, RetimedChunk) else chunk[:n_decoded]


class RecedingHorizon(ChunkRunner):
    """A policy that asks for a new chunk only when the last one has been carried out as far as it should.

    Args:
        policy: observation to chunk in real units, (horizon, dof) or a RetimedChunk; or a policy made from such a source.
        execute_steps: decoded steps carried out before the next look (one action each, more where a chunk was
            retimed: the plan goes as far, and takes longer). None: as in the policy that was given, else the whole
            chunk.
        every_step: the source remembers consecutive steps and has to be asked at each of them.

    Attributes:
        first_context: what was known when the first chunk of the episode was predicted.

    Raises:
        ExecutionError: `execute_steps` beyond the horizon, or something that is no chunk.
    """

    gives_chunks = True

    def __init__(self, policy: ChunkSource | Policy, execute_steps: int | None = None, *, every_step: bool = False):
        super().__init__(policy, every_step=every_step)
        inherited = self._inner.execute_steps if isinstance(self._inner, RecedingHorizon) else None
        self.execute_steps: int | None = (
            inherited if execute_steps is None else check_steps("execute_steps", execute_steps, 1)
        )
        if self.every_step and self.execute_steps != 1:
            raise ExecutionError(
                "this policy remembers a window of consecutive steps, so it must look at every one of them: "
                f"execute_steps=1, got {self.execute_steps}"
            )
        self._pending: deque[np.ndarray] = deque()
        self.first_context: Context | None = None

    def __call__(self, obs: Observation) -> np.ndarray:
        """Return the next action (dof,) in real units for an observation."""
        if not self._pending:
            chunk = read_chunk(self.predict_chunk(obs))
            horizon = chunk.n_decoded if isinstance(chunk, RetimedChunk) else len(chunk)
            if self.execute_steps is not None and self.execute_steps > horizon:
                raise ExecutionError(f"execute_steps={self.execute_steps} is more than the horizon {horizon}")
            self._pending.extend(first_steps(chunk, self.execute_steps))
        return self._send(self._pending.popleft())

    def reset(self) -> None:
        """Forget what is left of the last chunk and what was done; call it at the start of every episode."""
        super().reset()
        self._pending.clear()
        self.first_context = None


def remembered(
    context: Context | None, executed: Sequence[np.ndarray], space: ActionSpace, first: Context | None = None
) -> Context | None:
    """A context with the last action, and for how long the gripper has kept its state, where nobody else gave them.

    Args:
        context: what the caller knows; what it says stands.
        executed: (dof,) actions carried out since the episode began, the last one at the end.
        space: meaning of the numbers.
        first: what was known before the first of these actions.
    """
    if not executed:
        return context
    held = _held_steps(executed, space, first)
    context = context or Context()
    return Context(
        pose=context.pose,
        last_action=executed[-1] if context.last_action is None else context.last_action,
        held_steps=held if context.held_steps is None else context.held_steps,
    )


def _held_steps(executed: Sequence[np.ndarray], space: ActionSpace, first: Context | None) -> int | None:
    """For how many steps the gripper has kept its state; None if nobody knows when it took it."""
    gripper = space.gripper
    if gripper is None or gripper.relative:
        return None
    dim = space.index(gripper.dim)
    values = np.array([action[dim] for action in executed])
    known = None if first is None else first.known(space, 0)
    before = None if known is None or known.last_action is None else known.last_action[dim]
    values = values if before is None or np.isnan(before) else np.append(before, values)
    is_open = gripper.is_open(values)
    held = int((is_open[::-1] == is_open[-1]).cumprod().sum())
    if held < len(values):
        return held
    # It has not changed since: it had been so for `held_steps` before the first action, if anybody said so.
    told = None if known is None or before is None else known.held_steps
    return None if told is None else told + len(executed)
