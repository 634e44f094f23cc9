"""How well chunks agree, for a policy that says what its numbers mean: which bins, which gripper, which path."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hf_vla_actions.actions import ActionSpace, ActionStats
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.metrics import (
    action_metrics,
    event_scores,
    gripper_accuracy,
    gripper_events,
    gripper_states,
    within_bins,
)
from hf_vla_actions.tokenizers import UniformActionTokenizer

BINS = 256  # of the range of a dimension, where the policy's own tokens are no bins
METERS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
TOLERANCE = 1  # steps that the gripper may be early or late


def grid_codes(config: ActionConfig, unnorm_key: str, actions: np.ndarray) -> np.ndarray:
    """(n, horizon, dof) int64: in which bin each number lies, of the policy's own bins or of 256 over the same range.

    Args:
        config: whose bins and statistics.
        unnorm_key: which statistics.
        actions: (n, horizon, dof) real units.
    """
    own = config.tokenizer
    bins = own if isinstance(own, UniformActionTokenizer) else UniformActionTokenizer(BINS)
    return np.asarray(bins.encode(_bounds(config.stats(unnorm_key)).normalize(actions))).reshape(np.shape(actions))


def _bounds(stats: ActionStats) -> ActionStats:
    """Statistics whose normalized space bins can cover: instead of a standard deviation the extremes, or two deviations."""
    if stats.mode != "normal":
        return stats
    low, high = stats.min, stats.max
    if low is None or high is None:
        mean, std = np.asarray(stats.mean), np.asarray(stats.std)
        low, high = mean - 2 * std, mean + 2 * std
    return replace(stats, mode="bounds", min=low, max=high)


def agreement(
    config: ActionConfig,
    unnorm_key: str,
    predicted: np.ndarray,
    demonstrated: np.ndarray,
    pad_mask: np.ndarray,
    before: np.ndarray | None = None,
) -> dict[str, float]:
    """Error in real units, share of near bins and scores of the gripper.

    Args:
        config: what the numbers mean.
        unnorm_key: which statistics and action space.
        predicted: (n, horizon, dof) real units.
        demonstrated: (n, horizon, dof).
        pad_mask: (n, horizon) bool, True = real.
        before: (n,) the gripper's number before each chunk, real units, NaN where nobody knows; None for nowhere.

    Returns:
        `l1/x` in the unit of x and `l1`, their plain mean (see `action_metrics`): it mixes meters, radians and the gripper,
        so it compares trainings on one dataset, and is no distance. `within_1_bins`, `within_2_bins`, `within_5_bins` (see
        `within_bins`; a gripper that is settled counts as the value it is settled to) and what `gripper_scores` says.
    """
    space = config.space(unnorm_key)
    codes, wanted = (grid_codes(config, unnorm_key, actions) for actions in (predicted, demonstrated))
    return {
        **action_metrics(predicted, demonstrated, pad_mask, space.names, "l1"),
        **within_bins(codes, wanted, pad_mask, space.names),
        **gripper_scores(space, predicted, demonstrated, pad_mask, before),
    }


def gripper_scores(
    space: ActionSpace,
    predicted: np.ndarray,
    demonstrated: np.ndarray,
    pad_mask: np.ndarray,
    before: np.ndarray | None = None,
) -> dict[str, float]:
    """Accuracy of the gripper's state, precision, recall and F1 of its states and of openings and closings.

    Args and shapes as in `agreement`. Of a relative gripper, whose numbers are commands, a command to open is an opening;
    there are no states. Without a gripper nothing is returned.
    """
    gripper = space.gripper
    if gripper is None:
        return {}
    dim = space.index(gripper.dim)
    told, wanted = (np.asarray(actions)[..., dim] for actions in (predicted, demonstrated))
    scores = gripper_accuracy(told, wanted, pad_mask, gripper.open, gripper.closed)
    if gripper.relative:
        for name, command in (("gripper_opening", 1), ("gripper_closing", -1)):
            given, asked = ((gripper.commands(values) == command) & pad_mask for values in (told, wanted))
            scores |= event_scores(name, given, asked, TOLERANCE)
        return scores
    told, wanted = gripper.is_open(told), gripper.is_open(wanted)
    first = None if before is None else np.where(np.isnan(before), np.nan, gripper.is_open(before))
    scores |= gripper_states(told, wanted, pad_mask)
    return {**scores, **gripper_events(told, wanted, pad_mask, first, TOLERANCE)}


def position_dims(space: ActionSpace) -> tuple[list[int], float] | None:
    """Dimensions that are a position and meters in one of their unit; None where the space does not say."""
    pose = space.known_pose()
    if pose is not None and pose.position is not None:
        dims = [space.index(dim) for dim in pose.position]
    else:
        dims = [space.index(name) for name in ("x", "y", "z") if name in space.names]
    units = {space.units[dim] for dim in dims}
    unit = units.pop() if len(units) == 1 else None
    if unit not in METERS or len({space.delta[dim] for dim in dims}) != 1 or space.delta[dims[0]] is None:
        return None
    return dims, METERS[unit]


def adds_up(space: ActionSpace) -> list[int]:
    """Dimensions whose actions are changes that add up along a chunk."""
    gripper = None if space.gripper is None else space.index(space.gripper.dim)
    return [d for d in range(space.dof) if space.delta[d] and d != gripper and space.anchor != "chunk"]
