"""Constraints bound to one robot: what they leave, for tokens as for numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.branch import Branch
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.projection import STYLES, project_chunks
from hf_vla_actions.constraints.terms import Hold, Pull, Term
from hf_vla_actions.errors import ConstraintError

if TYPE_CHECKING:
    import torch

    from hf_vla_actions.constraints.base import Constraint
    from hf_vla_actions.constraints.certificate import Certificate

Cell = tuple[int, int, int]  # sample, step, dimension


@dataclass(frozen=True, eq=False)
class Price:
    """A soft coupled constraint: -weight * excess^2 nats."""

    term: Term
    weight: float


@dataclass(frozen=True, eq=False)
class Fallback:
    """What was done for a sample whose constraints cannot all hold.

    Args:
        kind: "hold" (the robot is told to stay as it is) or "nearest" (constraints were left out).
        dropped: texts of the constraints that do not hold.
        reason: the error that would have been raised.
        actions: (horizon, dof) what the robot is told, real units, if it is to hold; None otherwise.
    """

    kind: str
    dropped: tuple[str, ...]
    reason: str
    actions: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class BoundConstraints:
    """What constraints leave of the chunks of each sample; made by `bind`, feasible by construction.

    Args:
        space: meaning of the numbers.
        horizon: actions in a chunk.
        values: (dof, n_codes) real value of each token; None without a token grid.
        n_samples: 1 if every sample has the same constraints, else their number.
        per_sample: True if there was a list of constraints, or a context, for each sample.
        branches: for each sample, the ways of choosing among the alternatives of `Any` that can be completed.
        pulls: (n_codes,) nats, for the (sample, step, dim) that have a soft constraint of one dimension.
        prices: for each sample, its soft coupled constraints.
        fallbacks: for each sample, what was done because it was infeasible; None where all is well.
        kept: for each sample, the constraints that hold, as they were given.
    """

    space: ActionSpace
    horizon: int
    values: np.ndarray | None
    n_samples: int
    per_sample: bool
    branches: Sequence[Sequence[Branch]]
    pulls: Mapping[Cell, np.ndarray] = field(default_factory=dict)
    prices: Sequence[Sequence[Price | Pull]] = ()
    fallbacks: Sequence[Fallback | None] = ()
    kept: Sequence[Sequence[Constraint]] = ()

    @property
    def is_static(self) -> bool:
        """True if what is allowed at one place of the chunk does not depend on the rest of it."""
        return all(len(ways) == 1 and not ways[0].terms for ways in self.branches) and not any(self.prices)

    @property
    def has_pulls(self) -> bool:
        """True if something acts on the next token softly, depending on those before."""
        reluctant = [term for ways in self.branches for way in ways for term in way.terms if isinstance(term, Hold)]
        return any(self.prices) or any(term.hysteresis is not None for term in reluctant)

    @cached_property
    def sets(self) -> dict[Cell, IntervalSet]:
        """Values left of each (sample, step, dim) that a constraint of one dimension speaks of; without alternatives."""
        single = [(s, ways[0]) for s, ways in enumerate(self.branches) if len(ways) == 1]
        return {(s, t, d): members for s, way in single for (t, d), members in way.sets.items()}

    @cached_property
    def allowed(self) -> np.ndarray:
        """(n_samples, horizon, dof, n_codes) bool: tokens that satisfy the constraints of single dimensions."""
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

    def certificate(self, device: torch.device | str = "cpu") -> Certificate:
        """The masks of the next token as a function of those before; needs the token grid (`bind(grid=True)`)."""
        from hf_vla_actions.constraints.certificate import Certificate

        return Certificate(self.branches, self._grid(), device)

    def check_batch(self, batch_size: int) -> None:
        """Raise if there is a list of constraints per sample and their number is not `batch_size`."""
        if self.per_sample and batch_size != self.n_samples:
            raise ConstraintError(
                f"constraints or context for {self.n_samples} samples (as lists, or as numbers for each sample), but a batch "
                f"of {batch_size}: give as many, or one for all"
            )

    def project(self, actions, style: str = "axis") -> np.ndarray:
        """Move chunks to where everything is allowed, and no further than needed.

        Args:
            actions: (..., horizon, dof) real units; with constraints per sample (batch * n, horizon, dof), n
                sequences of each sample in a row.
            style: "axis": each number by itself, where constraints of single dimensions allow it; "direction": a step
                that is too long is shortened as a whole first, so that it keeps its direction.

        Returns:
            float64 of the same shape. A chunk that is allowed already is returned as it is, bit by bit; a binary
            gripper is in one of its two states.
        """
        if style not in STYLES:
            raise ConstraintError(f"style must be one of {list(STYLES)}, got {style!r}")
        actions = self.space.settle(self._checked(actions))
        moved = np.array(actions, dtype=np.float64).reshape(-1, self.horizon, self.space.dof)
        for rows, ways in self._ways(moved):
            if style == "axis" and len(ways) == 1 and not ways[0].terms:
                for (step, dim), members in ways[0].sets.items():
                    moved[rows, step, dim] = members.nearest(moved[rows, step, dim])
            else:
                moved[rows] = self._nearest_way(moved[rows], ways, style)
        return moved.reshape(actions.shape)

    def _nearest_way(self, chunks: np.ndarray, ways: Sequence[Branch], style: str) -> np.ndarray:
        found = [project_chunks(chunks, dict(w.sets), list(w.terms), w.laws, self.space, style) for w in ways]
        if len(found) == 1:
            return found[0]
        distance = [np.sqrt(((one - chunks) ** 2).sum(axis=(1, 2))) for one in found]
        return np.stack(found)[np.argmin(distance, axis=0), np.arange(len(chunks))]

    def violations(self, actions) -> np.ndarray:
        """Distance of each number to what constraints of single dimensions allow, in real units; 0 where all is well."""
        given = self._checked(actions)
        flat = given.reshape(-1, self.horizon, self.space.dof)
        distance = np.zeros(flat.shape)
        for rows, ways in self._ways(flat):
            each = np.stack([way.distances(flat[rows]) for way in ways])
            distance[rows] = each[each.sum(axis=(2, 3)).argmin(axis=0), np.arange(each.shape[1])]
        return distance.reshape(given.shape)

    def excess(self, actions) -> np.ndarray:
        """(..., horizon, dof) to (..., horizon): the largest excess over any constraint at each step, in real units.

        What it measures depends on the constraint: meters too long, meters inside a zone, 1 for a change of the gripper
        that may not be. Where there are alternatives the one with the smallest excess counts.
        """
        given = self._checked(actions)
        flat = given.reshape(-1, self.horizon, self.space.dof)
        worst = np.zeros(flat.shape[:2])
        for rows, ways in self._ways(flat):
            each = np.stack([way.excess(flat[rows]) for way in ways])
            worst[rows] = each[each.max(axis=2).argmin(axis=0), np.arange(each.shape[1])]
        return worst.reshape(given.shape[:-1])

    def _ways(self, actions: np.ndarray):
        if len(actions) % self.n_samples:
            raise ConstraintError(f"{len(actions)} chunks do not belong to {self.n_samples} lists of constraints")
        each = len(actions) // self.n_samples
        for sample, ways in enumerate(self.branches):
            yield slice(sample * each, (sample + 1) * each), ways

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
