"""The nearest chunk within convex constraints: alternating directions, with one small matrix a dimension.

Minimizes |x - wanted|^2 over A x in C, where A holds numbers, changes and running sums of each dimension and C is a
product of intervals, slabs and balls. Dykstra's sweeps carry news from one step to the next only; here the inverse of
I + A'A carries it over the whole chunk at once, so that long horizons need no more rounds than short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_vla_actions.constraints.terms import Change, Term, WeightedSum

ROUNDS = 300
CHECK_EVERY = 10
RELAX = 1.8  # over-relaxation
STIFF = 1.7  # weight of a row of A against the distance; rows have length 1. Both measured: fewest rounds
INSIDE = 1e-5  # relative distance to the bounds that is kept, so that the iteration ends inside of them
CLOSE = 1e-5  # change of the result in a round, relative to the way moved, that counts as converged


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of A that are bounded together.

    Args:
        dims: indices of the dimensions, (k,).
        rows: indices of the rows of A, (m,).
        kind: "slab" (sum over dims), "ball" (2-norm over dims) or "diamond" (1-norm over dims).
        low: (m, 1) bounds; of slabs only.
        high: (m, 1) bounds.
        whole: bound all rows together, not each.
    """

    dims: np.ndarray
    rows: np.ndarray
    kind: str
    low: np.ndarray
    high: np.ndarray
    whole: bool = False

    def project(self, z: np.ndarray) -> None:
        """Move z (dof, rows, n) in place to the nearest point within the bounds."""
        at = np.ix_(self.dims, self.rows)
        part = z[at]
        if self.kind == "slab":
            total = part.sum(axis=0)
            z[at] = part - (total - np.clip(total, self.low, self.high)) / len(self.dims)
            return
        flat = part.reshape(-1, 1, part.shape[2]) if self.whole else part
        size = np.sqrt((flat**2).sum(axis=0)) if self.kind == "ball" else np.abs(flat).sum(axis=0)
        if (size <= self.high).all():
            return
        if self.kind == "ball":
            flat = flat * np.minimum(1.0, self.high / np.maximum(size, np.finfo(float).tiny))
        else:
            flat = np.sign(flat) * np.maximum(np.abs(flat) - self._threshold(flat), 0.0)
        z[at] = flat.reshape(part.shape)

    def _threshold(self, flat: np.ndarray) -> np.ndarray:
        """What the 1-norm ball takes off each absolute value (of axis 0): the largest share over the k largest ones."""
        ordered = -np.sort(-np.abs(flat), axis=0)
        count = np.arange(1, len(flat) + 1).reshape(-1, 1, 1)
        return np.maximum(((np.cumsum(ordered, axis=0) - self.high) / count).max(axis=0), 0.0)


