"""The certificate walk: from step to step as close to the wanted chunk as can still be completed within everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hf_vla_actions.constraints.allowed import Allowed
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.errors import ConstraintError

GRID = 16  # factors tried at once
ZOOMS = 4  # each looks between two neighbors of the last: 16**4 parts in all


class Completing(Protocol):
    """What is needed of `laws.Laws`."""

    @property
    def n_laws(self) -> int:
        """How many laws there are."""

    def viable(self, step: int, dim: int) -> IntervalSet:
        """Values of (step, dim) from which the rest of the chunk can be completed within sets and rate limits."""

    def complete(self, law: int, chunks: np.ndarray, step: int, dim: int) -> np.ndarray:
        """Carry chunks (n, horizon, dof) on by a law, from (step, dim) to the end; what comes before is kept."""


class Walk:
    """Walks through chunks of one sample and keeps, for each, a whole chunk that is allowed: what is returned at last.

    Args:
        wanted: (n, horizon, dof) where the chunks should go.
        allowed: what is asked of them.
        laws: ways of completing a beginning.
        groups: dimensions that are brought closer together, one group after the other.
        switches: dimensions that are never blended.

    Raises:
        ConstraintError: no law leads to an allowed chunk from the start.
    """

    def __init__(
        self,
        wanted: np.ndarray,
        allowed: Allowed,
        laws: Completing,
        groups: Sequence[Sequence[int]],
        switches: Sequence[int] = (),
    ):
        self.wanted, self.allowed, self.laws = wanted, allowed, laws
        self.horizon, self.dof = wanted.shape[1:]
        self.switches = np.isin(np.arange(self.dof), list(switches))
        masks = [np.isin(np.arange(self.dof), list(group)) for group in groups]
        self.groups = np.array(masks, dtype=bool).reshape(-1, self.dof)
        self.gaps = [
            [(d, m) for d in range(self.dof) if self._has_gaps(d, m := laws.viable(t, d))] for t in range(self.horizon)
        ]
        self.safe = self._start()

    def _has_gaps(self, dim: int, members: IntervalSet) -> bool:
        return len(members.pairs) > 1 and not self.switches[dim]

    def run(self) -> np.ndarray:
        """(n, horizon, dof) allowed chunks."""
        everyone = np.arange(len(self.wanted))
        for t in range(self.horizon):
            # Whoever can simply go on as wanted has arrived.
            ahead = np.concatenate([self.safe[everyone, :t], self.wanted[everyone, t:]], axis=1)
            free = self.allowed.safely(ahead)
            self.safe[everyone[free]] = ahead[free]
            everyone = everyone[~free]
            if not len(everyone):
                break
            missed = everyone[~self._take(t, everyone, self.wanted[everyone, t])]
            if len(missed):
                self._approach(t, missed)
        return self.safe

    def _start(self) -> np.ndarray:
        made, ok = self._completions(0, self.wanted[:1])  # without any beginning, all chunks are completed alike
        if not ok.any():
            raise ConstraintError(
                "no way of completing the chunk from its start is within all constraints: the present state, the last "
                "action or the constraints leave nothing to move to; relax one of them, or name a backup"
            )
        return np.repeat(made[:, ok[0].argmax()], len(self.wanted), axis=0)

    def _completions(self, t: int, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each law makes of chunks from step t on (m, laws, horizon, dof), and whether it is allowed."""
        made = np.stack([self.laws.complete(law, chunks, t, 0) for law in range(self.laws.n_laws)], axis=1)
        ok = self.allowed.safely(made.reshape(-1, self.horizon, self.dof)).reshape(len(chunks), -1)
        return made, ok

    def _certify(self, t: int, rows: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether each point (m, dof), taken at step t by the chunk in `rows`, can be completed; and how."""
        wanted = np.concatenate([self.safe[rows, :t], points[:, None], self.wanted[rows, t + 1 :]], axis=1)
        ok, chunks = self.allowed.safely(wanted), wanted
        for law in range(self.laws.n_laws if t + 1 < self.horizon else 0):
            left = np.flatnonzero(~ok)
            if not len(left):
                break
            made = self.laws.complete(law, wanted[left], t, self.dof)
            fine = self.allowed.safely(made)
            ok[left[fine]], chunks[left[fine]] = True, made[fine]
        return ok, chunks

    def _take(self, t: int, rows: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Go to the points that can be completed; bool of which."""
        if not len(rows):
            return np.zeros(0, dtype=bool)
        ok, chunks = self._certify(t, rows, points)
        self.safe[rows[ok]] = chunks[ok]
        return ok

    def _approach(self, t: int, rows: np.ndarray) -> None:
        """As close to the wanted actions as possible: all dimensions at once, then each group by itself."""
        self._blend(t, rows)
        self._improve(t, rows, zoom=False)
        self._improve(t, rows, zoom=True)

    def _blend(self, t: int, rows: np.ndarray) -> None:
        wanted = self.wanted[rows, t]
        made, ok = self._completions(t, self.safe[rows])
        starts = np.concatenate([made[:, :, t], self.safe[rows, None, t]], axis=1)  # (m, laws + 1, dof)
        ok = np.concatenate([ok, np.ones((len(rows), 1), dtype=bool)], axis=1)
        self._switch(t, rows, starts, ok)
        goals = np.where(self.switches, starts, wanted[:, None])
        each = np.arange(len(rows))
        ok[:, -1] = ~(ok[:, :-1] & (starts[:, :-1] == starts[:, -1:]).all(axis=-1)).any(axis=1)  # no line twice
        reached = self._furthest(t, rows, starts, goals, ok, zooms=1)
        closest = self._between(t, starts, goals, reached)
        best = np.where(ok, np.abs(closest - wanted[:, None]).sum(axis=-1), np.inf).argmin(axis=1)
        start, goal, low = starts[each, best][:, None], goals[each, best][:, None], reached[each, best][:, None]
        low = self._furthest(t, rows, start, goal, np.ones(low.shape, dtype=bool), ZOOMS, low)
        self._take(t, rows, self._between(t, start, goal, low)[:, 0])

    def _switch(self, t: int, rows: np.ndarray, starts: np.ndarray, ok: np.ndarray) -> None:
        """Put the gripper where it is wanted, in place, for those starts that can do with it."""
        switched = np.where(self.switches, self.wanted[rows, None, t], starts)
        at, law = np.nonzero(ok & (switched != starts).any(axis=-1))
        if len(at):
            fine = self._certify(t, rows[at], switched[at, law])[0]
            starts[at[fine], law[fine]] = switched[at[fine], law[fine]]

    def _improve(self, t: int, rows: np.ndarray, zoom: bool) -> None:
        """Bring groups to their goal one by one, all the way or (zoom) as far as they go."""
        now, wanted = self.safe[rows, t], self.wanted[rows, t]
        starts = np.repeat(now[:, None], len(self.groups), axis=1)
        goals = np.where(self.groups, wanted[:, None], starts)
        off = (goals != starts).any(axis=-1)
        if zoom:
            off &= ~(self.groups & self.switches).any(axis=1)
            reached = self._furthest(t, rows, starts, goals, off)
        else:
            at, group = np.nonzero(off)
            reached = np.zeros(off.shape)
            if len(at):
                reached[at, group] = self._certify(t, rows[at], goals[at, group])[0]
        better = self._between(t, starts, goals, reached)
        moves = reached > 0
        together = np.where((moves[..., None] & self.groups).any(axis=1), (better * self.groups).sum(axis=1), now)
        some = np.flatnonzero(moves.any(axis=1))
        left = some[~self._take(t, rows[some], together[some])]
        for k, group in enumerate(self.groups):  # not all at once: one after the other
            each = left[moves[left, k]]
            self._take(t, rows[each], np.where(group, better[each, k], self.safe[rows[each], t]))

    def _furthest(
        self,
        t: int,
        rows: np.ndarray,
        starts: np.ndarray,
        goals: np.ndarray,
        use: np.ndarray,
        zooms: int = ZOOMS - 1,
        known: np.ndarray | None = None,
    ) -> np.ndarray:
        """Largest factors found (m, k) that certify start + factor * (goal - start), (m, k, dof) each; 0 for the start.

        Args:
            t: step.
            rows: (m,) chunks.
            starts: points that are certified.
            goals: where they should go.
            use: (m, k) bool: lines to look at.
            zooms: how often to look between two neighbors.
            known: (m, k) what the first look has found already.
        """
        low, width = (np.zeros(use.shape), 1.0) if known is None else (known.copy(), 1 / GRID)
        use = use & (starts != goals).any(axis=-1)
        for _ in range(zooms - (known is not None)):
            at, line = np.nonzero(use & (low < 1.0))
            if not len(at):
                break
            factors = np.minimum(low[at, line][:, None] + width * np.arange(1, GRID + 1) / GRID, 1.0)
            points = self._between(t, starts[at, line][:, None], goals[at, line][:, None], factors)
            ok = self._certify(t, np.repeat(rows[at], GRID), points.reshape(-1, self.dof))[0].reshape(-1, GRID)
            low[at, line] = np.where(ok.any(axis=1), np.where(ok, factors, 0.0).max(axis=1), low[at, line])
            width /= GRID
        return low

    def _between(self, t: int, start: np.ndarray, goal: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """start + factor * (goal - start), the ends bit by bit, numbers in a gap at its nearer end.

        The factor has one axis less than the points.
        """
        factor = factor[..., None]
        points = np.where(factor >= 1.0, goal, np.where(factor <= 0.0, start, start + factor * (goal - start)))
        for d, members in self.gaps[t]:
            moved = (points[..., d] != start[..., d]) & (points[..., d] != goal[..., d])
            points[..., d] = np.where(moved, members.nearest(points[..., d]), points[..., d])
        return points
