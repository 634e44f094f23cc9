"""What is the same for all samples of one robot, and what was worked out for it already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any as AnyType
from typing import TypeVar

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.base import Constraint
from hf_vla_actions.constraints.branch import Branch
from hf_vla_actions.constraints.combined import Any
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.language import OneDimensional
from hf_vla_actions.constraints.laws import Laws, Moves, find_backups, find_limits
from hf_vla_actions.constraints.plans import find_plan
from hf_vla_actions.constraints.reach import Reach
from hf_vla_actions.constraints.tables import LawTables
from hf_vla_actions.constraints.terms import Change, Hold, Known, Predicate, Pull, Term, WeightedSum, Zone
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError

ROBOTS, REMEMBERED, RECENT_MOVES = (
    8,
    256,
    8,
)  # kept from one call to the next: binders, small things of each, large ones
IN_WORDS = {Change: "a rate limit", WeightedSum: "a sum or a speed", Zone: "a zone", Predicate: "Where"}
MOST_WAYS = 64  # combinations of alternatives
Sourced = tuple[Constraint, Constraint | Term | Pull]  # the user's constraint, and one part of what it comes down to
T = TypeVar("T")
_RECENT: dict[tuple, Binder] = {}


def binder_of(space: ActionSpace, values: np.ndarray | None, horizon: int, grid: bool) -> Binder:
    """The binder of a robot: the one of the last calls, which remembers, if it is the same robot."""
    key = repr(space), None if values is None else values.tobytes(), horizon, grid
    binder = _RECENT.pop(key, None)
    if binder is None or len(binder.memory) > REMEMBERED:
        binder = Binder(space, values, horizon, grid)
    _RECENT[key] = binder
    while len(_RECENT) > ROBOTS:
        _RECENT.pop(next(iter(_RECENT)), None)
    return binder


class Binder:
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
        self.memory: dict = {}
        self.recent: dict[tuple, tuple[Moves, LawTables | None]] = {}  # large, so only a few of them

    def once(self, key, make: Callable[[], T]) -> T:
        """What `make` returned the first time for this key."""
        found = self.memory.get(key)
        if found is None:
            found = self.memory[key] = make()
        return found

    def ways(self, constraints: Sequence[Constraint], known: Known) -> list[list[Sourced]]:
        """All hard parts of some constraints, once for each way of choosing among alternatives."""
        fixed: list[Sourced] = []
        choices: list[list[list[Sourced]]] = []
        for source in constraints:
            for part in source.expand(self.space, self.horizon, known, self.half_bin):
                if isinstance(part, Any):
                    choices.append(self._alternatives(source, part, known))
                elif not is_soft(part):
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
            here: AnyType = [part for _, part in active]
            members = self.once(("set", dim, repr(here)), partial(self.reaches[dim].satisfying, here))
            if members.is_empty:
                named: AnyType = [(str(source), part) for source, part in active]
                raise self.reaches[dim].explain(sample, step, named)
            sets[step, dim] = members
        terms: AnyType = [(source, part) for source, part in parts if not isinstance(part, Constraint)]
        terms = _merged_holds(terms)
        _check_holds([part for _, part in terms])
        return self.build(sets, terms, known)

    def build(self, sets: dict[tuple[int, int], IntervalSet], terms: Sequence[Sourced], known: Known) -> Branch:
        """The branch of some sets and terms."""
        only: AnyType = [part for _, part in terms]
        limits = find_limits(only, self.horizon, self.space.dof)
        extra = find_backups(only, self.rest, self.horizon)
        shared = tuple((cell, id(m)) for cell, m in sets.items()), limits.tobytes()
        sums = [term for term in only if isinstance(term, WeightedSum) and not term.cumulative]
        facts = [(s.dims, s.power, np.array(s.weights).tobytes(), s.low.tobytes(), s.high.tobytes()) for s in sums]
        extra += self.once(
            ("plan", *shared, *facts),
            lambda: find_plan(only, sets, self.members, self.rest, self.horizon, self.half_bin),
        )
        key = ("moves", *shared, *[e.tobytes() for e in extra])
        if key not in self.recent:
            made = Moves(self.members, sets, limits, self.rest, extra)
            on_grid = self.grid and made.empty is None
            self.recent[key] = made, LawTables(made, self.values) if on_grid else None  # type: ignore[arg-type]
        self.recent[key] = self.recent.pop(key)  # the newest last
        while len(self.recent) > RECENT_MOVES:
            self.recent.pop(next(iter(self.recent)))
        moves, tables = self.recent[key]
        start = np.full(self.space.dof, np.nan) if known.last_action is None else known.last_action
        if known.pose is not None:
            absolute = np.array([delta is False for delta in self.space.delta])
            start = np.where(np.isnan(start) & absolute, known.pose, start)
        laws = Laws(moves, only, start, self.half_bin)
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


def is_soft(part) -> bool:
    """Whether a part only makes some actions likelier."""
    return isinstance(part, Pull) or (isinstance(part, Constraint) and not part.is_hard)


def _merged_holds(terms: Sequence[Sourced]) -> list[Sourced]:
    """Several holds of one gripper as one: the strictest of each kind."""
    merged: dict[int, Sourced] = {}
    others = []
    for source, term in terms:
        if not isinstance(term, Hold):
            others.append((source, term))
        elif term.dim not in merged:
            merged[term.dim] = source, term
        else:
            first: AnyType = merged[term.dim][1]
            switches = [n for n in (first.max_switches, term.max_switches) if n is not None]
            sure = [p for p in (first.hysteresis, term.hysteresis) if p is not None]
            merged[term.dim] = (
                merged[term.dim][0],
                replace(
                    first,
                    min_hold=max(first.min_hold, term.min_hold),
                    max_switches=min(switches, default=None),
                    hysteresis=max(sure, default=None),
                ),
            )
    return [*others, *merged.values()]


def _check_holds(terms: Sequence[Term]) -> None:
    """A gripper that holds has an automaton of its own, which knows nothing of other coupled constraints."""
    for hold in (term for term in terms if isinstance(term, Hold)):
        other = [term for term in terms if term is not hold and hold.dim in term.dims]
        if other:
            what = IN_WORDS[type(other[0])]
            raise ConstraintError(
                f"Sticky cannot be combined with another coupled constraint of the same dimension ({what}); put both into "
                "one Where, or leave one out"
            )
