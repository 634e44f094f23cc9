"""Laws: ways of completing any beginning of a chunk, known in advance; the witnesses of the certificate.

A law is a deterministic feedback: from the value before, and for a wanted sum from what has been summed up, it gives
the next value of a dimension. Followed from any point on, it leads to one completion, and the rest of a completion is
again the completion of what has been done so far. That is all the certificate needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.terms import Change, Hold, Predicate, Term, WeightedSum


class Moves:
    """The part of the laws that is the same wherever the robot is: what can be reached, and what each law aims at.

    Args:
        members: for each dimension, the values it can take at all.
        sets: values that constraints leave, for the (step, dim) that have any.
        limits: (horizon, dof) largest change into each step; infinite where there is none.
        rest: (dof,) goal of braking: 0 for changes, NaN (the value before) for positions and grippers.
        extra: goals (horizon, dof) of further laws.

    Attributes:
        viable: viable[step][dim], values from which the rest of the chunk can be completed within the limits.
        goals: of each law (horizon, dof), NaN for the value before.
    """

    def __init__(
        self,
        members: Sequence[IntervalSet],
        sets: Mapping[tuple[int, int], IntervalSet],
        limits: np.ndarray,
        rest: np.ndarray,
        extra: Sequence[np.ndarray] = (),
    ):
        self.limits = limits
        horizon, dof = limits.shape
        self.viable = [[sets.get((t, d), members[d]) for d in range(dof)] for t in range(horizon)]
        for t in range(horizon - 2, -1, -1):
            for d in np.flatnonzero(np.isfinite(limits[t + 1])):
                self.viable[t][d] = _within(self.viable[t][d], self.viable[t + 1][d], float(limits[t + 1, d]))
        self.goals = self._goals(rest, extra)

    @property
    def empty(self) -> tuple[int, int] | None:
        """The first (step, dim) that nothing is left of; None if all is well."""
        for t, row in enumerate(self.viable):
            for d, members in enumerate(row):
                if members.is_empty:
                    return t, d
        return None

    def _goals(self, rest: np.ndarray, extra: Sequence[np.ndarray]) -> list[np.ndarray]:
        horizon = len(self.limits)
        brake = np.tile(rest, (horizon, 1))
        if self.empty is not None:
            return [brake]
        below, above = brake.copy(), brake.copy()
        for t in range(horizon):
            for d in np.flatnonzero(rest == 0):
                lows, highs = self.viable[t][d].lows, self.viable[t][d].highs
                if self.viable[t][d].contains(0.0):
                    continue
                at = int(np.searchsorted(lows, 0.0))
                below[t, d] = highs[at - 1] if at else lows[0]
                above[t, d] = lows[at] if at < len(lows) else highs[-1]
        if np.array_equal(below, above, equal_nan=True):
            return [brake, *extra]  # 0 is to be had everywhere: braking is exact
        odd = (np.arange(horizon) % 2 == 1)[:, None]
        turns = np.where(odd, below, above), np.where(odd, above, below)
        return [brake, below, above, *turns, *extra]

    def step(self, law: int, t: int, dim: int, previous: np.ndarray, goal: np.ndarray | None = None) -> np.ndarray:
        """The value of a dimension at step t.

        Args:
            law: index into `goals`.
            t: step.
            dim: dimension.
            previous: (n,) values at the step before; NaN where there is none.
            goal: (n,) another goal than the law's own.
        """
        wanted = np.full(len(previous), self.goals[law][t, dim]) if goal is None else goal
        wanted = np.where(np.isnan(wanted), np.where(np.isnan(previous), 0.0, previous), wanted)
        members, limit = self.viable[t][dim], self.limits[t, dim]
        if not np.isfinite(limit):
            return members.nearest(wanted)
        # A few roundings less than the limit: the difference of two float64 numbers is rounded, too.
        known = np.where(np.isnan(previous), wanted, previous)
        reach = limit - 4 * np.spacing(np.maximum(np.abs(known), limit))
        wanted = np.clip(wanted, known - reach, known + reach)
        near = np.stack([members.nearest(wanted), *members.neighbors(wanted)])  # the nearest may just be out of reach
        fits = np.abs(near - known) <= limit
        best = np.where(fits, np.abs(near - wanted), np.inf).argmin(axis=0)
        return np.where(fits.any(axis=0), near[best, np.arange(len(known))], members.nearest(known))

    def leap(self, law: int, t: int, dims: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """`step` for several dimensions (n, k) at once, each with a single interval."""
        low, high = np.array([(self.viable[t][d].lows[0], self.viable[t][d].highs[0]) for d in dims]).T
        goal, limit = self.goals[law][t, dims], self.limits[t, dims]
        wanted = np.where(np.isnan(goal), np.where(np.isnan(previous), 0.0, previous), goal)
        known = np.where(np.isnan(previous), wanted, previous)
        reach = np.where(
            np.isfinite(limit), limit - 4 * np.spacing(np.maximum(np.abs(known), np.minimum(limit, 1e300))), np.inf
        )
        there = np.clip(np.clip(wanted, known - reach, known + reach), low, high)
        return np.where(np.abs(there - known) <= limit, there, np.clip(known, low, high))


@dataclass(frozen=True, eq=False)
class Aim:
    """A sum over the chunk that a dimension has to reach: each step goes for its share of what is missing."""

    counted: np.ndarray  # (horizon,) bool
    target: float

    def goal(self, t: int, total: np.ndarray) -> np.ndarray | None:
        """(n,) wanted value at step t when `total` (n,) has been summed up before it; None if t does not count."""
        return (self.target - total) / int(self.counted[t:].sum()) if self.counted[t] else None


class Laws:
    """The laws of one sample, from where its robot is now.

    Args:
        moves: what can be reached.
        terms: coupled constraints.
        start: (dof,) values before the chunk, NaN where unknown.
        half_bin: (dof,) half the distance of token values; 0 off the grid.
    """

    def __init__(self, moves: Moves, terms: Sequence[Term], start: np.ndarray, half_bin: np.ndarray):
        self.moves = moves
        self.start = start
        self.aims = find_aims(terms, half_bin)
        self.holds = {term.dim: HoldTable(term, moves) for term in terms if isinstance(term, Hold)}
        self.horizon, self.dof = moves.limits.shape

    @property
    def n_laws(self) -> int:
        """How many laws there are."""
        return len(self.moves.goals)

    def viable(self, step: int, dim: int) -> IntervalSet:
        """Values of (step, dim) from which the rest of the chunk can be completed within sets and rate limits."""
        return self.moves.viable[step][dim]

    def complete(self, law: int, chunks: np.ndarray, step: int, dim: int) -> np.ndarray:
        """Carry chunks (n, horizon, dof) on by a law, from (step, dim) to the end; what comes before is kept."""
        out = np.array(chunks, dtype=np.float64)
        first = step + (np.arange(self.dof) < dim)
        for t in range(step, self.horizon):
            here = self.plain[first[self.plain] <= t]
            if len(here):
                previous = out[:, t - 1, here] if t else np.broadcast_to(self.start[here], (len(out), len(here)))
                out[:, t, here] = self.moves.leap(law, t, here, previous)
        for d in range(self.dof):
            for t in range(first[d], self.horizon) if d not in self.plain else ():
                out[:, t, d] = self._next(law, t, d, out[:, :, d])
        return out

    @cached_property
    def plain(self) -> np.ndarray:
        """Dimensions whose next value needs no more than one interval a step: they are completed all at once."""
        single = [all(len(row[d].pairs) == 1 for row in self.moves.viable) for d in range(self.dof)]
        return np.array([d for d in np.flatnonzero(single) if d not in self.aims and d not in self.holds], dtype=int)

    def _next(self, law: int, t: int, d: int, path: np.ndarray) -> np.ndarray:
        previous = path[:, t - 1] if t else np.full(len(path), self.start[d])
        if d in self.holds:
            return self.holds[d].keep(t, path[:, :t])
        goal = None
        if d in self.aims:
            goal = self.aims[d].goal(t, np.where(self.aims[d].counted[:t], path[:, :t], 0.0).sum(axis=1))
        return self.moves.step(law, t, d, previous, goal)


class HoldTable:
    """Which states of a gripper can be completed to the end of the chunk: exact, by going backward through all of them.

    Attributes:
        fine: (horizon + 1, 2, held, switches) bool: from this state after step t - 1, the rest can be completed.
            Axes: open?, steps held (capped at `min_hold`), changes made (capped).
    """

    def __init__(self, term: Hold, moves: Moves):
        self.term = term
        horizon = len(moves.viable)
        self.top = horizon if term.max_switches is None else min(term.max_switches, horizon)
        self.cap = max(term.min_hold, 1)
        self.sets = [moves.viable[t][term.dim] for t in range(horizon)]
        self.states = np.array([[self._has(members, s) for s in (False, True)] for members in self.sets])
        self.fine = np.ones((horizon + 1, 2, self.cap + 1, self.top + 1), dtype=bool)
        for t in range(horizon - 1, -1, -1):
            for s in (0, 1):
                self.fine[t, s] = self.allowed(t, s, s) | self.allowed(t, s, 1 - s)

    def allowed(self, t: int, before: int, after: int) -> np.ndarray:
        """(held, switches) bool: whether going from one state into another at step t can be completed."""
        held = np.arange(self.cap + 1)
        ok = np.zeros((self.cap + 1, self.top + 1), dtype=bool)
        if not self.states[t, after]:
            return ok
        if before == after:
            return self.fine[t + 1, after][np.minimum(held + 1, self.cap)]
        ok[self.term.min_hold :, : self.top] = self.fine[t + 1, after][1, 1:]
        return ok

    def _has(self, members: IntervalSet, is_open: bool) -> bool:
        bounds = np.append(members.lows, members.highs)
        goal = self.term.open if is_open else self.term.closed
        near = members.nearest(np.array([goal])) if len(bounds) else np.array([])
        return bool(len(near)) and bool(self.term.is_open(near)[0]) == is_open

    def count(self, path: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """State, steps held and changes made (n,) after a path (n, t) of values."""
        state = np.full(len(path), bool(self.term.is_open(self.term.last)))
        held, switches = np.full(len(path), min(self.term.held, self.cap)), np.zeros(len(path), dtype=int)
        for t in range(path.shape[1]):
            now = self.term.is_open(path[:, t])
            change = now != state
            held = np.where(change, 1, np.minimum(held + 1, self.cap))
            switches, state = np.minimum(switches + change, self.top), now
        return state, held, switches

    def keep(self, t: int, path: np.ndarray) -> np.ndarray:
        """(n,) next value: the state is kept if the rest can be completed so, else it changes."""
        state, held, switches = self.count(path)
        stay = np.array([self.allowed(t, 0, 0), self.allowed(t, 1, 1)])[state.astype(int), held, switches]
        values = self.sets[t].nearest(np.where(state == stay, self.term.open, self.term.closed))
        before = path[:, t - 1] if t else np.full(len(path), self.term.last)
        return np.where(stay & self.sets[t].contains(before), before, values)


def find_aims(terms: Sequence[Term], half_bin: np.ndarray) -> dict[int, Aim]:
    """Dimensions that have to sum up to something at one step, and to what.

    Args:
        terms: coupled constraints.
        half_bin: (dof,) half the distance of token values: the last step comes this close to what is missing.
    """
    aims = {}
    for term in terms:
        if isinstance(term, WeightedSum) and term.cumulative and len(term.dims) == 1 and term.power == 1:
            bounds = np.stack(term.bounds)
            bounded = np.flatnonzero(np.isfinite(bounds).any(axis=0))
            away = np.flatnonzero((bounds[0] > 0) | (bounds[1] < 0))  # where standing still does not do
            if not len(away) and len(bounded) != 1:
                continue
            dim, last = term.dims[0], int(away[0] if len(away) else bounded[0])
            low, high = np.sort(bounds[:, last] / term.weights[0])
            room = max(1.01 * float(half_bin[dim]), 1e-9 * max(1.0, *np.abs([low, high])[np.isfinite([low, high])]))
            drift = len(bounds[0]) * float(half_bin[dim])
            if low <= -drift and high >= drift:
                continue  # standing still is enough
            # As near to standing still as leaves room for the last step.
            target = float(np.clip(0.0, low + room, high - room)) if high - low > 2 * room else float(low + high) / 2
            counted = np.ones(len(bounds[0]), dtype=bool) if term.counted is None else term.counted
            aims[dim] = Aim(counted & (np.arange(len(counted)) <= last), target)
    return aims


def find_limits(terms: Sequence[Term], horizon: int, dof: int) -> np.ndarray:
    """(horizon, dof) largest change into each step that all `Change` terms leave."""
    limits = np.full((horizon, dof), np.inf)
    for term in terms:
        if isinstance(term, Change):
            free = (np.arange(horizon) == 0) & (term.last is None)
            limits[:, term.dim] = np.minimum(limits[:, term.dim], np.where(free, np.inf, term.limits))
    return limits


def find_backups(terms: Sequence[Term], rest: np.ndarray, horizon: int) -> list[np.ndarray]:
    """Goals (horizon, dof) that predicates name as their way out."""
    backups = [term.backup for term in terms if isinstance(term, Predicate) and term.backup is not None]
    return [np.where(np.isnan(backup), rest, np.broadcast_to(backup, (horizon, len(rest)))) for backup in backups]


def _within(members: IntervalSet, following: IntervalSet, limit: float) -> IntervalSet:
    """The members from which some number of `following` is at most `limit` away."""
    if members.is_empty or following.is_empty:
        return IntervalSet.from_pairs([])
    points = members.lows == members.highs
    if points.all():
        near = np.abs(following.nearest(members.lows) - members.lows) <= limit
        return IntervalSet(members.pairs[near])
    reach = limit - 8 * np.spacing(max(limit, np.abs(following.pairs[np.isfinite(following.pairs)]).max(initial=0.0)))
    reach = max(reach, 0.0)
    grown = IntervalSet(np.stack([following.lows - reach, following.highs + reach], axis=1))
    return members.intersect(grown)
