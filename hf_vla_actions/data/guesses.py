"""What numbers look like, where nobody has said what they mean: for warnings, never for conversions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

CLEAR = 0.15  # by how much one explanation has to correlate better than the other
LIKELY = 0.5


def is_binary(values: np.ndarray) -> bool:
    """Whether nearly all values are at the two ends of the range, and both ends occur."""
    x = np.asarray(values, dtype=np.float64)
    x = x[np.isfinite(x)]
    if not len(x) or x.min() == x.max():
        return False
    share = (x - x.min()) / np.ptp(x)
    ends = np.mean(share < 0.025), np.mean(share > 0.975)
    return bool(sum(ends) > 0.9 and min(ends) > 0.005)


def guess_kinds(actions: np.ndarray, states: np.ndarray | None, episodes: Sequence[Any]) -> list[str]:
    """One word a dimension: "constant", "binary", "delta", "absolute" or "unknown".

    A delta goes with the change of the state that follows it, a target with the state itself. The state of dimension i
    is taken for that of action i; where it is another, neither correlates and the answer is "unknown".

    Args:
        actions: (n_frames, dof).
        states: (n_frames, state_dim) or None.
        episodes: with `start` and `stop`.
    """
    x = np.asarray(actions, dtype=np.float64)
    kinds = []
    inner = np.ones(len(x), dtype=bool)
    inner[[e.stop - 1 for e in episodes]] = False
    now = np.flatnonzero(inner)
    for d, column in enumerate(x.T):
        finite = column[np.isfinite(column)]
        if not len(finite) or finite.min() == finite.max():
            kinds.append("constant")
        elif is_binary(column):
            kinds.append("binary")
        elif states is None or d >= states.shape[1]:
            kinds.append("unknown")
        else:
            state = np.asarray(states[:, d], dtype=np.float64)
            change, target = (
                _correlation(column[now], other) for other in (state[now + 1] - state[now], state[now + 1])
            )
            if max(change, target) < LIKELY or abs(change - target) < CLEAR:
                kinds.append("unknown")
            else:
                kinds.append("delta" if change > target else "absolute")
    return kinds


def guess_open(values: np.ndarray, episodes: Sequence[Any]) -> float | None:
    """The end of the gripper's range at which most episodes begin, which is open where hands begin open.

    None if fewer than five episodes use both ends, or fewer than four fifths of them agree.

    Args:
        values: (n_frames,) of the gripper.
        episodes: with `start` and `stop`.
    """
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all() or not is_binary(x):
        return None
    high = x > (x.min() + x.max()) / 2
    begins = [bool(high[e.start]) for e in episodes if np.unique(high[e.start : e.stop]).size == 2]
    if len(begins) < 5:
        return None
    share = float(np.mean(begins))
    if 0.2 < share < 0.8:
        return None
    return float(x.max() if share >= 0.8 else x.min())


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    good = np.isfinite(a) & np.isfinite(b)
    a, b = a[good], b[good]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
