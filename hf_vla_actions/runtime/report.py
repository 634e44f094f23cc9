"""What happened while inference and robot ran side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_vla_actions.errors import ExecutionError

QUANTILES = (0.5, 0.9, 1.0)


@dataclass(frozen=True)
class AsyncReport:
    """Counts since the policy was made, over all episodes.

    Args:
        actions: actions sent, of all kinds.
        inferences: looks begun.
        latencies: seconds of each look that ended (the last 1000 of them).
        late_steps: actions that were made up because no chunk had one (`on_late`).
        early_calls: calls less than half a period after the last action, which were told to hold.
        missed_ticks: control periods in which nobody called.
        skipped_steps: steps that lay in the past when their chunk arrived.
        dropped_stale: chunks that arrived after a chunk with a newer observation.
        dropped_passed: chunks that arrived after everything in them had passed.
        overran: chunks that took longer than the steps that were frozen for them (real-time chunking).
        discarded: looks under way at a reset.
        waited: seconds that the first calls of the episodes waited for their chunk.
    """

    actions: int = 0
    inferences: int = 0
    latencies: tuple[float, ...] = ()
    late_steps: int = 0
    early_calls: int = 0
    missed_ticks: int = 0
    skipped_steps: int = 0
    dropped_stale: int = 0
    dropped_passed: int = 0
    overran: int = 0
    discarded: int = 0
    waited: float = 0.0

    def latency(self, quantile: float = 0.5) -> float:
        """Seconds within which this share of the looks ended; raises if none has ended."""
        if not self.latencies or not 0 <= quantile <= 1:
            raise ExecutionError(
                f"no quantile {quantile} of {len(self.latencies)} latencies: it is a share between 0 and 1"
            )
        return float(np.quantile(self.latencies, quantile))

    def __str__(self) -> str:
        texts = [f"{self.actions} actions, {self.late_steps} of them late, {self.inferences} inferences"]
        if self.latencies:
            spread = " / ".join(f"{1e3 * self.latency(q):.0f}" for q in QUANTILES)
            texts.append(f"latency {spread} ms (median / 90 % / longest)")
        names = ("early_calls", "missed_ticks", "skipped_steps", "dropped_stale", "dropped_passed", "overran")
        texts += [f"{name.replace('_', ' ')} {getattr(self, name)}" for name in names if getattr(self, name)]
        return "; ".join(texts)
