"""The constraints of one sample, on their way to branches that can be completed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from hf_vla_actions.constraints.base import Constraint
from hf_vla_actions.constraints.binder import Binder, is_soft
from hf_vla_actions.constraints.bound import Fallback, Price
from hf_vla_actions.constraints.branch import Branch
from hf_vla_actions.constraints.combined import Soft
from hf_vla_actions.constraints.explain import explain_start
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.language import OneDimensional, Target
from hf_vla_actions.constraints.reach import Reach
from hf_vla_actions.constraints.terms import Known, Pull, Term
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError

logger = logging.getLogger(__name__)


class Sample:
    """The constraints of one sample on their way to branches."""

    def __init__(self, binder: Binder, index: int, constraints: list[Constraint], known: Known, n_limits: int):
        self.binder, self.index, self.known = binder, index, known
        self.kept = list(constraints)  # what is left of them
        permanent = constraints[len(constraints) - n_limits :] if n_limits else []
        self.permanent = {id(c) for c in permanent}
        self.problem: InfeasibleConstraintError | None = None
        self.fallback: Fallback | None = None
        self.branches: list[Branch] = self._branches()

    def _branches(self) -> list[Branch]:
        self.problem = None
        branches = []
        try:
            for parts in self.binder.ways(self.kept, self.known):
                try:
                    branches.append(self.binder.branch(self.index, parts, self.known))
                except InfeasibleConstraintError as error:
                    self.problem = self.problem or error
        except InfeasibleConstraintError as error:
            # What is violated before the chunk begins does not know which sample it belongs to.
            self.problem = InfeasibleConstraintError(**{**vars(error), "sample": self.index})
        return branches

    def settle(self, starts: Sequence[bool], on_infeasible: str) -> None:
        """Keep the branches that can be completed; where there is none, raise or fall back."""
        dropped: list[str] = []
        reason = ""
        while True:
            good = [branch for branch, fine in zip(self.branches, starts, strict=True) if fine]
            if good:
                self.branches = good
                self.fallback = Fallback(on_infeasible, tuple(dropped), reason) if dropped else None
                return
            guilty, problem = self._explain()
            if on_infeasible == "raise":
                raise problem
            reason = reason or str(problem)
            logger.warning("sample %d: %s; on_infeasible=%r goes on without", self.index, problem, on_infeasible)
            if on_infeasible == "hold":
                branch, actions = self._hold()
                self.branches = [branch]
                self.fallback = Fallback("hold", tuple(str(c) for c in guilty), reason, actions)
                return
            least = min(guilty, key=self._worth)
            self.kept = [c for c in self.kept if c is not least]
            dropped.append(str(least))
            self.branches = self._branches()
            starts = self.binder.certified([self.branches])[0]

    def _worth(self, constraint: Constraint) -> tuple[bool, bool]:
        """What is left out first comes first: what nobody declared permanent, and what alone stands in the way."""
        rest = [c for c in self.kept if c is not constraint]
        return id(constraint) in self.permanent, bool(rest) and not self.binder.can_start(rest, self.known)

    def _explain(self) -> tuple[list[Constraint], InfeasibleConstraintError]:
        """A smallest set of constraints that cannot hold together, and the error that names it."""
        guilty = list(self.kept)
        for constraint in self.kept:
            rest = [c for c in guilty if c is not constraint]
            if rest and not self.binder.can_start(rest, self.known):
                guilty = rest
        if self.problem is not None and not self.branches:
            return guilty, self.problem
        return guilty, explain_start(self.binder, self.index, guilty, self.known)

    def _hold(self) -> tuple[Branch, np.ndarray]:
        """The branch that leaves nothing but the values nearest to staying as it is, and those actions themselves."""
        binder, space = self.binder, self.binder.space
        gripper = None if space.gripper is None else space.index(space.gripper.dim)
        unsaid = [space.describe(d) for d in range(space.dof) if space.delta[d] is None and d != gripper]
        if unsaid:
            raise ConstraintError(
                f"on_infeasible='hold' has to know whether {unsaid[0]} is a change or a target: give the ActionSpace its delta"
            )
        still = [0.0 if binder.rest[d] == 0 else self._stays_at(d) for d in range(space.dof)]
        sets: dict[tuple[int, int], IntervalSet] = {}
        for d, value in enumerate(still):
            here = binder.members[d].closest(value)
            sets |= {(t, d): IntervalSet.points(here.lows[:1]) for t in range(binder.horizon)}
        return binder.build(sets, [], self.known), np.tile(still, (binder.horizon, 1))

    def _stays_at(self, d: int) -> float:
        space, known = self.binder.space, self.known
        for source in (known.pose if space.delta[d] is False else None, known.last_action):
            if source is not None and np.isfinite(source[d]):
                value = np.zeros((1, space.dof))
                value[0, d] = source[d]
                return float(space.settle(value)[0, d])
        raise ConstraintError(
            f"on_infeasible='hold' has to know where {space.describe(d)} is to keep it there: pass "
            "Context(last_action=..., pose=...)"
        )

    def pulls(self) -> dict[tuple[int, int], np.ndarray]:
        """(n_codes,) nats of all soft constraints of single dimensions, for each (step, dim) that has any."""
        nats: dict[tuple[int, int], np.ndarray] = {}
        binder = self.binder
        if binder.values is None or (self.fallback and self.fallback.kind == "hold"):
            return nats
        for part, weight in self._soft_parts():
            if not isinstance(part, OneDimensional):
                continue
            added: Any = part.nats(binder.values[int(part.dim)])
            dim = int(part.dim)
            row, reach = binder.values[dim], binder.reaches[dim]
            if weight is None:
                _warn_beyond(part, reach)
            else:
                added = -weight * (part.narrow(IntervalSet.everything(), reach.half_bin).nearest(row) - row) ** 2
            for step in part.steps_in(binder.horizon):
                nats[step, dim] = nats.get((step, dim), np.zeros(len(row))) + added
        return nats

    def prices(self) -> list[Price | Pull]:
        """Soft constraints that depend on the beginning of the chunk."""
        if self.fallback and self.fallback.kind == "hold":
            return []
        parts = [(part, weight) for part, weight in self._soft_parts() if not isinstance(part, OneDimensional)]
        return [part if isinstance(part, Pull) else Price(part, weight) for part, weight in parts]  # type: ignore

    def _soft_parts(self) -> list[tuple[Constraint | Term | Pull, float | None]]:
        binder = self.binder
        found: list[Any] = []
        for source in self.kept:
            for part in filter(is_soft, source.expand(binder.space, binder.horizon, self.known, binder.half_bin)):
                if not isinstance(part, Soft):
                    found.append((part, None))
                    continue
                inner = part.constraint.expand(binder.space, binder.horizon, self.known, binder.half_bin)
                found += [(piece, part.weight) for piece in inner]
        return found


def _warn_beyond(constraint: Constraint, reach: Reach) -> None:
    """Say once that a soft target lies where no value can go; it still pulls in that direction."""
    low, high = reach.bounds()
    if isinstance(constraint, Target) and not constraint.hard and not low <= constraint.value <= high:
        where = f"{low:.6g}..{high:.6g} of {reach.space.describe(reach.dim)}"
        why = reach.steps_needed(constraint.value)
        _warn_once(f"{constraint} pulls beyond the reach {where}" + (f". {why}" if why else ""))


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning(message)
