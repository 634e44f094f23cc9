"""What `predict_action(return_dict=True)` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hf_vla_actions.constraints.bound import BoundConstraints, Fallback
from hf_vla_actions.decoding.kept import KeptWhile
from hf_vla_actions.decoding.moved import MovedReport
from hf_vla_actions.decoding.report import ConfidenceReport
from hf_vla_actions.errors import VLAActionsError

PROJECTED = ("project", "mixture")  # modes whose decoded chunk is moved to where everything is allowed
ROUNDING = 1e-9  # of an excess, real units: sums of the same numbers in another order


def commanded(bound: BoundConstraints, decoded: np.ndarray, mode: str, style: str) -> np.ndarray:
    """What the robot is told to do after decoding: within all constraints, or an error.

    Args:
        bound: the constraints.
        decoded: (batch, horizon, dof) what the tokens or the head say, real units.
        mode: how constraints were kept while decoding.
        style: of the projection; see `BoundConstraints.project`.
    """
    actions = bound.project(decoded, style) if mode in PROJECTED else np.array(decoded)
    each = len(actions) // bound.n_samples
    for sample, fallback in enumerate(bound.fallbacks):
        if fallback is not None and fallback.actions is not None:
            actions[sample * each : (sample + 1) * each] = fallback.actions
    held = np.repeat([f is not None and f.actions is not None for f in bound.fallbacks], each)
    excess = np.where(held, 0.0, bound.excess(actions).max(axis=1))
    if (excess > ROUNDING).any():
        row = int(excess.argmax())
        raise VLAActionsError(
            f"the chunk of row {row} exceeds its constraints by {excess[row]:.3g}: either another logits processor forced "
            "tokens that they do not allow, or no projection was found. Nothing was returned"
        )
    return actions


@dataclass(frozen=True)
class ActionOutput:
    """Predicted chunks with what is needed to judge them; batch counts `num_return_sequences` too.

    Args:
        actions: (batch, horizon, dof) float64, real units: what the robot is to do.
        normalized: (batch, horizon, dof) float64: what the tokens say, before it is un-normalized and before the
            mode "project" moves it.
        token_ids: (batch, horizon * dof) int64; of FAST and VQ (batch, length), the end token included.
        log_prob: (batch,) float64: log-probability of the tokens under the model, before any constraint.
        unnorm_key: which statistics were used.
        moved: (batch, horizon, dof) float64, real units: how far each value was moved after decoding ("project",
            "mixture", and where the robot is told to hold); zeros in other modes. FAST: also from beyond what normalized
            values can stand for.
        fallbacks: for each sample, what was done because its constraints could not all hold; None where all is well.
        kept_while: FAST and VQ: for each sample (one entry if all share their constraints), which constraints were kept
            while decoding, which by projection afterwards and why, and which had no effect.
        candidate: VQ: (batch,) int64 which of the likely chunks each row is: 0 the one decoded first, -1 where none was
            allowed and the first was projected. None otherwise.
        report: makes `confidence`; None where there is nothing to tell.
    """

    actions: np.ndarray
    normalized: np.ndarray
    token_ids: np.ndarray
    log_prob: np.ndarray
    unnorm_key: str
    moved: np.ndarray
    fallbacks: Sequence[Fallback | None] = ()
    kept_while: Sequence[KeptWhile] = ()
    candidate: np.ndarray | None = None
    report: Callable[[], ConfidenceReport | MovedReport] | None = field(default=None, repr=False)

    @property
    def fallback(self) -> np.ndarray:
        """(batch,) bool: rows whose constraints could not all hold, so that something else was done."""
        flags = [fallback is not None for fallback in self.fallbacks] or [False]
        return np.repeat(flags, len(self.actions) // len(flags))

    @property
    def certified(self) -> np.ndarray:
        """(batch,) bool: rows that are what the tokens say, because nothing had to be moved."""
        return np.logical_not(self.moved.any(axis=(1, 2)))

    @cached_property
    def confidence(self) -> ConfidenceReport | MovedReport:
        """What constraints did to the policy's distributions; worked out when it is first asked for.

        Of a continuous head, which has no distributions: what they did to its numbers, and which of them did it.
        """
        if self.report is None and self.kept_while:
            raise VLAActionsError(
                "tokens of FAST and VQ stand for whole chunks: no number has a distribution to report on. What constraints did "
                "is in kept_while, moved, certified and candidate (hf-vla predict --report prints it)"
            )
        if self.report is None:
            raise VLAActionsError("this output came without a report")
        return self.report()
