"""The laws on a token grid: which code follows which, as lookup tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from hf_vla_actions.constraints.laws import Moves
from hf_vla_actions.constraints.terms import WeightedSum, Zone
from hf_vla_actions.errors import ConstraintError

FINE = 48  # bits of the largest sum: sums of values rounded to this are exact in float64, in any order


class LawTables:
    """Codes instead of values; J laws, T steps, K codes of one dimension.

    Args:
        moves: what can be reached, on the token grid.
        values: (dof, n_codes) real value of each code.
    """

    def __init__(self, moves: Moves, values: np.ndarray):
        self.moves, self.values = moves, values
        self.n_laws, self.horizon = len(moves.goals), len(moves.viable)
        self._memory: dict[tuple[str, int], np.ndarray] = {}
        self._amounts: dict[tuple, Amounts] = {}
        self._starts: dict[int, np.ndarray] = {}
        self.plans: dict[tuple, Any] = {}  # what was worked out on a device for any sample

    @cached_property
    def viable(self) -> np.ndarray:
        """(T, dof, K) bool: codes whose value is viable."""
        out = np.empty((self.horizon, *self.values.shape), dtype=bool)
        known: dict[tuple[int, int], np.ndarray] = {}
        for t, row in enumerate(self.moves.viable):
            for d, members in enumerate(row):
                key = (id(members), d)
                if key not in known:
                    known[key] = members.contains(self.values[d])
                out[t, d] = known[key]
        return out

    def codes_of(self, dim: int, values: np.ndarray) -> np.ndarray:
        """The lowest code with each of these values of the grid."""
        known, first = np.unique(self.values[dim], return_index=True)
        return first[np.searchsorted(known, values)]

    def following(self, dim: int) -> np.ndarray:
        """(J, T, K): the code at step t after each code at step t - 1; row t = 0 is not used."""
        return self._once("following", dim, self._following)

    def paths(self, dim: int) -> np.ndarray:
        """(J, T, K, T): the code at each step s >= t when code k is taken at step t; before t the code k itself."""
        return self._once("paths", dim, self._paths)

    def extremes(self, dim: int) -> np.ndarray:
        """(2, T, K): the code at step t that goes as low, or as high, as it can from each code at step t - 1."""
        return self._once("extremes", dim, self._extremes)

    def first(self, dim: int, starts: np.ndarray) -> np.ndarray:
        """(S, J + 2): codes at step 0 from starts (S,), by each law and by going as low and as high as it can."""
        goals = [goals[0, dim] for goals in self.moves.goals]
        if np.isinf(self.moves.limits[0, dim]) and not np.isnan(goals).any():
            if dim not in self._starts:  # where it comes from makes no difference
                self._starts[dim] = self._first(dim, np.array([np.nan]))
            return np.broadcast_to(self._starts[dim], (len(starts), self.n_laws + 2))
        return self._first(dim, starts)

    def _first(self, dim: int, starts: np.ndarray) -> np.ndarray:
        values = [self.moves.step(j, 0, dim, starts) for j in range(self.n_laws)]
        values += [self.moves.step(0, 0, dim, starts, np.full(len(starts), goal)) for goal in self._ends(dim)]
        return self.codes_of(dim, np.stack(values, axis=1))

    def amounts(self, dim: int, amounts: np.ndarray, counted: np.ndarray | None, cumulative: bool) -> Amounts:
        """What codes of a dimension add along the laws; see `Amounts`."""
        key = dim, amounts.tobytes(), None if counted is None else counted.tobytes(), cumulative
        if key not in self._amounts:
            self._amounts[key] = Amounts(self, dim, amounts, counted, cumulative)
        return self._amounts[key]

    def _once(self, name: str, dim: int, make) -> np.ndarray:
        if (name, dim) not in self._memory:
            self._memory[name, dim] = make(dim)
        return self._memory[name, dim]

    def _following(self, dim: int) -> np.ndarray:
        row, moves = self.values[dim], self.moves
        out = np.zeros((self.n_laws, self.horizon, len(row)), dtype=np.int64)
        for law in range(self.n_laws):
            known: dict[tuple, np.ndarray] = {}
            for t in range(1, self.horizon):
                key = (id(moves.viable[t][dim]), moves.limits[t, dim], float(moves.goals[law][t, dim]))
                if key not in known:
                    known[key] = self.codes_of(dim, moves.step(law, t, dim, row))
                out[law, t] = known[key]
        return out

    def _paths(self, dim: int) -> np.ndarray:
        following, n = self.following(dim), self.values.shape[1]
        out = np.empty((self.n_laws, self.horizon, n, self.horizon), dtype=np.int16 if n < 2**15 else np.int64)
        out[...] = np.arange(n)[:, None]
        for s in range(1, self.horizon):
            for law in range(self.n_laws):
                out[law, :s, :, s] = following[law, s][out[law, :s, :, s - 1]]
        return out

    def _extremes(self, dim: int) -> np.ndarray:
        row = self.values[dim]
        out = np.zeros((2, self.horizon, len(row)), dtype=np.int64)
        for i, goal in enumerate(self._ends(dim)):
            for t in range(1, self.horizon):
                out[i, t] = self.codes_of(dim, self.moves.step(0, t, dim, row, np.full(len(row), goal)))
        return out

    def _ends(self, dim: int) -> tuple[float, float]:
        return float(self.values[dim].min()), float(self.values[dim].max())


class Amounts:
    """What each code of one dimension adds to a weighted sum or to a position, rounded so that sums are exact.

    A chunk then has the same sums to the last bit whichever of its tokens is being decoded, on any device: what was
    certified once stays certified.

    Args:
        tables: laws as tables.
        dim: the dimension.
        amounts: (K,) float64, already rounded.
        counted: (T,) bool or None: steps that count.
        cumulative: sums over steps instead of single ones.
    """

    def __init__(self, tables: LawTables, dim: int, amounts: np.ndarray, counted: np.ndarray | None, cumulative: bool):
        self.amounts = amounts
        self._ends: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        taken = amounts[tables.paths(dim)]  # (J, T, K, T)
        steps = np.arange(tables.horizon)
        self.after = steps[None, :] >= steps[:, None]
        mask = self.after if counted is None else self.after & counted[None, :]
        taken = np.where(mask[None, :, None, :], taken, 0.0)
        self.paths = np.cumsum(taken, axis=-1) if cumulative else taken

    def ends(self, bounded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(J, T, K) least and largest amount along each path, over the steps s >= t that are `bounded` (T,)."""
        key = bounded.tobytes()
        if key not in self._ends:
            mask = (self.after & bounded[None, :])[None, :, None, :]
            least = np.where(mask, self.paths, np.inf).min(axis=-1)
            self._ends[key] = least, np.where(mask, self.paths, -np.inf).max(axis=-1)
        return self._ends[key]


