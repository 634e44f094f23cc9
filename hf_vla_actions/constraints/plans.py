"""Goals for constraints that standing still does not satisfy, such as a least speed along a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.nearest import Nearest
from hf_vla_actions.constraints.terms import Change, Term, WeightedSum


def find_plan(
    terms: Sequence[Term],
    sets: Mapping[tuple[int, int], IntervalSet],
    members: Sequence[IntervalSet],
    rest: np.ndarray,
    horizon: int,
    half_bin: np.ndarray,
) -> list[np.ndarray]:
    """Goals (horizon, dof) near standing still that satisfy the sums of single steps; none if standing still does.

    Args:
        terms: coupled constraints.
        sets: values left of the (step, dim) that have any constraint of their own.
        members: values that each dimension can take at all.
        rest: (dof,) what braking goes for; NaN for staying as it is.
        horizon: steps in a chunk.
        half_bin: (dof,) half the distance of token values: the plan keeps as far inside that rounding does no harm.
    """
    sums = [term for term in terms if isinstance(term, WeightedSum) and not term.cumulative]
    if not sums:
        return []
    still = np.tile(np.nan_to_num(rest), (1, horizon, 1))
    low, high = still.copy(), still.copy()
    for t in range(horizon):
        for d in range(len(rest)):
            here = sets.get((t, d), members[d])
            if here.is_empty:
                return []
            low[0, t, d], high[0, t, d] = here.lows[0], here.highs[-1]
            still[0, t, d] = here.nearest(still[:, t, d])[0]
    if all((term.excess(still) == 0).all() for term in sums):
        return []
    inner = [_narrower(term, half_bin) for term in sums if term.power != 2 or np.isfinite(term.high).any()]
    changes = [replace(term, last=None) for term in terms if isinstance(term, Change)]
    plan = Nearest([*inner, *changes], horizon, len(rest)).solve(still, low, high)[0]
    touched = np.isin(np.arange(len(rest)), [d for term in sums for d in term.dims])
    return [np.where(touched, plan, rest)]


def _narrower(term: WeightedSum, half_bin: np.ndarray) -> WeightedSum:
    bins = float(np.abs(term.weights) @ half_bin[list(term.dims)])
    low, high = np.array(term.low, dtype=np.float64), np.array(term.high, dtype=np.float64)
    room = np.minimum(bins, np.where(np.isfinite(high - low), (high - low) / 2, np.inf))
    return replace(term, low=low + room, high=np.maximum(high - room, 0.0 if term.power != 1 else -np.inf))