class Nearest:
    """The convex part of terms, ready to be solved for many chunks.

    Args:
        terms: coupled constraints; zones, holds and predicates are left out, and so are lower bounds of norms.
        horizon: steps in a chunk.
        dof: numbers in an action.
    """

    def __init__(self, terms: Sequence[Term], horizon: int, dof: int):
        self.horizon, self.dof = horizon, dof
        self.blocks: list[np.ndarray] = []  # (dof, horizon, horizon) each
        self.bounds: list[np.ndarray] = []  # (2, dof, horizon) each
        self.groups: list[Group] = []
        self.first = np.full((2, dof), [[-np.inf], [np.inf]])  # bounds of step 0 that come from the last action
        self.local = np.full((2, horizon, dof), -np.inf)  # bounds of single numbers
        self.local[1] = np.inf
        self._changes([term for term in terms if isinstance(term, Change)])
        for term in terms:
            if isinstance(term, WeightedSum):
                self._sum(term)

    @property
    def is_trivial(self) -> bool:
        """True if nothing couples one number with another: the nearest members are the answer."""
        return not self.blocks

    def _changes(self, terms: Sequence[Change]) -> None:
        limits = np.full((self.dof, self.horizon), np.inf)
        for term in terms:
            limits[term.dim] = np.minimum(limits[term.dim], term.limits)
            if term.last is not None:
                reach = term.limits[0] - 4 * np.spacing(max(abs(term.last), min(term.limits[0], 1e300)))
                reach = max(reach, 0.0)
                self.local[0, 0, term.dim] = max(self.local[0, 0, term.dim], term.last - reach)
                self.local[1, 0, term.dim] = min(self.local[1, 0, term.dim], term.last + reach)
        limits[:, 0] = np.inf
        if np.isfinite(limits).any():
            difference = np.eye(self.horizon) - np.eye(self.horizon, k=-1)
            self._add(np.tile(difference / np.sqrt(2), (self.dof, 1, 1)), np.stack([-limits, limits]) / np.sqrt(2))

    def _sum(self, term: WeightedSum) -> None:
        low, high = term.bounds
        dims = np.array(term.dims)
        counted = np.ones(self.horizon) if term.counted is None else np.asarray(term.counted, dtype=float)
        if term.power != 1:
            self._norm(term, dims, counted)
            return
        if not term.cumulative and len(dims) == 1:
            ends = np.sort(np.stack([low, high]) / term.weights[0], axis=0)
            self.local[0, :, dims[0]] = np.maximum(self.local[0, :, dims[0]], ends[0])
            self.local[1, :, dims[0]] = np.minimum(self.local[1, :, dims[0]], ends[1])
            return
        rows = np.tril(np.ones((self.horizon, self.horizon))) * counted if term.cumulative else np.eye(self.horizon)
        scale = 1 / (np.abs(term.weights).max() * np.maximum(np.sqrt(rows.sum(axis=1)), 1.0))
        block = np.zeros((self.dof, self.horizon, self.horizon))
        bounds = np.full((2, self.dof, self.horizon), [[[-np.inf]], [[np.inf]]])
        block[dims] = np.asarray(term.weights)[:, None, None] * (rows * scale[:, None])
        if len(dims) == 1:
            bounds[:, dims[0]] = low * scale, high * scale
            self._add(block, bounds)
            return
        low, high = _inside(low * scale, high * scale)
        bounded = np.flatnonzero(np.isfinite(low) | np.isfinite(high))
        place = len(self.blocks) * self.horizon
        self.groups.append(Group(dims, place + bounded, "slab", low[bounded, None], high[bounded, None]))
        self._add(block, bounds, keep=bounded)

    def _norm(self, term: WeightedSum, dims: np.ndarray, counted: np.ndarray) -> None:
        high = np.asarray(term.bounds[1])
        bounded = np.flatnonzero(np.isfinite(high))
        if not len(bounded):
            return
        kind = "ball" if term.power == 2 else "diamond"
        weights = np.asarray(term.weights, dtype=np.float64)
        scale = 1 / np.sqrt(weights.max()) if kind == "ball" else 1 / weights.max()
        high = (np.sqrt(np.maximum(high, 0.0)) if kind == "ball" else high) * scale
        block = np.zeros((self.dof, self.horizon, self.horizon))
        block[dims] = (np.sqrt(weights) if kind == "ball" else weights)[:, None, None] * scale * np.eye(self.horizon)
        bounds = np.full((2, self.dof, self.horizon), [[[-np.inf]], [[np.inf]]])
        high = _inside(np.full_like(high, -np.inf), high)[1]
        rows, whole = bounded, False
        if term.cumulative:  # one ball over all that is counted up to the last bound
            rows, whole = np.flatnonzero((counted > 0) & (np.arange(self.horizon) <= bounded[-1])), True
            bounded = bounded[-1:]
        if len(rows):
            place = len(self.blocks) * self.horizon
            self.groups.append(Group(dims, place + rows, kind, high[:0], high[bounded, None], whole))
            self._add(block, bounds, keep=rows)

    def _add(self, block: np.ndarray, bounds: np.ndarray, keep: np.ndarray | None = None) -> None:
        """Take rows in; those without any bound are empty, as they would only slow the rest down."""
        used = np.isfinite(bounds).any(axis=0)
        if keep is not None:
            used[:, keep] = True
        self.blocks.append(np.where(used[:, :, None], block, 0.0))
        self.bounds.append(np.stack(_inside(*bounds)))

    def solve(self, wanted: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """The nearest chunks within bounds of single numbers and the convex terms; nearly, if it does not converge.

        Args:
            wanted: (n, horizon, dof).
            low: (n, horizon, dof) bounds of the single numbers, kept exactly.
            high: (n, horizon, dof).
        """
        if self.is_trivial:
            return np.clip(wanted, low, high)
        u, low, high = (np.ascontiguousarray(a.transpose(2, 1, 0)) for a in (wanted, low, high))
        boxed = (np.isfinite(low) | np.isfinite(high)).any(axis=2)
        rows = np.concatenate([boxed[:, :, None] * np.eye(self.horizon), *self.blocks], axis=1) * np.sqrt(STIFF)
        bounds = np.concatenate(self.bounds, axis=2)[..., None] * np.sqrt(STIFF)
        lows = np.concatenate(
            [low * np.sqrt(STIFF), np.broadcast_to(bounds[0], (*bounds.shape[1:3], u.shape[2]))], axis=1
        )
        highs = np.concatenate(
            [high * np.sqrt(STIFF), np.broadcast_to(bounds[1], lows[:, self.horizon :].shape)], axis=1
        )
        x = self._alternate(u, rows, lows, highs)
        return np.clip(x, low, high).transpose(2, 1, 0)

    def _alternate(self, u: np.ndarray, rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        back = rows.transpose(0, 2, 1)
        inverse = np.linalg.inv(np.eye(self.horizon) + back @ rows)
        groups = [self._stiff(group) for group in self.groups]
        sizes = np.abs(np.concatenate([a[np.isfinite(a)] for a in (*self.bounds, *(g.high for g in groups))]))
        room = INSIDE / 4 * sizes[sizes > 0].min(initial=1.0)
        x, done, result = u, np.zeros(u.shape[2], dtype=bool), u.copy()
        z = self._onto(rows @ x, low, high, groups)
        y = np.zeros_like(z)
        for k in range(1, ROUNDS + 1):
            before, x = x, inverse @ (u + back @ (z - y))
            ahead = RELAX * (rows @ x) + (1 - RELAX) * z
            z = self._onto(ahead + y, low, high, groups)
            y += ahead - z
            if k % CHECK_EVERY == 0:
                moved = np.abs(x - u).max(axis=(0, 1))
                change, apart = np.abs(x - before).max(axis=(0, 1)), np.abs(rows @ x - z).max(axis=(0, 1))
                newly = ~done & (change <= CLOSE * moved) & (apart <= np.maximum(room, CLOSE / 100 * moved))
                result[:, :, newly] = x[:, :, newly]  # each chunk stops by itself, whatever the others need
                done |= newly
                if done.all():
                    return result
        result[:, :, ~done] = x[:, :, ~done]
        return result

    def _stiff(self, group: Group) -> Group:
        scale = np.sqrt(STIFF)
        rows = group.rows + self.horizon
        return Group(group.dims, rows, group.kind, group.low * scale, group.high * scale, group.whole)

    @staticmethod
    def _onto(z: np.ndarray, low: np.ndarray, high: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
        z = np.clip(z, low, high)
        for group in groups:
            group.project(z)
        return z


def _inside(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds a little narrower, never past their middle."""
    finite = np.maximum(np.where(np.isfinite(low), np.abs(low), 0.0), np.where(np.isfinite(high), np.abs(high), 0.0))
    margin = np.minimum(INSIDE * finite, (high - low) / 100)
    return low + margin, high - margin
