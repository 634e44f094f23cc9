"""Chunks that are relative to the state that made them, said in a space where they may be mixed and skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.actions.convert import explain
from hf_vla_actions.errors import ExecutionError
from hf_vla_actions.runtime.overlap import Overlap
from hf_vla_actions.runtime.policy import ChunkSource, Observation, read_plain_chunk


def at_anchor(
    predict_chunk: ChunkSource,
    space: ActionSpace,
    to: ActionSpace,
    state: Callable[[Observation], Any],
    *,
    base: Any = None,
) -> ChunkSource:
    """A source of chunks whose numbers are decoded once, against the state of the observation that made them.

    Targets relative to the state at the start of a chunk (openpi's `DeltaActions`) mean nothing once the next chunk has
    begun. Whoever mixes or skips steps (`TemporalEnsemble`, `AsyncPolicy`, `RealTimeChunking`) needs them in a space of
    targets, or of changes from step to step.

    Args:
        predict_chunk: observation to chunk (horizon, dof) in `space`; it may take `prefix=`.
        space: what its numbers mean.
        to: what they shall mean.
        state: observation to the robot's state when it was made, as `ActionSpace.convert` takes it.
        base: see `ActionSpace.convert`.

    Returns:
        Observation to chunk in `to`. A `prefix=` in `to` is handed on in `space`, seen from the new state.

    Raises:
        ActionSpaceError: there is no way from one space to the other (at once, before anything is predicted).
    """
    explain(space, to)

    def predict(obs: Observation, **options: Any):
        where = state(obs)
        prefix = options.get("prefix")
        if prefix is not None:
            actions = to.convert(prefix.actions, space, where, base=base)
            options = {**options, "prefix": Overlap(actions, prefix.weights, prefix.frozen)}
        chunk = read_plain_chunk(predict_chunk(obs, **options), space.dof, "at_anchor")
        return space.convert(chunk, to, where, base=base)

    return predict


def check_adds_up(space: ActionSpace, what: str) -> None:
    """Raise if steps of a chunk cannot be taken out of it because they are relative to where the chunk began."""
    if space.anchor == "chunk" and True in space.delta:
        raise ExecutionError(
            f"changes relative to the state at the start of their chunk (anchor='chunk') cannot be {what}: decode them "
            "against that state first, with at_anchor(predict_chunk, space, to, state)"
        )
