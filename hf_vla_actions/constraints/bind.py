"""Binding constraints to one robot: everything is checked here, before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from typing import TypeVar

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.base import Constraint
from hf_vla_actions.constraints.bound import BoundConstraints, Fallback, Price
from hf_vla_actions.constraints.branch import Branch
from hf_vla_actions.constraints.combined import Any, Soft
from hf_vla_actions.constraints.context import Context
from hf_vla_actions.constraints.explain import explain_start
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.language import OneDimensional, Target
from hf_vla_actions.constraints.laws import Laws, Moves, find_backups, find_limits
from hf_vla_actions.constraints.plans import find_plan
from hf_vla_actions.constraints.reach import Reach
from hf_vla_actions.constraints.tables import LawTables
from hf_vla_actions.constraints.terms import Change, Hold, Known, Pull, Term
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError

logger = logging.getLogger(__name__)

ON_INFEASIBLE = ("raise", "hold", "nearest")
MOST_WAYS = 64  # combinations of alternatives
Sourced = tuple[Constraint, Constraint | Term | Pull]  # the user's constraint, and one part of what it comes down to
T = TypeVar("T")


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
    lists, per_sample = with_limits(constraints, tuple(limits)), _is_per_sample(constraints)
    lists, per_sample = _spread(lists, per_sample, context)
    binder = _Binder(space, values, horizon, grid)
    samples = []
    for s, sample in enumerate(lists):
        known = Known() if context is None else context.known(space, s, len(lists))
        samples.append(_Sample(binder, s, [c.sample(s) for c in sample], known, n_limits=len(limits)))
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
    actions = np.asarray(actions, dtype=np.float64)
    if actions.ndim < 2 or actions.shape[-1] != space.dof:
        raise ConstraintError(f"chunks have shape (..., horizon, {space.dof}), got {actions.shape}")
    bound = bind(constraints, space, None, actions.shape[-2], limits=limits, grid=False, context=context)
    bound.check_batch(int(np.prod(actions.shape[:-2], dtype=int)))
    return bound.project(actions, style)


class _Binder:
    """What is the same for all samples, and what was worked out for one of them already."""

    def __init__(self, space: ActionSpace, values: np.ndarray | None, horizon: int, grid: bool):
        self.space, self.values, self.horizon = space, values, horizon
        self.grid = grid and values is not None
        tokens = [
            None if values is None else np.unique(row) for row in (values if values is not None else space.names)
        ]
        self.reaches = [Reach(space, dim, tokens[dim], self.grid) for dim in range(space.dof)]
        self.members = [reach.members for reach in self.reaches]
        self.half_bin = np.array([reach.half_bin for reach in self.reaches])
        gripper = None if space.gripper is None else space.index(space.gripper.dim)
        # Braking: changes go to 0, positions and grippers stay as they are.
        still = [d == gripper or space.delta[d] is False for d in range(space.dof)]
        self.rest = np.where(still, np.nan, 0.0)
        self._memory: dict = {}

    def once(self, key, make: Callable[[], T]) -> T:
        """What `make` returned the first time for this key."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

    def ways(self, constraints: Sequence[Constraint], known: Known) -> list[list[Sourced]]:
        """All hard parts of some constraints, once for each way of choosing among alternatives."""
        fixed: list[Sourced] = []
        choices: list[list[list[Sourced]]] = []
        for source in constraints:
            for part in source.expand(self.space, self.horizon, known, self.half_bin):
                if isinstance(part, Any):
                    choices.append(self._alternatives(source, part, known))
                elif not _is_soft(part):
                    fixed.append((source, part))
        if np.prod([len(options) for options in choices]) > MOST_WAYS:
            raise ConstraintError(
                f"the alternatives combine in more than {MOST_WAYS} ways; use fewer Any, or InSet and Forbid on one dimension"
            )
        return [fixed + [part for option in options for part in option] for options in product(*choices)]

    def _alternatives(self, source: Constraint, part: Any, known: Known) -> list[list[Sourced]]:
        options: list[list[Sourced]] = []
        problem: InfeasibleConstraintError | None = None
        for alternative in part.alternatives:
            try:
                for way in self.ways(alternative, known):
                    options.append([(source, piece) for _, piece in way])
            except InfeasibleConstraintError as error:
                problem = problem or error
        if not options and problem is not None:
            raise problem
        return options

    def branch(self, sample: int, parts: Sequence[Sourced], known: Known) -> Branch:
        """One branch; raises if a dimension has nothing left. Whether it can be completed is another question."""
        cells: dict[tuple[int, int], list[Sourced]] = {}
        for source, part in parts:
            if isinstance(part, OneDimensional):
                for step in part.steps_in(self.horizon):
                    cells.setdefault((step, int(part.dim)), []).append((source, part))
        sets = {}
        for (step, dim), active in sorted(cells.items(), key=lambda item: item[0]):
            here = [part for _, part in active]
            members = self.once(("set", dim, repr(here)), lambda d=dim, h=here: self.reaches[d].satisfying(h))
            if members.is_empty:
                raise self.reaches[dim].explain(sample, step, [(str(source), part) for source, part in active])
            sets[step, dim] = members
        terms = [(source, part) for source, part in parts if not isinstance(part, Constraint)]
        _check_holds([part for _, part in terms])
        return self._branch(sets, terms, known)

    def _branch(self, sets, terms: Sequence[Sourced], known: Known) -> Branch:
        only = [part for _, part in terms]
        limits = find_limits(only, self.horizon, self.space.dof)
        extra = find_backups(only, self.rest, self.horizon)
        extra += find_plan(only, sets, self.members, self.rest, self.horizon, self.half_bin)
        key = (
            "moves",
            tuple((cell, id(m)) for cell, m in sets.items()),
            limits.tobytes(),
            *[e.tobytes() for e in extra],
        )
        moves = self.once(key, lambda: Moves(self.members, sets, limits, self.rest, extra))
        start = np.full(self.space.dof, np.nan) if known.last_action is None else known.last_action
        if known.pose is not None:
            absolute = np.array([delta is False for delta in self.space.delta])
            start = np.where(np.isnan(start) & absolute, known.pose, start)
        laws = Laws(self.space, moves, only, start)
        tables = None
        if self.grid and moves.empty is None:
            tables = self.once(("tables", id(moves)), lambda: LawTables(moves, self.values))
        return Branch(sets, only, [str(source) for source, _ in terms], laws, tables)

    def certified(self, branches: Sequence[Sequence[Branch]]) -> list[list[bool]]:
        """For each branch of each sample, whether some completion of the empty chunk is certified."""
        if not any(branch.terms for ways in branches for branch in ways):
            return [[True] * len(ways) for ways in branches]
        if not self.grid:
            return [[way.laws.moves.empty is None and way.starts() for way in ways] for ways in branches]
        from hf_vla_actions.constraints.certificate import Certificate

        whole = [[way for way in ways if way.laws.moves.empty is None] for ways in branches]
        found = [iter(starts) for starts in Certificate(whole, self.values).starts()]  # type: ignore[arg-type]
        return [
            [way.laws.moves.empty is None and next(starts) for way in ways]
            for ways, starts in zip(branches, found, strict=True)
        ]

    def can_start(self, constraints: Sequence[Constraint], known: Known) -> bool:
        """Whether these constraints alone can be completed."""
        try:
            branches = [self.branch(0, parts, known) for parts in self.ways(constraints, known)]
        except InfeasibleConstraintError:
            return False
        return any(self.certified([branches])[0])


