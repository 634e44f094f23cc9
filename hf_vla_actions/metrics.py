"""How well predicted chunks agree with demonstrated ones: functions of arrays.

What is asked here is what people ask when they want to know whether a training is good (openvla issues 29, 74, 79, 291):
how many tokens are right or nearly so, how far off in real units, whether the gripper closes when it should, how much
worse a policy is on its own than when it is told what came before, whether errors add up along the chunk, and whether it
keeps to the robot's limits.

A number that cannot be (the precision of a state that is never predicted) is left out instead of being NaN or 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_vla_actions.errors import VLAActionsError


def action_metrics(
    predicted: np.ndarray,
    demonstrated: np.ndarray,
    pad_mask: np.ndarray,
    names: tuple[str, ...],
    prefix: str,
) -> dict[str, float]:
    """Mean absolute error per dimension and over all of them.

    Args:
        predicted: (n, horizon, dof).
        demonstrated: (n, horizon, dof), in the same units.
        pad_mask: (n, horizon) bool, True = real.
        names: (dof,) name of each dimension.
        prefix: name of the metric, such as "l1" or "l1_normalized".

    Returns:
        `{prefix: ..., f"{prefix}/{name}": ...}`.
    """
    real = _real_steps(predicted, demonstrated, pad_mask)
    error = np.abs(np.asarray(predicted, dtype=np.float64) - demonstrated)[real].mean(axis=0)
    return {prefix: float(error.mean()), **{f"{prefix}/{n}": float(e) for n, e in zip(names, error, strict=True)}}


def token_accuracy(
    predicted: np.ndarray, demonstrated: np.ndarray, pad_mask: np.ndarray, names: tuple[str, ...]
) -> dict[str, float]:
    """Share of codes that are exactly those of the demonstration, per dimension and over all.

    Args and shapes as in `action_metrics`, with whole-numbered codes.
    """
    real = _real_steps(predicted, demonstrated, pad_mask)
    right = (np.asarray(predicted) == demonstrated)[real].mean(axis=0)
    each = {f"token_accuracy/{n}": float(r) for n, r in zip(names, right, strict=True)}
    return {"token_accuracy": float(right.mean()), **each}


def gripper_accuracy(
    predicted: np.ndarray, demonstrated: np.ndarray, pad_mask: np.ndarray, open_value: float, closed_value: float
) -> dict[str, float]:
    """Share of steps in which the gripper is on the demonstrated side of half open.

    Args:
        predicted: (n, horizon) values of the gripper's dimension.
        demonstrated: (n, horizon).
        pad_mask: (n, horizon) bool, True = real.
        open_value: value that means open.
        closed_value: value that means closed.
    """
    real = _real_steps(predicted, demonstrated, pad_mask)
    middle, sign = (open_value + closed_value) / 2, np.sign(open_value - closed_value)
    same = ((np.asarray(predicted) - middle) * sign >= 0) == ((np.asarray(demonstrated) - middle) * sign >= 0)
    return {"gripper_accuracy": float(same[real].mean())}


WITHIN = (1, 2, 5)
ROUNDING = 1e-9  # of an excess, real units: sums of the same numbers in another order


def within_bins(
    predicted: np.ndarray,
    demonstrated: np.ndarray,
    pad_mask: np.ndarray,
    names: tuple[str, ...],
    most: Sequence[int] = WITHIN,
) -> dict[str, float]:
    """Share of codes at most k bins from those of the demonstration, per dimension and over all.

    Args:
        predicted: (n, horizon, dof) whole-numbered codes, neighboring ones for neighboring values.
        demonstrated: (n, horizon, dof).
        pad_mask: (n, horizon) bool, True = real.
        names: (dof,) name of each dimension.
        most: the values of k.

    Returns:
        `{"within_1_bins": ..., "within_1_bins/x": ..., "within_2_bins": ...}`.
    """
    real = _real_steps(predicted, demonstrated, pad_mask)
    far = np.abs(_whole(predicted) - _whole(demonstrated))[real]
    found: dict[str, float] = {}
    for k in most:
        share = (far <= k).mean(axis=0)
        found[f"within_{k}_bins"] = float(share.mean())
        found |= {f"within_{k}_bins/{n}": float(s) for n, s in zip(names, share, strict=True)}
    return found


def chunks_within_bins(
    predicted: np.ndarray, demonstrated: np.ndarray, pad_mask: np.ndarray, most: Sequence[int] = (0, 1)
) -> dict[str, float]:
    """Share of chunks that are nowhere more than k bins from the demonstration: in no step and in no dimension.

    Args and shapes as in `within_bins`; keys are `chunks_within_0_bins` (the very same) and so on.
    """
    real = _real_steps(predicted, demonstrated, pad_mask)
    far = np.where(real[..., None], np.abs(_whole(predicted) - _whole(demonstrated)), 0).max(axis=(1, 2))
    return {f"chunks_within_{k}_bins": float((far <= k)[real.any(axis=1)].mean()) for k in most}


def gripper_states(predicted: np.ndarray, demonstrated: np.ndarray, pad_mask: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of the states "open" and "closed", counted step by step.

    Args:
        predicted: (n, horizon) bool, True = open.
        demonstrated: (n, horizon) bool.
        pad_mask: (n, horizon) bool, True = real.

    Returns:
        `gripper_open_precision` (of the steps predicted open, the share that is), `gripper_open_recall` (of the steps
        that are open, the share predicted so), `gripper_open_f1` (their harmonic mean), and the same of `closed`.
    """
    real = _real_steps(predicted, demonstrated, pad_mask)
    found, wanted = np.asarray(predicted, dtype=bool)[real], np.asarray(demonstrated, dtype=bool)[real]
    return {
        **_precision_recall("gripper_open", int((found & wanted).sum()), int(found.sum()), int(wanted.sum())),
        **_precision_recall(
            "gripper_closed", int((~found & ~wanted).sum()), int((~found).sum()), int((~wanted).sum())
        ),
    }


