"""Constraints bound to one robot: checked before anything runs, then tables for tokens and sets for projection."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.language import Constraint, Target
from hf_vla_actions.constraints.reach import Reach
from hf_vla_actions.errors import ConstraintError

logger = logging.getLogger(__name__)

Cell = tuple[int, int, int]  # sample, step, dimension


@dataclass(frozen=True, eq=False)
class BoundConstraints:
    """What constraints leave of each (sample, step, dimension); made by `bind`, feasible by construction.

    Args:
        space: meaning of the numbers.
        horizon: actions in a chunk.
        values: (dof, n_codes) real value of each token; None without a token grid.
        n_samples: 1 if every sample has the same constraints, else their number.
        per_sample: True if there was a list of constraints for each sample.
        sets: values that remain, for the cells that have a hard constraint: values of tokens if bound to the grid,
            else intervals.
        pulls: (n_codes,) nats, for the cells that have a soft one.
    """

    space: ActionSpace
    horizon: int
    values: np.ndarray | None
    n_samples: int
    per_sample: bool
    sets: dict[Cell, IntervalSet]
    pulls: dict[Cell, np.ndarray]

    @cached_property
    def allowed(self) -> np.ndarray:
        """(n_samples, horizon, dof, n_codes) bool: tokens whose real value satisfies the hard constraints."""
        values = self._grid()
        allowed = np.ones((self.n_samples, self.horizon, *values.shape), dtype=bool)
        for cell, members in self.sets.items():
            allowed[cell] = members.contains(values[cell[2]])
        return allowed

    @cached_property
    def nearest(self) -> np.ndarray:
        """(n_samples, horizon, dof, n_codes) int64: the allowed token closest in real units; itself if allowed."""
        values = self._grid()
        shape = (self.n_samples, self.horizon, *values.shape)
        nearest = np.broadcast_to(np.arange(values.shape[1]), shape).copy()
        for cell in self.sets:
            row, allowed = values[cell[2]], self.allowed[cell]
            codes = np.flatnonzero(allowed)
            if not len(codes):
                raise ConstraintError("no token is allowed in one cell: bind with grid=True to work with tokens")
            known, first = np.unique(row[codes], return_index=True)
            goal = IntervalSet.points(known).nearest(row)
            nearest[cell] = np.where(allowed, nearest[cell], codes[first[np.searchsorted(known, goal)]])
        return nearest

    @cached_property
    def bias(self) -> np.ndarray | None:
        """(n_samples, horizon, dof, n_codes) float64 nats of the soft targets; None if there is none."""
        if not self.pulls:
            return None
        bias = np.zeros((self.n_samples, self.horizon, *self._grid().shape))
        for cell, nats in self.pulls.items():
            bias[cell] = nats
        return bias

    def check_batch(self, batch_size: int) -> None:
        """Raise if there is a list of constraints per sample and their number is not `batch_size`."""
        if self.per_sample and batch_size != self.n_samples:
            raise ConstraintError(
                f"{self.n_samples} lists of constraints for a batch of {batch_size}: give one list per sample, or one "
                "flat list for all"
            )

    def project(self, actions) -> np.ndarray:
        """Move each number to the nearest one that is allowed.

        Args:
            actions: (..., horizon, dof) real units; with constraints per sample (batch * n, horizon, dof), n
                sequences of each sample in a row.

        Returns:
            float64 of the same shape. A number that is allowed already is returned as it is, bit by bit; a binary
            gripper is in one of its two states.
        """
        actions = self.space.settle(self._checked(actions))
        moved = np.array(actions, dtype=np.float64).reshape(-1, self.horizon, self.space.dof)
        for rows, step, dim, members in self._cells(moved):
            moved[rows, step, dim] = members.nearest(moved[rows, step, dim])
        return moved.reshape(actions.shape)

    def violations(self, actions) -> np.ndarray:
        """Distance to the nearest allowed number, in real units; shapes as in `project`, 0 where all is well."""
        given = self._checked(actions)
        flat = given.reshape(-1, self.horizon, self.space.dof)
        distance = np.zeros(flat.shape)
        for rows, step, dim, members in self._cells(flat):
            distance[rows, step, dim] = np.abs(members.nearest(flat[rows, step, dim]) - flat[rows, step, dim])
        return distance.reshape(given.shape)

    def _cells(self, actions: np.ndarray):
        if len(actions) % self.n_samples:
            raise ConstraintError(f"{len(actions)} chunks do not belong to {self.n_samples} lists of constraints")
        each = len(actions) // self.n_samples
        for (sample, step, dim), members in self.sets.items():
            yield slice(sample * each, (sample + 1) * each), step, dim, members

    def _checked(self, actions) -> np.ndarray:
        actions = np.asarray(actions, dtype=np.float64)
        if actions.shape[-2:] != (self.horizon, self.space.dof):
            raise ConstraintError(
                f"chunks have shape (..., {self.horizon}, {self.space.dof}) here, got {actions.shape}"
            )
        if not np.isfinite(actions).all():
            raise ConstraintError("actions have NaN or infinite values; they cannot be carried out or projected")
        return actions

    def _grid(self) -> np.ndarray:
        if self.values is None:
            raise ConstraintError("these constraints were bound without token values; pass values to bind")
        return self.values


def bind(
    constraints,
    space: ActionSpace,
    values: np.ndarray | None,
    horizon: int,
    *,
    limits: Sequence[Constraint] = (),
    grid: bool = True,
) -> BoundConstraints:
    """Check constraints against a robot and return what they leave.

    Args:
        constraints: one list for all samples, or a list of lists, one per sample; None for no constraints.
        space: meaning of the numbers.
        values: (dof, n_codes) float64: the value in real units that each token stands for, exactly as it will be
            carried out (un-normalized, gripper settled); None for actions that come from no tokens.
        horizon: actions in a chunk.
        limits: constraints added to every sample.
        grid: True: at least one token must remain (decoding under constraints). False: any value from half a bin
            below the lowest token to half a bin above the highest counts (actions are moved after decoding).

    Raises:
        InfeasibleConstraintError: nothing is left of a dimension.
        ConstraintError: a constraint is malformed or does not fit the chunk.
        ActionSpaceError: a dimension the space does not have.
    """
    values = _check_values(values, space, grid)
    lists, per_sample = _read_lists(constraints, tuple(limits))
    reaches = [
        Reach(space, dim, None if values is None else np.unique(values[dim]), grid and values is not None)
        for dim in range(space.dof)
    ]
    resolved = {id(c): c.resolve(space) for sample in lists for c in sample}
    solved: dict[tuple[int, ...], tuple[IntervalSet, np.ndarray | None]] = {}
    sets: dict[Cell, IntervalSet] = {}
    pulls: dict[Cell, np.ndarray] = {}
    for s, sample in enumerate(lists):
        by_cell: dict[tuple[int, int], list[Constraint]] = {}
        for constraint in sample:
            dim = int(resolved[id(constraint)].dim)
            for step in constraint.steps_in(horizon):
                by_cell.setdefault((step, dim), []).append(constraint)
        for (step, dim), active in sorted(by_cell.items(), key=lambda item: item[0]):
            key = tuple(id(constraint) for constraint in active)
            if key not in solved:
                here = [resolved[i] for i in key]
                _warn_beyond(active, reaches[dim])
                solved[key] = (
                    reaches[dim].satisfying(here),
                    _pull(here, None if values is None else values[dim]),
                )
            members, nats = solved[key]
            if members.is_empty:
                raise reaches[dim].explain(s, step, [(str(c), resolved[id(c)]) for c in active])
            if any(resolved[i].nats(np.zeros(1)) is None for i in key):
                sets[s, step, dim] = members
            if nats is not None:
                pulls[s, step, dim] = nats
    return BoundConstraints(space, horizon, values, len(lists), per_sample, sets, pulls)


def project(actions, constraints, space: ActionSpace, *, limits: Sequence[Constraint] = ()) -> np.ndarray:
    """Move a chunk that comes from no tokens (a continuous head) into the allowed set, number by number.

    Args:
        actions: (..., horizon, dof) real units.
        constraints: one list for all samples, or one list per sample.
        space: meaning of the numbers.
        limits: constraints added to every sample.

    Returns:
        float64 of the same shape; what is allowed already stays bit by bit. Soft targets move nothing.
    """
    actions = np.asarray(actions, dtype=np.float64)
    if actions.ndim < 2 or actions.shape[-1] != space.dof:
        raise ConstraintError(f"chunks have shape (..., horizon, {space.dof}), got {actions.shape}")
    bound = bind(constraints, space, None, actions.shape[-2], limits=limits, grid=False)
    bound.check_batch(int(np.prod(actions.shape[:-2], dtype=int)))
    return bound.project(actions)


def _check_values(values, space: ActionSpace, grid: bool) -> np.ndarray | None:
    if values is None:
        if grid:
            raise ConstraintError("the token grid is needed: pass values (dof, n_codes), or grid=False")
        return None
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != space.dof or not values.shape[1] or not np.isfinite(values).all():
        raise ConstraintError(f"values must be finite, of shape ({space.dof}, n_codes), got shape {values.shape}")
    return values


def _read_lists(constraints, limits: tuple[Constraint, ...]) -> tuple[list[list[Constraint]], bool]:
    """One list of constraints per sample, and whether they were given per sample."""
    given = [] if constraints is None else [constraints] if isinstance(constraints, Constraint) else constraints
    if not isinstance(given, (list, tuple)):
        raise ConstraintError(f"constraints are a list (or one list per sample), got {constraints!r}")
    per_sample = bool(given) and all(isinstance(sample, (list, tuple)) for sample in given)
    lists = [list(sample) + list(limits) for sample in (given if per_sample else [given])]
    strangers = [item for sample in lists for item in sample if not isinstance(item, Constraint)]
    if strangers:
        raise ConstraintError(
            f"constraints are a list of constraints such as Range('x', -0.01, 0.01), or one list per sample; got "
            f"{strangers[0]!r} in it"
        )
    return lists, per_sample


def _pull(constraints: list[Constraint], row: np.ndarray | None) -> np.ndarray | None:
    """Nats of all soft constraints of one cell on the token values `row` (n_codes,); None if there is none."""
    if row is None:
        return None
    nats = [pull for pull in (constraint.nats(row) for constraint in constraints) if pull is not None]
    return np.sum(nats, axis=0) if nats else None


def _warn_beyond(constraints: list[Constraint], reach: Reach) -> None:
    """Say once that a soft target lies where no value can go; it still pulls in that direction."""
    low, high = reach.bounds()
    for constraint in constraints:
        if isinstance(constraint, Target) and not constraint.hard and not low <= constraint.value <= high:
            where = f"{low:.6g}..{high:.6g} of {reach.space.describe(reach.dim)}"
            why = reach.steps_needed(constraint.value)
            _warn_once(f"{constraint} pulls beyond the reach {where}" + (f". {why}" if why else ""))


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning(message)
