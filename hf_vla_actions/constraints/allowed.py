"""Whether whole chunks are allowed: sets and terms together, checked on float64 numbers without tolerance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.terms import Change, Hold, Predicate, Term, WeightedSum, Zone


class Allowed:
    """What is asked of the chunks of one sample.

    Args:
        sets: values that are left, for the (step, dim) that have any constraint.
        terms: coupled constraints.
    """

    def __init__(self, sets: Mapping[tuple[int, int], IntervalSet], terms: Sequence[Term]):
        places: dict[bytes, tuple[IntervalSet, list[tuple[int, int]]]] = {}
        for place, members in sets.items():
            places.setdefault(members.pairs.tobytes(), (members, []))[1].append(place)
        self.sets = [(members, *np.array(cells).T) for members, cells in places.values()]
        changes = [term for term in terms if isinstance(term, Change)]
        sums = [term for term in terms if isinstance(term, WeightedSum) and _is_plain(term)]
        self.bundles: list[_Changes | _Sums] = [_Changes(changes)] if changes else []
        self.bundles += [_Sums(sums)] if sums else []
        bundled = {id(term) for term in (*changes, *sums)}
        rest = [term for term in terms if id(term) not in bundled]
        self.rest = sorted(
            rest, key=lambda term: isinstance(term, (Zone, Hold, Predicate)) + isinstance(term, Predicate)
        )

    def exactly(self, chunks: np.ndarray) -> np.ndarray:
        """(n, horizon, dof) to (n,) bool: in all sets, and no term has any excess."""
        return self._check(chunks, inner=False)

    def safely(self, chunks: np.ndarray) -> np.ndarray:
        """(n, horizon, dof) to (n,) bool: the same with sums a few roundings further inside, as the laws keep them."""
        return self._check(chunks, inner=True)

    def _check(self, chunks: np.ndarray, inner: bool) -> np.ndarray:
        ok = np.ones(len(chunks), dtype=bool)
        for members, steps, dims in self.sets:
            ok &= members.contains(chunks[:, steps, dims]).all(axis=1)
        for bundle in self.bundles:
            ok &= bundle.keep(chunks, inner)
        for term in self.rest:  # what costs more comes later, and is asked about fewer
            rows = np.flatnonzero(ok)
            if not len(rows):
                break
            ok[rows] = keeps(term, chunks if len(rows) == len(ok) else chunks[rows], inner).all(axis=1)
        return ok


def keeps(term: Term, chunks: np.ndarray, inner: bool = True) -> np.ndarray:
    """(n, horizon, dof) to (n, horizon) bool: no excess; sums are a few roundings inside of their bounds if `inner`."""
    if not (inner and isinstance(term, WeightedSum)):
        return term.excess(chunks) == 0
    low, high = term.bounds
    sums = term.sums(chunks)
    return (sums >= low) & (sums <= high)


class _Changes:
    """All `Change` terms at once, with the same float64 operations."""

    def __init__(self, terms: Sequence[Change]):
        self.dims = np.array([term.dim for term in terms])
        self.limits = np.stack([term.limits for term in terms], axis=1)
        self.last = np.array([np.nan if term.last is None else term.last for term in terms])

    def keep(self, chunks: np.ndarray, inner: bool) -> np.ndarray:
        """(n, horizon, dof) to (n,) bool."""
        x = chunks[:, :, self.dims]
        first = ~(np.abs(x[:, 0] - self.last) > self.limits[0])  # NaN is no violation: nothing was there before
        return first.all(axis=1) & (np.abs(x[:, 1:] - x[:, :-1]) <= self.limits[1:]).all(axis=(1, 2))


class _Sums:
    """All running sums of single dimensions at once, with the same float64 operations."""

    def __init__(self, terms: Sequence[WeightedSum]):
        self.dims = np.array([term.dims[0] for term in terms])
        self.weights = np.array([float(term.weights[0]) for term in terms])
        self.origin = np.array([term.origin for term in terms])
        self.inner = np.stack([term.bounds for term in terms], axis=-1)  # (2, horizon, k)
        self.outer = np.stack([np.stack([term.low, term.high]) for term in terms], axis=-1)

    def keep(self, chunks: np.ndarray, inner: bool) -> np.ndarray:
        """(n, horizon, dof) to (n,) bool."""
        sums = np.cumsum(self.weights * chunks[:, :, self.dims], axis=1)
        low, high = self.inner if inner else self.outer
        sums = sums if inner else sums + self.origin
        return ((sums >= low) & (sums <= high)).all(axis=(1, 2))


def _is_plain(term: WeightedSum) -> bool:
    return term.cumulative and term.power == 1 and len(term.dims) == 1 and term.counted is None
