"""What `predict_action(return_dict=True)` returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ActionOutput:
    """Predicted chunks with what is needed to judge them; batch counts `num_return_sequences` too.

    Args:
        actions: (batch, horizon, dof) float64, real units: what the robot is to do.
        normalized: (batch, horizon, dof) float64: what the tokens say, before it is un-normalized and before the
            mode "project" moves it.
        token_ids: (batch, horizon * dof) int64.
        log_prob: (batch,) float64: log-probability of the tokens under the model, before any constraint.
        unnorm_key: which statistics were used.
        moved: (batch, horizon, dof) float64, real units: how far "project" moved each value; zeros in other modes.
        confidence: report on the distributions; None where none was asked for.
    """

    actions: np.ndarray
    normalized: np.ndarray
    token_ids: np.ndarray
    log_prob: np.ndarray
    unnorm_key: str
    moved: np.ndarray
    confidence: None = None
