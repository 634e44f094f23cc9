"""Receding horizon: predict a chunk, carry out its first steps, look again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hf_vla_actions.errors import VLAActionsError


class ChunkPolicy:
    """A policy that asks for a new chunk only when the last one has been carried out.

    Args:
        predict_chunk: observation to chunk (horizon, dof) in real units.
        execute_steps: actions carried out before the next look; the whole chunk if None.
    """

    def __init__(self, predict_chunk: Callable[[Mapping[str, Any]], np.ndarray], execute_steps: int | None = None):
        if execute_steps is not None and execute_steps < 1:
            raise VLAActionsError(f"execute_steps must be at least 1, got {execute_steps}")
        self._predict_chunk = predict_chunk
        self._execute_steps = execute_steps
        self._pending: deque[np.ndarray] = deque()

    def __call__(self, obs: Mapping[str, Any]) -> np.ndarray:
        """Return the next action (dof,) in real units for an observation."""
        if not self._pending:
            chunk = self._predict_chunk(obs)
            if self._execute_steps is not None and self._execute_steps > len(chunk):
                raise VLAActionsError(f"execute_steps={self._execute_steps} is more than the horizon {len(chunk)}")
            self._pending.extend(chunk[: self._execute_steps])
        return self._pending.popleft()

    def reset(self) -> None:
        """Forget what is left of the last chunk; call it at the start of every episode."""
        self._pending.clear()
