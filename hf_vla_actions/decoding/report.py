"""What constraints did to a policy's mind: how likely each action was before and after them, and who is to blame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.errors import VLAActionsError

FIELDS = (
    *("value", "action", "mean_before", "mean_after", "std_before", "std_after", "shift"),
    *("text_mass", "allowed_mass", "conflict", "entropy_before", "entropy_after", "log_prob", "log_p", "log_q"),
)


@dataclass(frozen=True, eq=False)
class ConfidenceReport:
    """Distributions of each generated number before (p) and after (q) the constraints; made by `confidence`.

    p is the policy's distribution over the action tokens of a position, given the tokens before it. q is what the mode
    makes of it: "mask": p where allowed, times exp(nats of the soft targets), renormalized; "transport": soft targets
    first, then the mass of each forbidden token moves to the nearest allowed one; "project": the same, to where the
    value is moved; "mixture": "mask" where the policy agrees with the constraints, "project" elsewhere. Both are at temperature 1 and without top-k or top-p. Arrays are float64 (rows, horizon, dof) unless
    said otherwise; tokens of equal value count as one.

    Args:
        space: names and units of the dimensions.
        horizon: actions in a chunk.
        mode: "mask", "transport", "mixture" or "project".
        value: real value of the generated token.
        action: what is carried out: `value`, or where "project" and "mixture" moved it.
        mean_before: mean of p, real units.
        mean_after: mean of q, real units; NaN, as all of q, where no token is allowed, and where coupled constraints
            are kept by projecting the whole chunk: there is no distribution of single numbers after that.
        std_before: standard deviation of p, real units.
        std_after: standard deviation of q, real units.
        shift: Wasserstein-1 distance of p and q in real units: how far the average bit of probability moved.
        text_mass: probability of tokens that are no action of this position: high if the model is not acting at all.
        allowed_mass: share m of p on allowed tokens.
        conflict: nats by which p, masked and pulled by the soft targets, differs from p (Kullback-Leibler). Without
            soft targets it is -log m. The same in every mode; infinite where no token is allowed.
        entropy_before: of p, nats.
        entropy_after: of q, nats.
        log_prob: log-probability of the generated token among all tokens of the model.
        log_p: the same among the action tokens.
        log_q: under q; in "project" and "mixture" under what the token was drawn from, before it was moved.
        blame: text of a constraint to the share of p that it alone would remove.
    """

    space: ActionSpace
    horizon: int
    mode: str
    value: np.ndarray
    action: np.ndarray
    mean_before: np.ndarray
    mean_after: np.ndarray
    std_before: np.ndarray
    std_after: np.ndarray
    shift: np.ndarray
    text_mass: np.ndarray
    allowed_mass: np.ndarray
    conflict: np.ndarray
    entropy_before: np.ndarray
    entropy_after: np.ndarray
    log_prob: np.ndarray
    log_p: np.ndarray
    log_q: np.ndarray
    blame: dict[str, np.ndarray]

    def __post_init__(self):
        shape = (len(self.value), self.horizon, self.space.dof)
        arrays = {name: getattr(self, name) for name in FIELDS} | self.blame
        wrong = {name: np.shape(array) for name, array in arrays.items() if np.shape(array) != shape}
        if wrong:
            raise VLAActionsError(f"a report of {shape[0]} rows has arrays of shape {shape}, got {wrong}")

    @property
    def sequence_log_p(self) -> np.ndarray:
        """(rows,) log-probability of the chunk under the policy, among action tokens."""
        return self.log_p.sum(axis=(1, 2))

    @property
    def sequence_log_q(self) -> np.ndarray:
        """(rows,) log-probability of the chunk under the constrained decoder."""
        return self.log_q.sum(axis=(1, 2))

    @property
    def log_weight(self) -> np.ndarray:
        """(rows,) log of the importance weight p / q of each chunk.

        Chunks sampled at temperature 1 and weighted by it answer for the policy itself, told that the constraints hold:
        E_q[w f] / E_q[w] = E_p[f | constraints], exactly so in mode "mask" if every chunk that satisfies the constraints
        can be generated (their certificate forbids none that could). There it is the sum of log m, less the nats of the
        soft targets. In "transport" it is as exact but varies more. NaN in "project" and "mixture", where what is carried
        out is no sequence of tokens, and where a token cannot come from q (another decoder chose it).
        """
        p, q = self.sequence_log_p, self.sequence_log_q
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(q) & (self.mode in ("mask", "transport")), p - q, np.nan)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per (row, step, dimension): indices, name, unit, every array, `blame: TEXT` a constraint."""
        arrays = {name: getattr(self, name) for name in FIELDS}
        arrays |= {f"blame: {text}": share for text, share in self.blame.items()}
        return [
            {
                **{"row": row, "step": step, "dimension": self.space.names[dim], "unit": self.space.units[dim]},
                **{name: float(array[row, step, dim]) for name, array in arrays.items()},
            }
            for row, step, dim in np.ndindex(self.value.shape)
        ]

    def to_frame(self):
        """`rows()` as a pandas DataFrame; units of the values are in the column `unit`, all else is nats or shares."""
        try:
            import pandas
        except ImportError:
            raise VLAActionsError("to_frame needs pandas: pip install pandas; rows() needs nothing") from None
        return pandas.DataFrame(self.rows())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values: nested lists (rows, horizon, dof); null where a number is not finite."""
        return {
            "mode": self.mode,
            "space": self.space.to_dict(),
            "log_weight": _finite(self.log_weight),
            **{name: _finite(getattr(self, name)) for name in FIELDS},
            "blame": {text: _finite(share) for text, share in self.blame.items()},
        }

    def summary(self) -> str:
        """A few lines: where the conflict is largest, what moved how far, and because of which constraint."""
        lines = [str(self)]
        worst = np.unravel_index(int(np.argmax(self.conflict)), self.conflict.shape)
        if self.conflict[worst] > 1e-9:
            where = f"{self.space.names[worst[2]]}, step {worst[1]}, row {worst[0]}"
            lines.append(
                f"largest conflict: {self.conflict[worst]:.3g} nats in {where}: the policy gave "
                f"{self.allowed_mass[worst]:.2%} of its probability to what is allowed there"
            )
            lines += [
                self._told(dim) for dim in range(self.space.dof) if np.nanmax(self.moved[..., dim], initial=0) > 1e-9
            ]
        touched = {text: share[share > 1e-12] for text, share in self.blame.items()}
        removed = sorted(((float(share.mean()), text) for text, share in touched.items() if share.size), reverse=True)
        lines += [
            f"{text} alone removes {share:.1%} of the probability (mean of the numbers it touches: {touched[text].size})"
            for share, text in removed
        ]
        if self.text_mass.max() > 0.1:
            lines.append(
                f"up to {self.text_mass.max():.1%} of the probability is on text: is this the policy's prompt?"
            )
        return "\n".join(lines)

    @property
    def moved(self) -> np.ndarray:
        """`shift`; where whole chunks are projected, how far what is carried out is from what was decoded."""
        return np.where(np.isnan(self.shift), np.abs(self.action - self.value), self.shift)

    def _told(self, dim: int) -> str:
        unit = f" {self.space.units[dim]}" if self.space.units[dim] else ""
        moved, change = self.moved[..., dim], (self.mean_after - self.mean_before)[..., dim]
        mean = "" if np.isnan(change).all() else f"; its mean by {np.nanmean(change):+.3g}{unit}"
        name = self.space.names[dim]
        return f"{name} moves by {moved.mean():.3g}{unit} a step on average, {moved.max():.3g}{unit} at most{mean}"

    def __str__(self) -> str:
        rows, horizon, dof = self.value.shape
        free = int((self.conflict <= 1e-9).sum())
        return (
            f"ConfidenceReport of {rows} x {horizon} x {dof} numbers (rows, steps, dimensions), mode {self.mode!r}: the "
            f"constraints leave {free} of {self.conflict.size} alone, mean conflict {self.conflict.mean():.3g} nats"
        )

    __repr__ = __str__


def effective_sample_size(log_weights) -> float:
    """How many equally weighted samples the weighted ones are worth: (sum w)^2 / sum w^2.

    Args:
        log_weights: (n,) logs of importance weights, such as `ConfidenceReport.log_weight`; -inf for a weight of 0.
    """
    log_w = np.asarray(log_weights, dtype=np.float64)
    if log_w.ndim != 1 or not log_w.size or np.isnan(log_w).any() or (log_w == np.inf).any():
        raise VLAActionsError(
            f"log weights are numbers of shape (n,), got shape {log_w.shape}, {int(np.isnan(log_w).sum())} of them NaN "
            "(modes 'project' and 'mixture' have none)"
        )
    if (log_w == -np.inf).all():
        return 0.0
    w = np.exp(log_w - log_w.max())
    return float(w.sum() ** 2 / (w * w).sum())


def _finite(array: np.ndarray) -> list:
    """Nested lists with None for what JSON cannot say."""
    return np.where(np.isfinite(array), array.astype(object), np.array(None)).tolist()
