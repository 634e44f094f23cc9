"""Binding constraints to one robot: everything is checked here, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.base import Constraint
from hf_vla_actions.constraints.binder import binder_of
from hf_vla_actions.constraints.bound import BoundConstraints
from hf_vla_actions.constraints.combined import All
from hf_vla_actions.constraints.context import Context
from hf_vla_actions.constraints.sample import Sample
from hf_vla_actions.constraints.terms import Known
from hf_vla_actions.errors import ConstraintError

ON_INFEASIBLE = ("raise", "hold", "nearest")


def bind(
    constraints,
    space: ActionSpace,
    values: np.ndarray | None,
    horizon: int,
    *,
    limits: Sequence[Constraint] = (),
    grid: bool = True,
    context: Context | None = None,
    on_infeasible: str = "raise",
) -> BoundConstraints:
    """Check constraints against a robot and return what they leave.

    Args:
        constraints: one list for all samples, or a list of lists, one per sample; None for no constraints.
        space: meaning of the numbers.
        values: (dof, n_codes) float64: the value in real units that each token stands for, exactly as it will be
            carried out (un-normalized, gripper settled); None for actions that come from no tokens.
        horizon: actions in a chunk.
        limits: constraints added to every sample.
        grid: True: tokens must remain (decoding under constraints). False: any value from half a bin below the lowest
            token to half a bin above the highest counts (actions are moved after decoding).
        context: what the robot knows now; for all samples or for each.
        on_infeasible: what to do for a sample whose constraints cannot all hold: "raise"; "hold": tell the robot to
            stay as it is instead; "nearest": leave out one constraint after another, each from a smallest conflicting
            set and permanent limits last, until the rest can hold. What was done is in `fallbacks`.

    Raises:
        InfeasibleConstraintError: no chunk satisfies the constraints, or none that could be certified.
        ConstraintError: a constraint is malformed, does not fit the chunk, or needs a context that was not given.
        ActionSpaceError: a dimension the space does not have.
    """
    if on_infeasible not in ON_INFEASIBLE:
        raise ConstraintError(f"on_infeasible must be one of {list(ON_INFEASIBLE)}, got {on_infeasible!r}")
    if context is not None and not isinstance(context, Context):
        raise ConstraintError(f"context is a Context(pose=..., last_action=...), got {context!r}")
    values = _check_values(values, space, grid)
    if isinstance(limits, Constraint) or not isinstance(limits, Sequence):
        raise ConstraintError(f"limits are a list of constraints, got {limits!r}")
    if isinstance(horizon, bool) or not isinstance(horizon, (int, np.integer)) or horizon < 1:
        raise ConstraintError(f"horizon must be a whole number of at least 1, got {horizon!r}")
    lists, per_sample = with_limits(constraints, tuple(limits)), _is_per_sample(constraints)
    lists, per_sample = _spread(lists, per_sample, context)
    binder = binder_of(space, values, horizon, grid)
    samples = []
    for s, sample in enumerate(lists):
        known = Known() if context is None else context.known(space, s, len(lists))
        samples.append(Sample(binder, s, [c.sample(s) for c in sample], known, n_limits=len(_flat(limits))))
    certified = binder.certified([sample.branches for sample in samples])
    for sample, starts in zip(samples, certified, strict=True):
        sample.settle(starts, on_infeasible)
    return BoundConstraints(
        space,
        horizon,
        values,
        len(samples),
        per_sample,
        [sample.branches for sample in samples],
        {(s, *cell): nats for s, sample in enumerate(samples) for cell, nats in sample.pulls().items()},
        [sample.prices() for sample in samples],
        [sample.fallback for sample in samples],
        [sample.kept for sample in samples],
    )


def project(
    actions,
    constraints,
    space: ActionSpace,
    *,
    limits: Sequence[Constraint] = (),
    context: Context | None = None,
    style: str = "axis",
) -> np.ndarray:
    """Move chunks that come from no tokens (a continuous head) to where everything is allowed.

    Args:
        actions: (..., horizon, dof) real units.
        constraints: one list for all samples, or one list per sample.
        space: meaning of the numbers.
        limits: constraints added to every sample.
        context: what the robot knows now.
        style: see `BoundConstraints.project`.

    Returns:
        float64 of the same shape; what is allowed already stays bit by bit. Soft constraints move nothing.
    """
    try:
        actions = np.asarray(actions, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConstraintError(f"actions are numbers (..., horizon, {space.dof}), got {actions!r}") from None
    if actions.ndim < 2 or actions.shape[-1] != space.dof:
        raise ConstraintError(f"chunks have shape (..., horizon, {space.dof}), got {actions.shape}")
    bound = bind(constraints, space, None, actions.shape[-2], limits=limits, grid=False, context=context)
    bound.check_batch(int(np.prod(actions.shape[:-2], dtype=int)))
    return bound.project(actions, style)


def _check_values(values, space: ActionSpace, grid: bool) -> np.ndarray | None:
    if values is None:
        if grid:
            raise ConstraintError("the token grid is needed: pass values (dof, n_codes), or grid=False")
        return None
    values = np.array(values, dtype=np.float64)  # a copy: what is worked out from it is remembered
    if values.ndim != 2 or values.shape[0] != space.dof or not values.shape[1] or not np.isfinite(values).all():
        raise ConstraintError(f"values must be finite, of shape ({space.dof}, n_codes), got shape {values.shape}")
    return values


def with_limits(constraints, limits: tuple[Constraint, ...] = ()) -> list[list[Constraint]]:
    """One list of constraints for each sample, or one for all, with the limits added to each.

    Args:
        constraints: a constraint, a list of them, a list of such lists (one a sample), or None.
        limits: constraints that hold always.
    """
    given = [] if constraints is None else [constraints] if isinstance(constraints, Constraint) else constraints
    if not isinstance(given, (list, tuple)):
        raise ConstraintError(
            f"constraints are a list (or one list per sample), got {constraints!r}; text is read by parse_constraints"
        )
    lists = [_flat([*sample, *limits]) for sample in (given if _is_per_sample(given) else [given])]
    strangers = [item for sample in lists for item in sample if not isinstance(item, Constraint)]
    if strangers:
        raise ConstraintError(
            f"constraints are a list of constraints such as Range('x', -0.01, 0.01), or one list per sample; got "
            f"{strangers[0]!r} in it"
        )
    return lists


def _flat(constraints) -> list[Constraint]:
    """Constraints one by one, those of an `All` taken out of it."""
    return [each for one in constraints for each in (one.parts if isinstance(one, All) else [one])]


def _is_per_sample(given) -> bool:
    return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(one, (list, tuple)) for one in given)


def _spread(lists: list[list[Constraint]], per_sample: bool, context: Context | None):
    """One list for each sample that constraints or context have numbers of their own for."""
    counts = {f"{c}": c.n_samples for sample in lists for c in sample if c.n_samples is not None}
    if context is not None and context.n_samples is not None:
        counts["context"] = context.n_samples
    if per_sample:
        counts["lists of constraints"] = len(lists)
    if len(set(counts.values())) > 1:
        raise ConstraintError(f"numbers for different numbers of samples: {counts}")
    if not counts:
        return lists, False
    n = next(iter(counts.values()))
    return (lists if per_sample else lists * n), True
