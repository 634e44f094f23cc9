"""Receding horizon: predict a chunk, carry out its first steps, look again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hf_vla_actions.constraints.retime import RetimedChunk
from hf_vla_actions.errors import VLAActionsError


def first_steps(chunk: np.ndarray | RetimedChunk, n_decoded: int | None) -> np.ndarray:
    """What is carried out of a chunk before the next look.

    Args:
        chunk: (horizon, dof), or a retimed one.
        n_decoded: steps of the chunk as it was decoded; of a retimed one each may be several actions. None: all.

    Returns:
        (steps, dof) actions.
    """
    return chunk.first(n_decoded) if isinstance(chunk, RetimedChunk) else chunk[:n_decoded]


class ChunkPolicy:
    """A policy that asks for a new chunk only when the last one has been carried out.

    Args:
        predict_chunk: observation to chunk in real units, (horizon, dof) or a RetimedChunk.
        execute_steps: decoded steps carried out before the next look (one action each, more where a chunk was
            retimed: the plan goes as far, and takes longer); the whole chunk if None.
    """

    def __init__(
        self,
        predict_chunk: Callable[[Mapping[str, Any]], np.ndarray | RetimedChunk],
        execute_steps: int | None = None,
    ):
        if execute_steps is not None and execute_steps < 1:
            raise VLAActionsError(f"execute_steps must be at least 1, got {execute_steps}")
        self._predict_chunk = predict_chunk
        self._execute_steps = execute_steps
        self._pending: deque[np.ndarray] = deque()

    def __call__(self, obs: Mapping[str, Any]) -> np.ndarray:
        """Return the next action (dof,) in real units for an observation."""
        if not self._pending:
            chunk = self._predict_chunk(obs)
            horizon = chunk.n_decoded if isinstance(chunk, RetimedChunk) else len(chunk)
            if self._execute_steps is not None and self._execute_steps > horizon:
                raise VLAActionsError(f"execute_steps={self._execute_steps} is more than the horizon {horizon}")
            self._pending.extend(first_steps(chunk, self._execute_steps))
        return self._pending.popleft()

    def reset(self) -> None:
        """Forget what is left of the last chunk; call it at the start of every episode."""
        self._pending.clear()