class _Sample:
    """The constraints of one sample on their way to branches."""

    def __init__(self, binder: _Binder, index: int, constraints: list[Constraint], known: Known, n_limits: int):
        self.binder, self.index, self.known = binder, index, known
        self.constraints, self.hard = constraints, list(constraints)
        permanent = constraints[len(constraints) - n_limits :] if n_limits else []
        self.permanent = {id(c) for c in permanent}
        self.problem: InfeasibleConstraintError | None = None
        self.fallback: Fallback | None = None
        self.branches: list[Branch] = self._branches()

    def _branches(self) -> list[Branch]:
        self.problem = None
        branches = []
        try:
            for parts in self.binder.ways(self.hard, self.known):
                try:
                    branches.append(self.binder.branch(self.index, parts, self.known))
                except InfeasibleConstraintError as error:
                    self.problem = self.problem or error
        except InfeasibleConstraintError as error:
            self.problem = error
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
            if on_infeasible == "hold":
                branch, actions = self._hold()
                self.branches = [branch]
                self.fallback = Fallback("hold", tuple(str(c) for c in guilty), reason, actions)
                return
            least = min(guilty, key=lambda c: id(c) in self.permanent)
            self.hard = [c for c in self.hard if c is not least]
            dropped.append(str(least))
            self.branches = self._branches()
            starts = self.binder.certified([self.branches])[0]

    def _explain(self) -> tuple[list[Constraint], InfeasibleConstraintError]:
        """A smallest set of constraints that cannot hold together, and the error that names it."""
        guilty = list(self.hard)
        for constraint in self.hard:
            rest = [c for c in guilty if c is not constraint]
            if rest and not self.binder.can_start(rest, self.known):
                guilty = rest
        if self.problem is not None and not self.branches:
            return guilty, self.problem
        return guilty, explain_start(self.binder, self.index, guilty, self.known)

    def _hold(self) -> tuple[Branch, np.ndarray]:
        """The branch that leaves nothing but the values nearest to staying as it is, and those actions themselves."""
        binder, space = self.binder, self.binder.space
        still = [0.0 if binder.rest[d] == 0 and space.delta[d] else self._stays_at(d) for d in range(space.dof)]
        sets = {}
        for d, value in enumerate(still):
            here = binder.members[d].closest(value)
            sets |= {(t, d): IntervalSet.points(here.lows[:1]) for t in range(binder.horizon)}
        return binder._branch(sets, [], self.known), np.tile(still, (binder.horizon, 1))

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
            dim = int(part.dim)
            row, reach = binder.values[dim], binder.reaches[dim]
            if weight is None:
                _warn_beyond(part, reach)
                added = part.nats(row)
            else:
                added = -weight * (part.narrow(IntervalSet.everything(), reach.half_bin).nearest(row) - row) ** 2
            for step in part.steps_in(binder.horizon):
                nats[step, dim] = nats.get((step, dim), 0.0) + added
        return nats

    def prices(self) -> list[Price | Pull]:
        """Soft constraints that depend on the beginning of the chunk."""
        if self.fallback and self.fallback.kind == "hold":
            return []
        parts = [(part, weight) for part, weight in self._soft_parts() if not isinstance(part, OneDimensional)]
        return [part if isinstance(part, Pull) else Price((part,), weight) for part, weight in parts]  # type: ignore

    def _soft_parts(self) -> list[tuple[Constraint | Term | Pull, float | None]]:
        binder, found = self.binder, []
        for source in self.constraints:
            for part in filter(_is_soft, source.expand(binder.space, binder.horizon, self.known, binder.half_bin)):
                if not isinstance(part, Soft):
                    found.append((part, None))
                    continue
                inner = part.constraint.expand(binder.space, binder.horizon, self.known, binder.half_bin)
                found += [(piece, part.weight) for piece in inner]
        return found  # type: ignore[return-value]


