"""What an offline evaluation found: numbers, a table, a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.metrics import WITHIN
from hf_vla_actions.plots import plot_offline

COLUMNS = {
    "free_l1": "L1",
    "forced_l1": "L1 told",
    "gap_l1": "gap",
    "coding_l1": "coding",
    "free_drift": "drift",
    "token_accuracy": "tokens",
    **{f"free_within_{k}_bins": f"±{k} bin{'s' * (k > 1)}" for k in WITHIN},
}
LEGEND = (
    "L1: mean absolute error on its own; told: each token predicted from the demonstrated ones before it; gap: the "
    "difference;\ncoding: what turning demonstrations into tokens costs; drift: how far the sum of a chunk's changes is "
    "off at its last step;\ntokens: right ones when told; bins: share of the numbers within so many bins, on its own"
)


@dataclass(frozen=True, eq=False)
class OfflineReport:
    """How a policy's predictions agree with demonstrations, and with the robot's limits.

    Args:
        unnorm_key: whose statistics and action space.
        space: meaning of the numbers.
        n_available: chunks there were to choose from.
        metrics: name to number; see `evaluate_offline`.
        predicted: (n, horizon, dof) real units, on its own, free of any constraint.
        demonstrated: (n, horizon, dof).
        pad_mask: (n, horizon) bool, True = real.
        error_by_step: (horizon, dof) mean absolute error, NaN at steps that no chunk has.
        drift_by_step: (horizon, dof) see `drift_by_step`; NaN where actions do not add up.
        width: (dof,) real width of the range that the statistics normalize.
        conflicts: for each constraint that was judged, its numbers.
        notes: what could not be measured, and why.
    """

    unnorm_key: str
    space: ActionSpace
    n_available: int
    metrics: Mapping[str, float]
    predicted: np.ndarray
    demonstrated: np.ndarray
    pad_mask: np.ndarray
    error_by_step: np.ndarray
    drift_by_step: np.ndarray
    width: np.ndarray
    conflicts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self, prefix: str = "") -> dict[str, Any]:
        """JSON-ready: every metric as a number of its own, `{prefix}{name}`, and what is no single number below them.

        Args:
            prefix: "eval_" for held-out episodes, "train_" for frames of the training, as in `action_metrics.json`.
        """
        curves = {"error_by_step": self.error_by_step, "drift_by_step": self.drift_by_step}
        return {
            f"{prefix}chunks": len(self.predicted),
            **{f"{prefix}{name}": value for name, value in self.metrics.items()},
            **{f"{prefix}{name}": self._by_name(curve) for name, curve in curves.items()},
            f"{prefix}conflicts": {text: dict(values) for text, values in self.conflicts.items()},
            f"{prefix}notes": list(self.notes),
        }

    def _by_name(self, curve: np.ndarray) -> dict[str, list[float | None]]:
        return {
            name: [None if math.isnan(value) else value for value in column.tolist()]
            for name, column in zip(self.space.names, curve.T, strict=True)
            if not np.isnan(column).all()
        }

    def text(self, *, legend: bool = True) -> str:
        """A table with a line for each dimension, and what is said of whole chunks below it.

        Args:
            legend: say what the columns are.
        """
        n, horizon, _ = self.predicted.shape
        head = f"{n:,} of {self.n_available:,} chunks of {horizon} action{'s' * (horizon > 1)}, {self.unnorm_key}"
        columns = [name for name in COLUMNS if any(key.startswith(name) for key in self.metrics)]
        lines = [head, f"{'dimension':<14}{'unit':<6}" + "".join(f"{COLUMNS[name]:>11}" for name in columns)]
        for name, unit in zip(self.space.names, self.space.units, strict=True):
            cells = "".join(f"{_cell(column, self.metrics.get(f'{column}/{name}')):>11}" for column in columns)
            lines.append(f"{name:<14}{unit or '-':<6}{cells}")
        shares = [column for column in columns if "l1" not in column and "drift" not in column]
        means = "".join(
            f"{_cell(column, self.metrics.get(column) if column in shares else None):>11}" for column in columns
        )
        lines += [
            f"{'all':<14}{'':<6}{means}",
            *([LEGEND] if legend else []),
            "",
            *self._chunk_lines(),
            *self._gripper_lines(),
        ]
        return "\n".join([*lines, *self._limit_lines(), *(f"note: {note}" for note in self.notes)]) + "\n"

    def _chunk_lines(self) -> list[str]:
        found = self.metrics
        parts = [
            f"{found['free_chunks_within_0_bins']:.0%} in the very bins, {found['free_chunks_within_1_bins']:.0%}"
        ]
        text = f"whole chunks: {parts[0]} within one bin everywhere"
        paths = [name for name in found if name.startswith("free_path_within")]
        if paths:
            within = ", ".join(f"{name.removeprefix('free_path_within_')} {found[name]:.0%}" for name in paths)
            text += f"; path of the tool within {within}"
        lines = [text]
        if found.get("malformed_chunks"):
            lines.append(
                f"unguided, {found['malformed_chunks']:.0%} of the token sequences spell no chunk (predict_action guides them)"
            )
        return lines

    def _gripper_lines(self) -> list[str]:
        lines = []
        for name in ("open", "closed", "opening", "closing"):
            found = {part: self.metrics.get(f"free_gripper_{name}_{part}") for part in ("precision", "recall", "f1")}
            if all(value is None for value in found.values()):
                continue
            scores = ", ".join(f"{part} {_cell('', value)}" for part, value in found.items())
            count = self.metrics.get(f"free_gripper_{name}_events")
            lines.append(f"gripper {name}: {scores}" + ("" if count is None else f" ({count:.0f} demonstrated)"))
        return lines

    def _limit_lines(self) -> list[str]:
        lines = []
        for text, found in self.conflicts.items():
            lines.append(
                f"{text}: broken in {found['conflict_steps']:.1%} of the steps, {found['conflict_chunks']:.1%} of the chunks, "
                f"by {found['conflict_mean']:.3g} on average and {found['conflict_worst']:.3g} at worst; demonstrations "
                f"break it in {found['demonstrated_conflict_steps']:.1%} of the steps"
            )
        return lines

    def figure(self):
        """Predicted against demonstrated, and the error along the chunk; a matplotlib Figure."""
        return plot_offline({"predicted": self})


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if "l1" in column or "drift" in column:
        return f"{value:.3g}"
    return f"{value:.1%}"