def gripper_events(
    predicted: np.ndarray,
    demonstrated: np.ndarray,
    pad_mask: np.ndarray,
    before: np.ndarray | None = None,
    tolerance: int = 1,
) -> dict[str, float]:
    """Precision, recall and F1 of openings and closings.

    An opening is a real step at which the gripper is open and was closed one step earlier, a closing the reverse; of the
    prediction against the prediction's own step before. At the first step of a chunk the step before is what the robot
    did last, for both. A predicted opening is right if the same chunk has a demonstrated one at most `tolerance` steps
    away; each counts once.

    Args:
        predicted: (n, horizon) bool, True = open.
        demonstrated: (n, horizon) bool.
        pad_mask: (n, horizon) bool, True = real.
        before: (n,) state before the chunk: 1 open, 0 closed, NaN unknown (no event at the first step); None for unknown
            everywhere. Chunks of one action have no events without it.
        tolerance: steps.

    Returns:
        `gripper_opening_events` (demonstrated), `gripper_opening_predicted`, `gripper_opening_precision`, `..._recall`,
        `..._f1`, and the same of `closing`.
    """
    real = _real_steps(predicted, demonstrated, pad_mask)
    start = np.full(len(real), np.nan) if before is None else np.asarray(before, dtype=np.float64)
    if start.shape != real.shape[:1] or not np.isin(start[~np.isnan(start)], (0, 1)).all():
        raise VLAActionsError(f"before is ({len(real)},) of 1 (open), 0 (closed) and NaN (unknown), got {start}")
    found: dict[str, float] = {}
    for name, kind in (("opening", True), ("closing", False)):
        given, wanted = (
            _changes(np.asarray(states, dtype=bool), real, start, kind) for states in (predicted, demonstrated)
        )
        found |= event_scores(f"gripper_{name}", given, wanted, tolerance)
    return found