def _check_values(values, space: ActionSpace, grid: bool) -> np.ndarray | None:
    if values is None:
        if grid:
            raise ConstraintError("the token grid is needed: pass values (dof, n_codes), or grid=False")
        return None
    values = np.asarray(values, dtype=np.float64)
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
        raise ConstraintError(f"constraints are a list (or one list per sample), got {constraints!r}")
    lists = [list(sample) + list(limits) for sample in (given if _is_per_sample(given) else [given])]
    strangers = [item for sample in lists for item in sample if not isinstance(item, Constraint)]
    if strangers:
        raise ConstraintError(
            f"constraints are a list of constraints such as Range('x', -0.01, 0.01), or one list per sample; got "
            f"{strangers[0]!r} in it"
        )
    return lists


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


def _is_soft(part) -> bool:
    """Whether a part only makes some actions likelier."""
    return isinstance(part, Pull) or (isinstance(part, Constraint) and not part.is_hard)


def _check_holds(terms: Sequence[Term]) -> None:
    """A gripper that holds has an automaton of its own, which knows nothing of other coupled constraints."""
    for hold in (term for term in terms if isinstance(term, Hold)):
        other = [term for term in terms if term is not hold and hold.dim in term.dims]
        if other:
            what = "rate limit" if isinstance(other[0], Change) else type(other[0]).__name__
            raise ConstraintError(
                f"Sticky cannot be combined with another coupled constraint of the same dimension ({what}); put both into "
                "one Where, or leave one out"
            )


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