def grain(largest: float) -> float:
    """A power of two of which numbers up to `largest` are exact multiples after rounding, their sums included."""
    if largest == 0:
        return 1.0  # nothing moves
    return float(2.0 ** (np.ceil(np.log2(max(largest, 1e-300))) - FINE))


def amounts_of(term: WeightedSum, values: np.ndarray, horizon: int) -> tuple[list[np.ndarray], float]:
    """Rounded amounts (K,) of each dimension of a sum, and how much rounding can add up to."""
    raw = [term.weigh(values[d], i) for i, d in enumerate(term.dims)]
    times = horizon if term.cumulative else 1
    largest = np.array([np.abs(a).max() for a in raw])
    lost = [
        d for d, most in zip(term.dims, largest, strict=True) if most == 0 and values[d].any() and term.weights.any()
    ]
    if not np.isfinite(largest).all() or (lost and term.power == 2):
        raise ConstraintError(
            "the values of an action are too large or too small for their squares to be float64: give them in another unit"
        )
    step = grain(times * sum(np.abs(a).max() for a in raw))
    return [np.round(a / step) * step for a in raw], step * times * len(raw)


def positions_of(
    zones: Sequence[Zone], values: np.ndarray, horizon: int
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Zones as they are seen from where their robots are, so that each path is a sum of moves.

    Returns:
        Rounded moves (K,) of each dimension; start (S, n), 0 where a dimension is a change; lower and upper corner
        (S, n), grown by a margin that covers all rounding.
    """
    raw = [values[d] for d in zones[0].dims]
    step = grain(horizon * max(np.abs(a).max() for a in raw))
    origin, low, high = (np.array([getattr(zone, name) for zone in zones]) for name in ("origin", "low", "high"))
    shift = np.where(zones[0].delta, origin, 0.0)
    places = np.abs(np.stack([origin, low, high])).max(axis=(0, 2))
    margin = (64 * np.spacing(places) + 2.0**12 * step)[:, None]
    return [np.round(a / step) * step for a in raw], origin - shift, low - shift - margin, high - shift + margin
