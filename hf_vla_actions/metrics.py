"""How well predicted chunks agree with demonstrated ones: functions of arrays."""

from __future__ import annotations

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


def _real_steps(predicted: Any, demonstrated: Any, pad_mask: np.ndarray) -> np.ndarray:
    if np.shape(predicted) != np.shape(demonstrated) or np.shape(predicted)[:2] != np.shape(pad_mask):
        raise VLAActionsError(
            f"shapes do not fit: predicted {np.shape(predicted)}, demonstrated {np.shape(demonstrated)}, "
            f"pad_mask {np.shape(pad_mask)}"
        )
    real = np.asarray(pad_mask, dtype=bool)
    if not real.any():
        raise VLAActionsError("no step is real: pad_mask is False everywhere")
    return real