def event_scores(name: str, predicted: np.ndarray, demonstrated: np.ndarray, tolerance: int) -> dict[str, float]:
    """Precision, recall and F1 of events, matched one to one within a chunk.

    Args:
        name: what the keys begin with.
        predicted: (n, horizon) bool, True where an event is predicted.
        demonstrated: (n, horizon) bool.
        tolerance: steps that a predicted event may be early or late.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, np.integer)) or tolerance < 0:
        raise VLAActionsError(f"tolerance is a whole number of steps of at least 0, got {tolerance!r}")
    left, horizon = np.array(predicted, dtype=bool), np.shape(predicted)[1]
    hits = 0
    # The earliest event that is left goes to the earliest demonstrated one: no other pairing matches more.
    for t in range(horizon):
        waiting = np.asarray(demonstrated, dtype=bool)[:, t].copy()
        for near in range(max(0, t - tolerance), min(horizon, t + tolerance + 1)):
            pairs = waiting & left[:, near]
            hits += int(pairs.sum())
            waiting &= ~pairs
            left[:, near] &= ~pairs
    n_predicted, n_demonstrated = int(np.sum(predicted)), int(np.sum(demonstrated))
    counts = {f"{name}_events": float(n_demonstrated), f"{name}_predicted": float(n_predicted)}
    return {**counts, **_precision_recall(name, hits, n_predicted, n_demonstrated)}


def free_running_gap(
    free: np.ndarray, forced: np.ndarray, demonstrated: np.ndarray, pad_mask: np.ndarray, names: tuple[str, ...]
) -> dict[str, float]:
    """How much larger the mean absolute error is when a policy goes on from its own tokens than from the right ones.

    Args:
        free: (n, horizon, dof) predicted from the policy's own earlier tokens.
        forced: (n, horizon, dof) predicted from the demonstrated ones, of the same samples.
        demonstrated: (n, horizon, dof).
        pad_mask: (n, horizon) bool, True = real.
        names: (dof,) name of each dimension.

    Returns:
        `{"gap_l1": ..., "gap_l1/x": ...}`, in the units of the actions; negative where its own tokens do better.
    """
    one = action_metrics(free, demonstrated, pad_mask, names, "gap_l1")
    other = action_metrics(forced, demonstrated, pad_mask, names, "gap_l1")
    return {name: one[name] - other[name] for name in one}


def error_by_step(predicted: np.ndarray, demonstrated: np.ndarray, pad_mask: np.ndarray) -> np.ndarray:
    """(horizon, dof) mean absolute error at each step of the chunk; NaN at steps that no chunk has.

    Args and shapes as in `action_metrics`.
    """
    real = _real_steps(predicted, demonstrated, pad_mask)
    return _mean_by_step(np.abs(_difference(predicted, demonstrated, real)), real)


def drift_by_step(predicted: np.ndarray, demonstrated: np.ndarray, pad_mask: np.ndarray) -> np.ndarray:
    """(horizon, dof) how far the displacement since the chunk's beginning is off at each step, NaN where no chunk goes.

    For dimensions whose actions are changes that add up: the mean over chunks of |sum of the errors so far|. Changes of
    a rotation add up to a rotation only as long as they are small.

    Args and shapes as in `action_metrics`.
    """
    real = _real_steps(predicted, demonstrated, pad_mask)
    return _mean_by_step(np.abs(np.cumsum(_difference(predicted, demonstrated, real), axis=1)), real)


def path_deviation(predicted: np.ndarray, demonstrated: np.ndarray, pad_mask: np.ndarray, adds_up: bool) -> np.ndarray:
    """(n,) largest distance between the predicted and the demonstrated way within each chunk; NaN without a real step.

    Args:
        predicted: (n, horizon, axes) positions, or changes of them.
        demonstrated: (n, horizon, axes).
        pad_mask: (n, horizon) bool, True = real.
        adds_up: True if the numbers are changes, each from where the one before ended.
    """
    real = _real_steps(predicted, demonstrated, pad_mask)
    error = _difference(predicted, demonstrated, real)
    distance = np.linalg.norm(np.cumsum(error, axis=1) if adds_up else error, axis=-1)
    return np.where(real.any(axis=1), np.where(real, distance, 0.0).max(axis=1), np.nan)


def limit_conflict(excess: np.ndarray, pad_mask: np.ndarray, tolerance: float = ROUNDING) -> dict[str, float]:
    """How often and how far predicted steps go beyond limits.

    Args:
        excess: (n, horizon) how far each step is beyond, as `BoundConstraints.excess` measures it; 0 where all is well.
        pad_mask: (n, horizon) bool, True = real.
        tolerance: what still counts as kept.

    Returns:
        `conflict_steps` and `conflict_chunks` (shares), `conflict_mean` (over the steps that conflict, 0 if none does)
        and `conflict_worst`.
    """
    real = _real_steps(excess, excess, pad_mask)
    beyond = np.asarray(excess, dtype=np.float64)
    if (beyond[real] < 0).any():
        raise VLAActionsError(f"an excess is at least 0, got {beyond[real].min():.4g}")
    broken = real & (beyond > tolerance)
    return {
        "conflict_steps": float(broken[real].mean()),
        "conflict_chunks": float(np.asarray(broken.any(axis=1))[real.any(axis=1)].mean()),
        "conflict_mean": float(beyond[broken].mean()) if broken.any() else 0.0,
        "conflict_worst": float(beyond[real].max()),
    }


def _precision_recall(name: str, hits: int, predicted: int, demonstrated: int) -> dict[str, float]:
    found = {}
    if predicted:
        found[f"{name}_precision"] = hits / predicted
    if demonstrated:
        found[f"{name}_recall"] = hits / demonstrated
    if predicted or demonstrated:
        found[f"{name}_f1"] = 2 * hits / (predicted + demonstrated)
    return found


def _changes(states: np.ndarray, real: np.ndarray, before: np.ndarray, to_open: bool) -> np.ndarray:
    """(n, horizon) bool: steps at which the state becomes open (or closed) and was known to be the other one."""
    now = states if to_open else ~states
    came = np.equal(before, 0 if to_open else 1).reshape(-1, 1)
    first = now[:, :1] & came
    later = now[:, 1:] & ~now[:, :-1] & real[:, :-1]
    return np.concatenate([first, later], axis=1) & real


def _difference(predicted: np.ndarray, demonstrated: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Predicted less demonstrated, 0 on padding whatever stands there."""
    difference = np.zeros(np.shape(predicted))
    difference[real] = np.asarray(predicted, dtype=np.float64)[real] - np.asarray(demonstrated, dtype=np.float64)[real]
    return difference


