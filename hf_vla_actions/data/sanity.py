"""What is odd about the numbers of a dataset, before anything is trained on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from hf_vla_actions.actions import ActionSpace, ActionStats
from hf_vla_actions.actions.stats_report import EXPLODES, ROUNDING
from hf_vla_actions.data.guesses import guess_kinds, guess_open
from hf_vla_actions.errors import DatasetError

CLIPPED = 0.05  # share outside the statistics' range above which they are not those of these data
SHOWN = 5  # places named of each kind


class Span(Protocol):
    """Where an episode stands in the rows."""

    @property
    def index(self) -> int:
        """Its number in the dataset."""

    @property
    def start(self) -> int:
        """Its first row."""

    @property
    def stop(self) -> int:
        """The row behind its last."""


@dataclass(frozen=True)
class Dimension:
    """One number of the action over the whole dataset, real units.

    Args:
        name: of the dimension.
        unit: its unit.
        min: smallest value.
        low: what becomes -1 (mean - std where mean and std normalize).
        mean: of all rows.
        high: what becomes 1 (mean + std).
        max: largest value.
        clipped: share of the rows below `low` or above `high`; 0 where mean and std normalize, which clip nothing.
        kind: "constant", "binary", "delta", "absolute" or "unknown": what the numbers look like, whatever was declared.
    """

    name: str
    unit: str | None
    min: float
    low: float
    mean: float
    high: float
    max: float
    clipped: float
    kind: str


@dataclass(frozen=True)
class SanityReport:
    """What was found.

    Args:
        source: the dataset.
        n_episodes: how many.
        n_frames: rows of all of them.
        rate_hz: as declared; None where nobody did.
        measured_hz: from the timestamps; None without them.
        dimensions: one entry a dimension.
        problems: what should be mended before training.
        notes: what should be known.
    """

    source: str
    n_episodes: int
    n_frames: int
    rate_hz: float | None
    measured_hz: float | None
    dimensions: tuple[Dimension, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        measured = "" if self.measured_hz is None else f", {self.measured_hz:.4g} Hz by its timestamps"
        rate = "an unknown rate" if self.rate_hz is None else f"{self.rate_hz:g} Hz"
        lines = [f"{self.source}: {self.n_episodes} episodes, {self.n_frames} frames at {rate}{measured}"]
        wide = max(len(d.name) for d in self.dimensions)
        lines.append(
            f"  {'':<{wide}} {'unit':<5}"
            + "".join(f"{head:>11}" for head in ("min", "low", "mean", "high", "max", "clipped"))
            + "  looks"
        )
        for d in self.dimensions:
            numbers = "".join(f"{value:>11.4g}" for value in (d.min, d.low, d.mean, d.high, d.max))
            lines.append(f"  {d.name:<{wide}} {d.unit or '-':<5}{numbers}{d.clipped:>11.1%}  {d.kind}")
        lines += [f"  PROBLEM  {text}" for text in self.problems]
        lines += [f"  note     {text}" for text in self.notes]
        if not self.problems:
            lines.append(f"  nothing that speaks against training on it{', but read the notes' if self.notes else ''}")
        return "\n".join(lines) + "\n"


def check_numbers(
    actions: np.ndarray,
    episodes: tuple[Span, ...],
    space: ActionSpace,
    *,
    rate_hz: float | None,
    source: str = "the dataset",
    states: np.ndarray | None = None,
    timestamps: np.ndarray | None = None,
    stats: ActionStats | None = None,
    skip_first: int = 0,
) -> SanityReport:
    """Look at every number of a dataset.

    Args:
        actions: (n_frames, dof) real units; may hold NaN, which is then reported.
        episodes: which rows belong together.
        space: what the numbers are declared to mean.
        rate_hz: declared control rate; None if nobody says it.
        source: name for the report.
        states: (n_frames, state_dim), to tell deltas from absolute targets.
        timestamps: (n_frames,) seconds within the episode.
        stats: those that will normalize the actions; q01..q99 of the actions themselves if None.
        skip_first: steps of each episode that are left out already, so nothing is to be said about the first one.

    Raises:
        DatasetError: shapes do not fit, or no row is finite.
    """
    x = np.asarray(actions, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != space.dof or not episodes or episodes[-1].stop > len(x):
        raise DatasetError(f"actions are (n_frames, {space.dof}) with at least one episode, got shape {x.shape}")
    problems, notes = [], []
    finite = np.isfinite(x).all(axis=1)
    problems += list(_not_finite(x, episodes, space, "actions"))
    if states is not None:
        problems += list(_not_finite(np.asarray(states), episodes, None, "states"))
    if not finite.any():
        raise DatasetError(f"no row of {source} is finite")
    own = ActionStats.compute(x[finite])
    used = own if stats is None else stats
    if used.dof != space.dof:
        raise DatasetError(f"statistics of {used.dof} dimensions for actions of {space.dof}")
    if used.horizon is not None:
        raise DatasetError(
            "statistics of each step of a chunk say nothing about single actions: give those of actions"
        )
    low, high = used.unnormalize(-np.ones(space.dof)), used.unnormalize(np.ones(space.dof))
    normalized = np.asarray(used.mask)
    kinds = guess_kinds(x, states, episodes)
    dimensions = []
    for d in range(space.dof):
        column = x[finite, d]
        outside = np.mean((column < low[d]) | (column > high[d]))
        clipped = outside if normalized[d] and used.mode != "normal" else 0.0
        dimensions.append(
            Dimension(
                name=space.names[d],
                unit=space.units[d],
                min=float(column.min()),
                low=float(low[d]),
                mean=float(column.mean()),
                high=float(high[d]),
                max=float(column.max()),
                clipped=float(clipped),
                kind=kinds[d],
            )
        )
    bad, odd = _ranges(x[finite], dimensions, used, own, space)
    problems += bad
    notes += odd
    notes += list(_meaning(x, episodes, space, kinds))
    measured, bad, odd = _times(timestamps, episodes, rate_hz)
    problems += bad
    notes += odd
    notes += list(_repeats(x, states, episodes, space, kinds, skip_first))
    return SanityReport(
        source=source,
        n_episodes=len(episodes),
        n_frames=len(x),
        rate_hz=None if rate_hz is None else float(rate_hz),
        measured_hz=measured,
        dimensions=tuple(dimensions),
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _not_finite(x: np.ndarray, episodes: tuple[Span, ...], space: ActionSpace | None, what: str) -> Iterator[str]:
    rows, dims = np.nonzero(~np.isfinite(x))
    if not len(rows):
        return
    starts = np.array([e.start for e in episodes])
    places = []
    for row, dim in list(zip(rows.tolist(), dims.tolist(), strict=True))[:SHOWN]:
        episode = episodes[int(np.searchsorted(starts, row, side="right")) - 1]
        name = repr(space.names[dim]) if space else f"dimension {dim}"
        places.append(f"{name} = {x[row, dim]} in episode {episode.index} step {row - episode.start}")
    more = f", and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    yield f"{len(rows)} {what} are NaN or infinite: {'; '.join(places)}{more}. Repair or remove these episodes"


def _ranges(
    x: np.ndarray, dimensions: list[Dimension], stats: ActionStats, own: ActionStats, space: ActionSpace
) -> tuple[list[str], list[str]]:
    problems, notes = [], []
    if stats.mode == "normal":
        notes.append("normalized by mean and std: low and high are one std from the mean, and nothing is clipped")
    constant = [d.name for d in dimensions if d.kind == "constant"]
    if constant:
        notes.append(f"constant, so that no token can move them: {', '.join(constant)}")
    gripper = None if space.gripper is None else space.index(space.gripper.dim)
    normalized = np.asarray(stats.mask)
    for i, d in enumerate(dimensions):
        if d.kind == "constant" or not normalized[i]:
            continue
        half = (d.high - d.low) / 2
        if half <= 0:
            problems.append(
                f"{d.name!r} has statistics without width at {d.low:.4g}, but runs {d.min:.4g}..{d.max:.4g}: it would be "
                "held constant. Normalize it by its bounds (--norm_mode bounds), or leave it out"
            )
            continue
        beyond = max(d.max - d.high, d.low - d.min) / half
        if beyond > EXPLODES:
            problems.append(
                f"{d.name!r} reaches {beyond:.0f} half ranges beyond what its statistics normalize ({d.low:.4g}..{d.high:.4g}, "
                f"data {d.min:.4g}..{d.max:.4g}): z-scores explode, bins clip it. Look at these rows"
            )
        if half < ROUNDING * max(abs(d.low), abs(d.high)):
            problems.append(
                f"{d.name!r} moves by {2 * half:.2g} around {d.low:.4g}: noise of rounding would fill the whole range; "
                "leave it constant or out"
            )
        if d.clipped > CLIPPED and stats is not own:
            problems.append(f"{d.clipped:.1%} of {d.name!r} lie outside the given statistics: they are of other data")
        if stats.mode == "normal" and _is_other(d, half, own.std[i]):  # type: ignore[index]
            problems.append(
                f"{d.name!r} has mean {d.mean:.4g} and std {own.std[i]:.4g}, the given statistics "  # type: ignore[index]
                f"{d.low + half:.4g} and {half:.4g}: they are of other data"
            )
    binary = [i for i in range(x.shape[1]) if normalized[i] and i != gripper and dimensions[i].kind == "binary"]
    if binary:
        values = ", ".join(
            f"{dimensions[i].name} ({dimensions[i].min:.4g} or {dimensions[i].max:.4g})" for i in binary
        )
        notes.append(f"two values, normalized like continuous numbers; a gripper wants to be declared: {values}")
    return problems, notes


def _is_other(d: Dimension, std: float, own_std: float) -> bool:
    """Whether mean and std are clearly not those of a dimension: a std away, or thrice as wide or as narrow."""
    return abs(d.mean - (d.low + d.high) / 2) > max(std, own_std) or not std / 3 <= own_std <= 3 * std


def _meaning(x: np.ndarray, episodes: tuple[Span, ...], space: ActionSpace, kinds: list[str]) -> Iterator[str]:
    for kind, words in (("delta", "the change of the state"), ("absolute", "the state itself")):
        pairs = enumerate(zip(kinds, space.delta, strict=True))
        wrong = [space.names[i] for i, (k, delta) in pairs if k == kind and delta is (kind != "delta")]
        if wrong:
            declared = "absolute" if kind == "delta" else "a delta"
            yield f"declared {declared}, but following {words}, as {kind} actions do: {', '.join(wrong)}"
    if space.gripper is None:
        return
    gripper, dim = space.gripper, space.index(space.gripper.dim)
    column = x[:, dim]
    near = np.abs(column - gripper.open) <= np.abs(column - gripper.closed)
    if np.isfinite(column).all() and (near.all() or not near.any()):
        only = "open" if near.all() else "closed"
        yield f"the gripper {space.names[dim]!r} is always {only}, if open is {gripper.open:g} and closed {gripper.closed:g}"
    opens = guess_open(column, episodes)
    if opens is not None and abs(opens - gripper.closed) < abs(opens - gripper.open):
        yield (
            f"most episodes begin with {space.names[dim]!r} at {opens:.4g}, which is declared closed: hands begin open, so "
            "its sign may be the other way round"
        )


def _times(
    timestamps: np.ndarray | None, episodes: tuple[Span, ...], rate_hz: float | None
) -> tuple[float | None, list[str], list[str]]:
    if timestamps is None:
        return None, [], []
    t = np.asarray(timestamps, dtype=np.float64)
    inside = np.ones(len(t) - 1, dtype=bool)
    inside[[e.stop - 1 for e in episodes[:-1]]] = False
    steps = np.diff(t)
    if not inside.any():
        return None, [], []
    middle = float(np.median(steps[inside]))
    if not middle > 0:
        return None, ["timestamps do not rise: the control rate is unknown"], []
    problems, notes = [], []
    measured = 1 / middle
    if rate_hz is not None and abs(measured / rate_hz - 1) > 0.02:
        problems.append(f"declared {rate_hz:g} Hz, but {measured:.4g} Hz by its timestamps: deltas mean another speed")
    gaps = np.flatnonzero(inside & (np.abs(steps - middle) > 0.5 * middle))
    if len(gaps):
        starts = np.array([e.start for e in episodes])
        row = int(gaps[0]) + 1
        episode = episodes[int(np.searchsorted(starts, row, side="right")) - 1]
        notes.append(
            f"{len(gaps)} steps last {steps[gaps].min():.3g} to {steps[gaps].max():.3g} s instead of {middle:.3g} s, first "
            f"in episode {episode.index} step {row - episode.start}: frames were lost or doubled"
        )
    return measured, problems, notes


def _repeats(
    x: np.ndarray,
    states: np.ndarray | None,
    episodes: tuple[Span, ...],
    space: ActionSpace,
    kinds: list[str],
    skip_first: int,
) -> Iterator[str]:
    numbers = x if states is None else np.concatenate([x, np.asarray(states, dtype=np.float64)], axis=1)
    same = (numbers[1:] == numbers[:-1]).all(axis=1)
    same[[e.stop - 1 for e in episodes[:-1]]] = False
    if same.any():
        what = "actions" if states is None else "actions and states"
        yield f"{same.sum()} frames ({same.mean():.1%}) repeat the {what} of the frame before: idle, or recorded twice"
    moving = [
        i
        for i, kind in enumerate(kinds)
        if kind != "constant"
        and (kind == "delta" or space.delta[i])
        and (space.gripper is None or i != space.index(space.gripper.dim))
    ]
    if not moving:
        return
    small = 1e-3 * np.abs(x[:, moving]).max(axis=0)
    still = (np.abs(x[:, moving]) <= small).all(axis=1)
    first = np.mean([still[e.start] for e in episodes])
    if not skip_first and first > 0.8 and still.mean() < 0.5:
        yield f"{first:.0%} of the episodes begin with an action that moves nothing: pass --skip_first 1"
    if still.mean() > 0.1:
        yield f"{still.mean():.0%} of all actions move nothing: a policy learns to stand still; trim them"
    texts = [x[e.start : e.stop].tobytes() for e in episodes]
    if len(set(texts)) < len(texts):
        yield f"{len(texts) - len(set(texts))} episodes repeat the actions of another one, number by number"
