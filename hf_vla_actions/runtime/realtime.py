"""Real-time chunking in lockstep: a delay that is known, as in a simulator or an evaluation."""

from __future__ import annotations

import numpy as np

from hf_vla_actions.errors import ExecutionError
from hf_vla_actions.runtime.chunks import RecedingHorizon
from hf_vla_actions.runtime.overlap import Overlap
from hf_vla_actions.runtime.policy import ChunkSource, Observation, Policy, check_steps, read_plain_chunk


class RealTimeChunking(RecedingHorizon):
    """A policy whose new chunk continues the last one where that one is still being carried out.

    After `execute_steps` of a chunk the policy looks again. The next `delay_steps` actions are those of the old chunk,
    because inference would take so long: they are the frozen prefix of the new one, and the rest of the old chunk pulls
    the new one with weights that fall (`overlap_weights`). Here inference is waited for, so that a simulator sees what a
    robot with that delay would do; on a robot `AsyncPolicy(RealTimeChunking(...), ...)` runs it beside, with the delay
    measured and this one as the first guess.

    Source: arXiv:2506.07339, algorithm 1 (s = `execute_steps`, d = `delay_steps`, d <= s <= horizon - d).

    Args:
        policy: `predict_chunk(obs, prefix=Overlap | None)` to chunk (horizon, dof) in real units, or a policy made from
            such a source.
        execute_steps: s, steps from one look to the next.
        delay_steps: d, steps that inference takes; 0 for none.

    Raises:
        ExecutionError: steps that do not fit each other or the horizon.
    """

    continues_chunks = True

    def __init__(self, policy: ChunkSource | Policy, execute_steps: int | None = None, *, delay_steps: int):
        super().__init__(policy, execute_steps)
        self.delay_steps = check_steps("delay_steps", delay_steps, 0)
        if self.execute_steps is None:
            raise ExecutionError("RealTimeChunking looks again while a chunk is carried out: give execute_steps")
        if self.execute_steps < self.delay_steps:
            raise ExecutionError(
                f"inference of {delay_steps} steps cannot begin every {self.execute_steps} steps: "
                f"execute_steps is at least delay_steps"
            )
        self._left: np.ndarray | None = None

    def __call__(self, obs: Observation) -> np.ndarray:
        """Return the next action (dof,) in real units for an observation."""
        if not self._pending:
            overlap = None if self._left is None else Overlap.of(self._left, self.delay_steps)
            chunk = read_plain_chunk(self.predict_chunk(obs, prefix=overlap), None, "RealTimeChunking")
            steps = self.execute_steps or 0
            if steps + self.delay_steps > len(chunk) or steps == len(chunk):
                raise ExecutionError(
                    f"execute_steps={steps} and delay_steps={self.delay_steps} leave nothing of a horizon of "
                    f"{len(chunk)} to continue: their sum is at most the horizon, execute_steps below it"
                )
            chunk = chunk if overlap is None else overlap.imposed_on(chunk)
            self._pending.extend(chunk[:steps])
            self._left = chunk[steps:]
        return self._send(self._pending.popleft())

    def reset(self) -> None:
        """Forget the last chunk and what was done; call it at the start of every episode."""
        super().reset()
        self._left = None