def _mean_by_step(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    count = real.sum(axis=0)[:, None]
    total = np.where(real[..., None], values, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _whole(codes: np.ndarray) -> np.ndarray:
    whole = np.asarray(codes)
    if whole.dtype.kind not in "iu":
        raise VLAActionsError(f"codes are whole numbers, got an array of {whole.dtype}")
    return whole.astype(np.int64)


def _real_steps(predicted: Any, demonstrated: Any, pad_mask: np.ndarray) -> np.ndarray:
    """pad_mask (n, horizon) as bool; shapes that do not fit, no real step, or a real step that is not finite raise."""
    if np.shape(predicted) != np.shape(demonstrated) or np.shape(predicted)[:2] != np.shape(pad_mask):
        raise VLAActionsError(
            f"shapes do not fit: predicted {np.shape(predicted)}, demonstrated {np.shape(demonstrated)}, "
            f"pad_mask {np.shape(pad_mask)}"
        )
    real = np.asarray(pad_mask, dtype=bool)
    if not real.any():
        raise VLAActionsError("no step is real: pad_mask is False everywhere")
    for what, values in (("predicted", predicted), ("demonstrated", demonstrated)):
        bad = ~np.isfinite(np.asarray(values)[real])
        if bad.any():
            raise VLAActionsError(f"{what} has {int(bad.sum())} NaN or infinite numbers in steps that are real")
    return real
