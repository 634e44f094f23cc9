"""What constraints say of actions that did not know of them: how often they are broken, and how far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints import Constraint, Context, bind
from hf_vla_actions.constraints.bind import with_limits
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError, VLAActionsError
from hf_vla_actions.metrics import limit_conflict


@dataclass(frozen=True, eq=False)
class Conflicts:
    """How far steps are beyond constraints.

    Args:
        excess: (n, horizon) the largest excess over any constraint that could be judged, see `BoundConstraints.excess`.
        each: text of each constraint that was judged, to the excess over it alone.
        notes: what could not be judged, and why.
    """

    excess: np.ndarray
    each: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def metrics(self, pad_mask: np.ndarray) -> dict[str, float]:
        """`limit_conflict` of all constraints together; empty if none was judged."""
        return limit_conflict(self.excess, pad_mask) if self.each else {}

    def by_constraint(self, pad_mask: np.ndarray) -> dict[str, dict[str, float]]:
        """`limit_conflict` of each constraint."""
        return {text: limit_conflict(excess, pad_mask) for text, excess in self.each.items()}


def listed(constraints, limits: Sequence[Constraint] = ()) -> list[Constraint]:
    """One flat list of constraints and permanent limits; numbers or lists for single samples raise."""
    lists = with_limits(constraints, tuple(limits))
    if len(lists) > 1 or any(constraint.n_samples is not None for constraint in lists[0]):
        raise VLAActionsError(
            "an evaluation judges all chunks by the same constraints: give one list, without numbers for each sample"
        )
    return lists[0]


def conflicts_of(
    actions: np.ndarray, constraints: Sequence[Constraint], space: ActionSpace, last_actions: np.ndarray
) -> Conflicts:
    """Judge chunks by constraints, one constraint after the other.

    Args:
        actions: (n, horizon, dof) real units.
        constraints: from `listed`.
        space: meaning of the numbers.
        last_actions: (n, dof) what was carried out before each chunk, NaN where nobody knows.

    Raises:
        ConstraintError: a constraint does not fit the space or the chunk, or can never hold.
    """
    known = np.isfinite(last_actions).all(axis=1)
    total = np.zeros(actions.shape[:2])
    each: dict[str, np.ndarray] = {}
    notes = []
    for constraint in constraints:
        if not constraint.is_hard:
            notes.append(f"{constraint} only makes actions likelier: not judged")
            continue
        try:
            excess = _excess(actions, constraint, space, None)
        except InfeasibleConstraintError:
            raise
        except ConstraintError as error:
            if not constraint.needs:
                raise
            if "pose" in constraint.needs or not known.any():
                notes.append(f"{constraint} not judged: {error}")
                continue
            excess = np.zeros(actions.shape[:2])
            excess[known] = _excess(actions[known], constraint, space, Context(last_action=last_actions[known]))
            if not known.all():
                notes.append(f"{constraint}: {int((~known).sum())} chunks begin an episode and count as kept")
        each[str(constraint)] = np.maximum(excess, each.get(str(constraint), 0.0))
        total = np.maximum(total, excess)
    return Conflicts(total, each, tuple(notes))


def _excess(actions: np.ndarray, constraint: Constraint, space: ActionSpace, context: Context | None) -> np.ndarray:
    bound = bind([constraint], space, None, actions.shape[1], grid=False, context=context)
    return bound.excess(actions)
