"""Statistics of a dataset: of its actions, of its chunks step by step, relative to the state, and of mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from hf_vla_actions.actions.exact_sums import mixed_moments
from hf_vla_actions.actions.norm_stats import NormStats
from hf_vla_actions.actions.running import RunningStats, finite_array
from hf_vla_actions.actions.stats import ActionStats
from hf_vla_actions.errors import StatsError


def chunks_of(actions, horizon: int) -> np.ndarray:
    """All complete chunks of one episode: (steps, dof) to (steps - horizon + 1, horizon, dof), or none of them.

    A chunk that would reach past the episode's end is left out, as in Isaac-GR00T's statistics of relative actions.
    """
    actions = finite_array(actions, "actions")
    if actions.ndim != 2 or horizon < 1:
        raise StatsError(f"chunks need actions (steps, dof) and a horizon, got {actions.shape} and {horizon}")
    if len(actions) < horizon:
        return np.zeros((0, horizon, actions.shape[1]))
    windows = np.lib.stride_tricks.sliding_window_view(actions, horizon, axis=0)
    return np.ascontiguousarray(np.moveaxis(windows, -1, 1))


def to_relative(chunks, states, columns: Sequence[int | None]) -> np.ndarray:
    """Chunks minus the state at their first step; inverse of `from_relative`.

    Args:
        chunks: (n, horizon, dof) absolute actions, real units.
        states: (n, state_dim) the state when each chunk begins.
        columns: for each dimension of the action the column of the state it is relative to, None where it stays.

    Returns:
        (n, horizon, dof) float64.
    """
    chunks, anchors = _with_anchors(chunks, states, columns)
    return chunks - anchors


def from_relative(relative, states, columns: Sequence[int | None]) -> np.ndarray:
    """Chunks relative to a state to absolute ones; inverse of `to_relative`, with the same arguments."""
    relative, anchors = _with_anchors(relative, states, columns)
    return relative + anchors


def _with_anchors(chunks, states, columns: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray]:
    chunks, states = finite_array(chunks, "chunks"), finite_array(states, "states")
    if chunks.ndim != 3 or states.ndim != 2 or len(chunks) != len(states) or chunks.shape[2] != len(columns):
        raise StatsError(
            f"chunks (n, horizon, dof), states (n, state_dim) and one column for each of dof do not fit: got "
            f"{chunks.shape}, {states.shape} and {len(columns)} columns"
        )
    beyond = [column for column in columns if column is not None and not 0 <= column < states.shape[1]]
    if beyond:
        raise StatsError(f"there are no state columns {beyond}; states have {states.shape[1]}")
    anchors = np.zeros((len(chunks), 1, len(columns)))
    for dim, column in enumerate(columns):
        if column is not None:
            anchors[:, 0, dim] = states[:, column]
    return chunks, anchors


def relative_columns(
    dof: int,
    state_dim: int | None,
    action_names: Sequence[str] | None = None,
    state_names: Sequence[str] | None = None,
    dims: Sequence[int] | None = None,
) -> list[int | None]:
    """Which column of the state each dimension of the action is relative to: that of the same name, or number.

    Args:
        dof: dimensions of the action.
        state_dim: columns of the state; None where there is no state.
        action_names: names of the dimensions; with `state_names`, columns are found by name.
        state_names: names of the columns.
        dims: dimensions that are relative; all if None.

    Raises:
        StatsError: a dimension has no column of its name; or there are no names, and not as many columns as dimensions.
    """
    dims = range(dof) if dims is None else dims
    if state_dim is None:
        raise StatsError("actions relative to the state need states, and the dataset has none")
    if action_names is not None and state_names is not None:
        missing = [action_names[dim] for dim in dims if action_names[dim] not in state_names]
        if missing:
            raise StatsError(
                f"no column of the state is named {missing}; it has {list(state_names)}: choose dimensions"
            )
        return [list(state_names).index(action_names[dim]) if dim in dims else None for dim in range(dof)]
    if state_dim != dof:
        raise StatsError(
            f"actions of {dof} and states of {state_dim} dimensions without names: which belong together?"
        )
    return [dim if dim in dims else None for dim in range(dof)]


def running_of(
    episodes: Sequence[tuple[np.ndarray, np.ndarray | None]],
    horizon: int | None = None,
    columns: Sequence[int | None] | None = None,
) -> tuple[RunningStats, int]:
    """Statistics of the actions of episodes, and how many episodes are too short for a chunk.

    Args:
        episodes: (actions (steps, dof), states (steps, state_dim) or None) of each.
        horizon: statistics of every step of a chunk of this length; None for one for all actions.
        columns: chunks relative to the state at their first step, see `to_relative`.
    """
    running, short = RunningStats(), 0
    for actions, states in episodes:
        rows = actions if horizon is None else chunks_of(actions, horizon)
        if columns is not None:
            if horizon is None or states is None:
                raise StatsError("actions relative to a state come in chunks: give a horizon, and states")
            rows = to_relative(rows, states[: len(rows)], columns)
        short += not len(rows)
        running.update(rows)
    return running, short


def compute_norm_stats(
    dataset: Any,
    key: str | None = None,
    *,
    mask=None,
    mode: str = "bounds_q99",
    horizon: int | None = None,
    relative: Sequence[int] | bool = False,
) -> NormStats:
    """Statistics of all episodes of an open dataset; its pictures are not read.

    Args:
        dataset: any reader of `hf_vla_actions.data`.
        key: the `unnorm_key`; the dataset's name if None.
        mask: (dof,) True where a dimension is to be normalized; all if None.
        mode: how the statistics will be used.
        horizon: statistics of every step of a chunk of this length; None for one for all actions.
        relative: chunks minus the state at their first step, in all dimensions (True) or in those listed.

    Raises:
        StatsError: an episode is shorter than the horizon, or the states do not fit `relative`.
    """
    states = dataset.states
    columns = None
    if relative is not False:
        dims = None if relative is True else relative
        state_dim = None if states is None else states.shape[1]
        columns = relative_columns(dataset.dof, state_dim, dataset.action_names, dataset.state_names, dims)
    episodes = [
        (dataset.actions[e.start : e.stop], None if states is None else states[e.start : e.stop])
        for e in dataset.episodes
    ]
    running, short = running_of(episodes, horizon, columns)
    if short:
        raise StatsError(f"{short} of {len(episodes)} episodes are shorter than the horizon of {horizon} steps")
    entry = {
        "action": running.to_stats(mask=mask, mode=mode),
        "proprio": None if states is None else ActionStats.compute(states, mode=mode),
        "num_trajectories": len(episodes),
    }
    return NormStats({key or dataset.name: entry})


def mixture_stats(
    parts: Sequence[RunningStats], weights: Sequence[float], mask=None, mode="bounds_q99"
) -> ActionStats:
    """Statistics of a weighted mixture of datasets, in which a row of `parts[i]` is drawn with `weights[i]`.

    Mean and std follow exactly from the parts. A quantile is the smallest value whose share of values not above it, by
    weight, is at least q (`numpy.quantile(..., weights=..., method="inverted_cdf")`); it is exact where all parts are,
    and within the largest `rank_error` of the parts otherwise. Weights need not sum to 1; decimals are taken as
    written.

    Args:
        parts: statistics of the same dimensions.
        weights: one number above 0 for each part.
        mask: (dof,) True where a dimension is to be normalized; all if None.
        mode: how the statistics will be used.
    """
    if len(parts) != len(weights) or not len(parts):
        raise StatsError(f"a mixture needs one weight for each of {len(parts)} parts, got {len(weights)}")
    shapes = [part.shape for part in parts]
    if None in shapes or len(set(shapes)) > 1:
        raise StatsError(f"a mixture needs rows of one shape in every part, got {shapes}")
    if not (np.isfinite(weights).all() and min(weights) > 0):
        raise StatsError(f"weights of a mixture are numbers above 0, got {list(weights)}")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    shape = parts[0].shape or ()
    mean, std = mixed_moments([part.moments for part in parts], shares)
    columns = [_mixed_quantiles(parts, shares, column, ("0.01", "0.99")) for column in range(mean.size)]
    q01, q99 = np.array(columns).T
    return ActionStats(
        mean=mean.reshape(shape),
        std=std.reshape(shape),
        min=np.min([part.min for part in parts], axis=0),
        max=np.max([part.max for part in parts], axis=0),
        q01=q01.reshape(shape),
        q99=q99.reshape(shape),
        mask=mask,
        count=sum(part.count for part in parts),
        mode=mode,
    )


def _mixed_quantiles(parts: Sequence[RunningStats], shares: Sequence[Fraction], column: int, qs: Sequence[str]):
    """Smallest values at which the weighted share of values not above them reaches each of `qs`."""
    sorted_parts = [part.cumulative(column) for part in parts]
    candidates = np.unique(np.concatenate([values for values, _ in sorted_parts]))
    per_row = [share / int(counts[-1]) for share, (_, counts) in zip(shares, sorted_parts, strict=True)]

    def share_upto(value: float) -> Fraction:
        upto = Fraction()
        for weight, (values, counts) in zip(per_row, sorted_parts, strict=True):
            place = int(np.searchsorted(values, value, side="right"))
            upto += weight * (int(counts[place - 1]) if place else 0)
        return upto

    found = []
    for q in map(Fraction, qs):
        low, high = 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if share_upto(candidates[middle]) >= q else (middle + 1, high)
        found.append(candidates[low])
    return found
