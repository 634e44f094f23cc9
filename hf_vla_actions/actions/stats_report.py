"""What statistics alone tell about the numbers that they were made of, before any of these is seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_vla_actions.errors import StatsError

if TYPE_CHECKING:
    from hf_vla_actions.actions.stats import ActionStats

EXPLODES = 10.0  # half ranges beyond the normalized range at which a value is worth a warning
ROUNDING = 1e-6  # of its magnitude: a range as narrow as this is noise
COLUMNS = ("min", "low", "mean", "std", "high", "max")


def report_text(
    stats: ActionStats, names: Sequence[str] | None = None, units: Sequence[str | None] | None = None
) -> str:
    """A table of ranges, and what is odd about them; see `ActionStats.report`."""
    labels = [str(name) for name in names] if names is not None else [f"dim_{i}" for i in range(stats.dof)]
    units = [None] * stats.dof if units is None else list(units)
    if len(labels) != stats.dof or len(units) != stats.dof:
        raise StatsError(f"{len(labels)} names and {len(units)} units for statistics of {stats.dof} dimensions")
    rows = "" if stats.count is None else f"{stats.count} rows, "
    scaled = (
        "mean and std" if stats.mode == "normal" else "q01 and q99" if stats.mode == "bounds_q99" else "min and max"
    )
    lines = [f"{rows}{stats.dof} dimensions, normalized by {scaled}"]
    lines += list(_table(stats, labels, units))
    found = list(_findings(stats, labels))
    return "\n".join([*lines, *(found or ["  nothing odd"])]) + "\n"


def _bounds(stats: ActionStats) -> tuple[np.ndarray, np.ndarray]:
    """What becomes -1 and 1, each (steps, dof); one step unless each has statistics of its own."""
    low, high = stats._scale()
    low, high = (low - high, low + high) if stats.mode == "normal" else (low, high)
    return np.atleast_2d(low), np.atleast_2d(high)


def _table(stats: ActionStats, labels: Sequence[str], units: Sequence[str | None]) -> Iterator[str]:
    """One line a dimension; of chunks the first and the last step."""
    low, high = _bounds(stats)
    known = {name: getattr(stats, name) for name in ("min", "mean", "std", "max")}
    vectors = {name: np.atleast_2d(v) for name, v in known.items() if v is not None} | {"low": low, "high": high}
    shown = [name for name in COLUMNS if name in vectors]
    wide = max(map(len, labels))
    for step in sorted({0, len(low) - 1}):
        if stats.horizon is not None:
            yield f"  step {step} of 0 to {len(low) - 1}"
        yield f"  {'':<{wide}} {'unit':<6}" + "".join(f"{name:>11}" for name in shown)
        for i, (label, unit) in enumerate(zip(labels, units, strict=True)):
            numbers = "".join(f"{vectors[name][step, i]:>11.4g}" for name in shown)
            passes = "" if np.asarray(stats.mask)[i] else "  not normalized"
            yield f"  {label:<{wide}} {unit or '-':<6}{numbers}{passes}"


def _findings(stats: ActionStats, labels: Sequence[str]) -> Iterator[str]:
    """One line for each thing that is odd; of the steps of a chunk, those where it is worst."""
    low, high = _bounds(stats)
    mask, constant = np.asarray(stats.mask), np.atleast_2d(stats.constant)
    moving = mask & ~constant
    ends = None if stats.min is None or stats.max is None else (np.atleast_2d(stats.min), np.atleast_2d(stats.max))
    lost = constant & (ends[0] < ends[1]) if ends is not None else np.zeros_like(constant)
    still = [labels[i] for i in np.flatnonzero((constant & ~lost).all(axis=0)).tolist()]
    if still:
        yield f"  note     constant, so that no token can move them: {', '.join(still)}"
    half = (high - low) / 2
    magnitude = np.maximum(np.abs(low), np.abs(high))
    for i in np.flatnonzero(lost.any(axis=0)).tolist():
        step = int(lost[:, i].argmax())
        yield (
            f"  PROBLEM  {labels[i]!r} would be held at {low[step, i]:.4g}{_at(stats, step)}, though it runs "
            f"{ends[0][step, i]:.4g}..{ends[1][step, i]:.4g}: use mode 'bounds', or a mask that lets it pass"  # type: ignore[index]
        )
    for i in np.flatnonzero((moving & (half < ROUNDING * magnitude)).any(axis=0)).tolist():
        step = int((moving & (half < ROUNDING * magnitude))[:, i].argmax())
        yield (
            f"  PROBLEM  {labels[i]!r} moves by {2 * half[step, i]:.2g} around {low[step, i]:.4g}{_at(stats, step)}: noise of "
            "rounding would fill the whole range"
        )
    if ends is None:
        return
    beyond = np.maximum(ends[1] - high, low - ends[0]) / np.where(moving, half, np.inf)
    for i in np.flatnonzero((beyond > EXPLODES).any(axis=0)).tolist():
        step = int(beyond[:, i].argmax())
        yield (
            f"  PROBLEM  {labels[i]!r} reaches {beyond[step, i]:.0f} half ranges beyond {low[step, i]:.4g}.."
            f"{high[step, i]:.4g}{_at(stats, step)}: z-scores explode, bins clip it"
        )
    if stats.mode == "bounds_q99":
        clipped = np.flatnonzero((moving & ((ends[0] < low) | (ends[1] > high))).any(axis=0)).tolist()
        if clipped:
            texts = [f"{labels[i]} (beyond by {beyond[:, i].max():.2g} half ranges)" for i in clipped]
            yield f"  note     clipped, at most 2 % of the rows of each: {', '.join(texts)}"
    two = _two_values(stats, ends)
    if two is not None and (two & moving).all(axis=0).any():
        names = [labels[i] for i in np.flatnonzero((two & moving).all(axis=0)).tolist()]
        yield f"  note     two values, normalized like continuous numbers; a gripper wants a mask: {', '.join(names)}"


def _two_values(stats: ActionStats, ends: tuple[np.ndarray, np.ndarray]) -> np.ndarray | None:
    """Where only the two ends occur: of all numbers between them with this mean, no others have so large a std."""
    if stats.mean is None or stats.std is None:
        return None
    width = np.where(ends[1] > ends[0], ends[1] - ends[0], 1.0)
    share = (np.atleast_2d(stats.mean) - ends[0]) / width
    largest = width * np.sqrt(np.clip(share * (1 - share), 0, None))
    return (ends[1] > ends[0]) & (np.atleast_2d(stats.std) >= (1 - 1e-6) * largest)


def _at(stats: ActionStats, step: int) -> str:
    return "" if stats.horizon is None else f" at step {step}"
