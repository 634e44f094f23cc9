"""From limits in real units to what `FASTLogitsProcessor` takes: ranges of first coefficients, normalized limits."""

from __future__ import annotations

import math

import numpy as np

from hf_vla_actions.actions import ActionStats
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError
from hf_vla_actions.tokenizers import FASTActionTokenizer

ON_GRID = 1e-9  # steps of the grid by which a limit may miss a point of it and still mean it
INSIDE = 1e-12  # kept from limits that hold without tolerance, relative to their size: rounding of sums is below


def first_coefficients(low: float, high: float, grain: float, limit: int) -> tuple[int, int]:
    """Lowest and highest first coefficient whose chunks keep a sum of normalized values within limits, without tolerance.

    Args:
        low: smallest sum, normalized; may be -inf.
        high: largest sum.
        grain: what one step of the coefficient adds to the sum: sqrt(horizon) / scale.
        limit: largest absolute coefficient.

    Returns:
        the two; the first is above the second where there is none.
    """
    margin = INSIDE * max(1.0, *(abs(x) for x in (low, high) if math.isfinite(x)), 1.0)
    return math.ceil(max((low + margin) / grain, -limit)), math.floor(min((high - margin) / grain, limit))


def sum_ranges(tokenizer: FASTActionTokenizer, stats: ActionStats, horizon: int, low, high) -> np.ndarray:
    """Which first coefficients keep the sum of a chunk's actions within limits: `dc_ranges` of `FASTLogitsProcessor`.

    The first coefficient of a dimension is sqrt(horizon) times its mean, so the sum over the chunk (for deltas: how far
    the robot moves) has steps of (size of a normalized 1) * sqrt(horizon) / scale.

    Args:
        tokenizer: whose coefficients.
        stats: what un-normalizes the chunk.
        horizon: actions in a chunk.
        low: (dof,) lowest sum in real units; -inf where there is none.
        high: (dof,) highest sum.

    Returns:
        (dof, 2) int64.

    Raises:
        InfeasibleConstraintError: no sum of the grid is within the limits; it says the nearest that is.
    """
    low, high = _vectors(stats, low, high)
    middle, half = (rows[0] for rows in line(stats, 1))
    limit = tokenizer.limit(horizon)
    grain = half * math.sqrt(horizon) / tokenizer.scale
    ranges = np.tile(np.array([-limit, limit], dtype=np.int64), (stats.dof, 1))
    for d in range(stats.dof):
        still = horizon * middle[d]
        if grain[d] == 0:
            if not low[d] <= still <= high[d]:
                raise _infeasible(d, low[d], high[d], (still, still), still, None)
            continue
        first = math.ceil(max((low[d] - still) / grain[d] - ON_GRID, -limit))
        last = math.floor(min((high[d] - still) / grain[d] + ON_GRID, limit))
        if first > last:
            ends = (still - limit * grain[d], still + limit * grain[d])
            aim = (low[d] + high[d]) / 2 if np.isfinite(low[d] + high[d]) else np.clip(still, low[d], high[d])
            aim = np.clip(aim, *ends)
            nearest = still + grain[d] * np.rint((aim - still) / grain[d])
            raise _infeasible(d, low[d], high[d], ends, float(nearest), float(grain[d]))
        ranges[d] = first, last
    return ranges


def value_limits(stats: ActionStats, low, high) -> tuple[np.ndarray, np.ndarray]:
    """Limits in real units, normalized: `lower` and `upper` of `FASTLogitsProcessor`.

    Args:
        stats: what un-normalizes the chunk.
        low: (..., dof) lowest value in real units; -inf where there is none.
        high: (..., dof) highest value.

    Raises:
        InfeasibleConstraintError: a dimension that is constant stands outside.
    """
    middle, half = (rows[0] for rows in line(stats, 1))
    out = []
    for side, values in ((-np.inf, low), (np.inf, high)):
        x = np.asarray(values, dtype=np.float64)
        if x.ndim == 0 or x.shape[-1] != stats.dof or np.isnan(x).any():
            raise ConstraintError(f"limits of {stats.dof} dimensions are numbers (..., {stats.dof}), got {values!r}")
        beyond = np.where(half == 0, (middle - x) * np.sign(side) > 0, False)
        if beyond.any():
            d = int(np.argwhere(beyond)[0, -1])
            raise _infeasible(
                d, np.min(low, initial=np.inf), np.max(high, initial=-np.inf), (middle[d],) * 2, middle[d], None
            )
        out.append(np.where(half == 0, side, (x - middle) / np.where(half == 0, 1.0, half)))
    return out[0], out[1]


def _vectors(stats: ActionStats, low, high) -> tuple[np.ndarray, np.ndarray]:
    pair = []
    for values in (low, high):
        vector = np.asarray(values, dtype=np.float64)
        if vector.shape != (stats.dof,) or np.isnan(vector).any():
            raise ConstraintError(f"limits of {stats.dof} dimensions are a vector ({stats.dof},), got {values!r}")
        pair.append(vector)
    return pair[0], pair[1]


def line(stats: ActionStats, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """What a normalized 0 stands for, and how much a normalized 1 is more: (horizon, dof) each, real units."""
    middle = stats.unnormalize(np.zeros((horizon, stats.dof)))
    return middle, stats.unnormalize(np.ones((horizon, stats.dof))) - middle


def _infeasible(dim: int, low, high, reachable, nearest: float, grain: float | None) -> InfeasibleConstraintError:
    return InfeasibleConstraintError(
        sample=0,
        step=0,
        dim=f"dimension {dim}",
        names=("limits on the sum of a chunk" if grain is not None else "limits on a constant dimension",),
        wanted=f"{low:.6g}..{high:.6g}",
        reachable=(float(reachable[0]), float(reachable[1])),
        nearest=float(nearest),
        bin_width=grain,
        unit=None,
        suggestion="Widen the limits, or use a tokenizer of a larger scale, whose steps are smaller",
    )
