"""Retiming within constraints: the decoded path in more steps, and then everything that holds of whole chunks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.base import Constraint
from hf_vla_actions.constraints.bind import bind, with_limits
from hf_vla_actions.constraints.context import Context
from hf_vla_actions.constraints.coupled import Linear, Speed
from hf_vla_actions.constraints.language import OneDimensional
from hf_vla_actions.constraints.retime import RetimedChunk, retime
from hf_vla_actions.errors import ConstraintError


def retime_within(
    chunk: np.ndarray,
    constraints,
    space: ActionSpace,
    *,
    limits: Sequence[Constraint] = (),
    context: Context | None = None,
    on_infeasible: str = "raise",
    max_parts: int = 32,
) -> RetimedChunk:
    """Split the steps of a decoded chunk that are too long, then move the longer chunk into everything else.

    Limits on single steps (Range, Forbid, Speed, Linear, ...) are kept by taking more steps on the same path. What speaks
    of the chunk as a whole (Workspace, Rate, KeepOut, MoveBy, ...) is kept by projection afterwards, as is a step that
    cannot be split small enough.

    Args:
        chunk: (horizon, dof) real units, as decoded.
        constraints: list of constraints; they hold for every step, so `steps=` is refused: there will be more steps.
        space: meaning of the numbers.
        limits: constraints added to them.
        context: what the robot knows now.
        on_infeasible: see `bind`.
        max_parts: most parts of one step.

    Raises:
        InfeasibleConstraintError: no chunk satisfies the constraints.
        ConstraintError: a constraint names steps, or belongs to one of several samples.
    """
    lists = with_limits(constraints, tuple(limits))
    if len(lists) > 1:
        raise ConstraintError(f"one chunk is retimed, but there are {len(lists)} lists of constraints")
    every = [part for constraint in lists[0] for part in _parts(constraint)]
    named = [constraint for constraint in every if constraint.steps is not None]
    if named:
        raise ConstraintError(f"{named[0]} names steps of a chunk; retiming makes more of them. Leave steps= out")
    single = [
        c for c in lists[0] if isinstance(c, (OneDimensional, Speed)) or (isinstance(c, Linear) and not c.cumulative)
    ]
    one = bind(single, space, None, 1, grid=False, on_infeasible="nearest")
    last = None if context is None else context.known(space, 0).last_action
    settled = space.settle(np.asarray(chunk, dtype=np.float64))
    slower = retime(
        settled,
        space,
        lambda actions: one.excess(actions[:, None])[:, 0] == 0,
        last_action=last,
        max_parts=max_parts,
    )
    whole = bind(lists[0], space, None, len(slower.actions), grid=False, context=context, on_infeasible=on_infeasible)
    actions = whole.project(slower.actions)
    fallback = whole.fallbacks[0]
    if fallback is not None and fallback.actions is not None:
        actions = fallback.actions
    return RetimedChunk(actions, slower.decoded_step, slower.stuck)


def _parts(constraint: Constraint) -> list[Constraint]:
    """A constraint and all that it is made of."""
    inner = constraint.parts_of()
    return [constraint, *(each for part in inner for each in _parts(part))]
