"""Following the same path more slowly, so that limits on single steps hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints import Constraint, Context, RetimedChunk, retime_within
from hf_vla_actions.runtime.chunks import RecedingHorizon, remembered
from hf_vla_actions.runtime.policy import ChunkSource, Observation, Policy, read_plain_chunk

logger = logging.getLogger(__name__)


class Retime(RecedingHorizon):
    """A policy that takes more steps on the decoded path where a step is too long, and goes no less far.

    A step that breaks a limit is split into as many equal parts as it needs (`constraints.retime_within`); what speaks of
    the chunk as a whole, or cannot be split small enough, is projected, which is logged. It counts decoded steps.

    Args:
        policy: source of chunks (horizon, dof) in real units, or a policy made from one.
        constraints: list of constraints, or a function of the observation that returns one.
        space: meaning of the numbers.
        execute_steps: decoded steps before the next look; see `RecedingHorizon`.
        limits: constraints that hold always, added to them.
        context: what is known when a chunk is predicted, or a function of the observation; the last action of this
            policy is known to it.
        on_infeasible: see `constraints.bind`.
        max_parts: most parts of one step.

    Attributes:
        decoded_steps: steps of all chunks so far, as they were decoded.
        actions_made: actions that became of them.
        stuck_steps: decoded steps that no number of parts made allowed; they were projected.
    """

    def __init__(
        self,
        policy: ChunkSource | Policy,
        constraints: Sequence[Constraint] | Callable[[Observation], Sequence[Constraint]] = (),
        *,
        space: ActionSpace,
        execute_steps: int | None = None,
        limits: Sequence[Constraint] = (),
        context: Context | Callable[[Observation], Context | None] | None = None,
        on_infeasible: str = "raise",
        max_parts: int = 32,
    ):
        super().__init__(policy, execute_steps)
        self.space = space
        self.decoded_steps = self.actions_made = self.stuck_steps = 0
        self._decode, self.predict_chunk = self.predict_chunk, self._predict_slower
        self._constraints, self._context = constraints, context
        self._options: dict[str, Any] = {"limits": limits, "on_infeasible": on_infeasible, "max_parts": max_parts}

    def _predict_slower(self, obs: Observation) -> RetimedChunk:
        chunk = read_plain_chunk(self._decode(obs), self.space.dof, "Retime")
        wanted = self._constraints(obs) if callable(self._constraints) else self._constraints
        known = self._context(obs) if callable(self._context) else self._context
        if not self.executed:
            self.first_context = known
        told = remembered(known, self.executed, self.space, self.first_context)
        slower = retime_within(chunk, wanted, self.space, context=told, **self._options)
        self.decoded_steps += slower.n_decoded
        self.actions_made += len(slower.actions)
        if slower.stuck:
            self.stuck_steps += len(slower.stuck)
            logger.warning("steps %s of a chunk cannot be split small enough: they were projected", list(slower.stuck))
        return slower
