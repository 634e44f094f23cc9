"""What constraints did to chunks of numbers, of which nobody knows a distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints import Context, bind, with_limits
from hf_vla_actions.errors import InfeasibleConstraintError

ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class MovedReport:
    """What a continuous head wanted, what the robot is told, and because of which constraint.

    The counterpart of `ConfidenceReport` for policies that predict numbers.

    Args:
        space: names and units of the dimensions.
        decoded: (rows, horizon, dof) what the head says, real units.
        actions: (rows, horizon, dof) what is carried out.
        blame: text of a constraint to (rows, horizon) by how much the decoded chunk breaks it at each step, in its own
            unit (meters too long, meters inside a zone, 1 for a change that may not be); NaN for rows that it is not
            asked of, and for a constraint that cannot hold alone.
    """

    space: ActionSpace
    decoded: np.ndarray
    actions: np.ndarray
    blame: dict[str, np.ndarray]

    @property
    def moved(self) -> np.ndarray:
        """(rows, horizon, dof) how far each number was moved, real units, signed."""
        return self.actions - self.decoded

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; null where a number is not finite."""
        return {
            "space": self.space.to_dict(),
            "decoded": self.decoded.tolist(),
            "actions": self.actions.tolist(),
            "blame": {
                text: [[None if np.isnan(v) else float(v) for v in row] for row in excess]
                for text, excess in self.blame.items()
            },
        }

    def summary(self) -> str:
        """A few lines: what moved how far, and which constraints the head would have broken."""
        away = np.abs(self.moved)
        lines = [str(self)]
        for dim in np.flatnonzero(away.max(axis=(0, 1)) > ROUNDING):
            unit = f" {self.space.units[dim]}" if self.space.units[dim] else ""
            each = away[..., dim]
            lines.append(
                f"{self.space.names[dim]} moves by {each.mean():.3g}{unit} a step on average, {each.max():.3g}{unit} at most"
            )
        for text, excess in self.blame.items():
            broken = excess > ROUNDING
            if broken.any():
                lines.append(
                    f"{text} was broken in {broken.sum()} of {broken.size} steps, by up to {excess[broken].max():.3g}"
                )
            elif np.isnan(excess).all():
                lines.append(f"{text} cannot hold alone, and was left out")
        return "\n".join(lines)

    def __str__(self) -> str:
        rows, horizon, dof = self.actions.shape
        still = int((np.abs(self.moved) <= ROUNDING).sum())
        return (
            f"MovedReport of {rows} x {horizon} x {dof} numbers (rows, steps, dimensions): the constraints leave {still} of "
            f"{self.actions.size} as the head says them"
        )

    __repr__ = __str__


def moved_report(
    decoded: np.ndarray, actions: np.ndarray, space: ActionSpace, constraints, limits, context: Context | None
) -> MovedReport:
    """Compare what a head says with what is carried out.

    Args:
        decoded: (rows, horizon, dof) what the head says, real units.
        actions: (rows, horizon, dof) what is carried out.
        space: names and units of the dimensions.
        constraints: as in `predict_action`.
        limits: constraints that hold always.
        context: what the robot knew.
    """
    rows, horizon, _ = decoded.shape
    lists = with_limits(constraints, tuple(limits))
    each = rows // len(lists)
    blame: dict[str, np.ndarray] = {}
    for place in range(max(map(len, lists))):
        alone = [[sample[place]] if place < len(sample) else [] for sample in lists]
        try:
            excess = bind(alone, space, None, horizon, grid=False, context=context).excess(decoded)
        except InfeasibleConstraintError:
            excess = np.full((rows, horizon), np.nan)
        for sample, constraint in enumerate(alone):
            if constraint:
                found = blame.setdefault(str(constraint[0]), np.full((rows, horizon), np.nan))
                found[sample * each : (sample + 1) * each] = excess[sample * each : (sample + 1) * each]
    return MovedReport(space, decoded, actions, blame)
