"""The constraint language on FAST tokens: what of it can be kept while they are decoded, and what only afterwards.

A chunk is linear in its coefficients, so whatever bounds weighted sums over the steps of one dimension can be kept by
`FASTLogitsProcessor`: values, changes from step to step, positions, totals. The rest (several dimensions at once, sets
with gaps, boxes to keep out of, alternatives, functions) is left to the projection of the decoded chunk, and so is what
no constant chunk keeps: decoding always has one to fall back on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hf_vla_actions.actions import ActionSpace, ActionStats, Gripper
from hf_vla_actions.constraints import BoundConstraints, Constraint, Context, IntervalSet
from hf_vla_actions.constraints.base import Part
from hf_vla_actions.constraints.language import OneDimensional
from hf_vla_actions.constraints.terms import Change, WeightedSum
from hf_vla_actions.decoding.fast_box import Sums, constants
from hf_vla_actions.decoding.fast_limits import first_coefficients, line
from hf_vla_actions.decoding.fast_states import build
from hf_vla_actions.decoding.kept import KeptWhile, hard_parts
from hf_vla_actions.tokenizers import FASTActionTokenizer

ROUNDING = 2.0**-46  # of a sum, relative to what of it does not depend on tokens
GAPS = "it leaves values with gaps between them, and every token moves the whole chunk"
COUPLED = "it speaks of more than weighted sums over the steps of one dimension"
SETTLED = "a binary gripper gets its state after decoding"
PICKS = "it chooses among what the other constraints leave"
NO_BACKUP = "no constant {dim}, which decoding could fall back on, keeps it together with the rest"
OFF_GRID = "{dim} sums up in steps of {step:.3g}, none of which it allows; decoded next to it"


@dataclass(frozen=True, eq=False)
class FASTLimits:
    """Constraints as `FASTLogitsProcessor` takes them; S samples (1 if all share them).

    Args:
        lower: (S, horizon, dof) normalized, -inf where there is none; None where no dimension has limits.
        upper: (S, horizon, dof), likewise.
        dc_ranges: (S, dof, 2) int64, or None where no total is limited.
        sums: limits on other sums over steps, or None.
        kept: for each sample, what these limits keep of its constraints.
    """

    lower: np.ndarray | None
    upper: np.ndarray | None
    dc_ranges: np.ndarray | None
    sums: Sums | None
    kept: tuple[KeptWhile, ...]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `FASTLogitsProcessor`."""
        return {name: getattr(self, name) for name in ("lower", "upper", "dc_ranges", "sums")}


class Bound(NamedTuple):
    """low <= weights @ (actions of one dimension) <= high; weights (horizon,), real units."""

    dim: int
    weights: np.ndarray
    low: float
    high: float


def fast_limits(
    bound: BoundConstraints,
    tokenizer: FASTActionTokenizer,
    stats: ActionStats,
    *,
    context: Context | None = None,
    beyond: float = 0.0,
    strict: bool = False,
) -> FASTLimits:
    """What of some constraints can be kept while FAST tokens are decoded.

    A constraint is kept as far as a constant chunk keeps it together with those before it. The total of a dimension has
    steps (see `sum_ranges`); where none of them is allowed, the nearest one is decoded and the rest is left to projection.

    A dimension without limits is left alone: the certificate would refuse encodings that are fine, because the first
    frequencies of a sudden change overshoot what the whole chunk then does.

    Args:
        bound: the constraints of one robot; samples that are told to hold get no limits.
        tokenizer: of the policy.
        stats: what un-normalizes its chunks.
        context: what the robot knows; the one given to `bind`.
        beyond: how far values of a chunk may exceed [-1, 1] because of rounding; limited dimensions do so no further, so
            that nothing has to be clipped, which would change their sums.
        strict: all dimensions stay that far within [-1, 1].
    """
    samples = []
    for s in range(bound.n_samples):
        one = _Sample(bound.space, bound.horizon, tokenizer, stats, beyond)
        one.limited |= set(range(bound.space.dof)) if strict else set()
        for constraint, parts, soft in hard_parts(bound, s, context):
            one.take(constraint, parts, soft)
        samples.append(one)
    return _stacked(samples, bound.horizon)


def bounds_of(part: Part, space: ActionSpace, horizon: int) -> list[Bound] | str:
    """What one hard part of a constraint asks of weighted sums over steps, or why it cannot be said so.

    Args:
        part: what `Constraint.expand` returned.
        space: meaning of the numbers.
        horizon: actions in a chunk.
    """
    gripper = space.gripper
    switch = None if gripper is None or not gripper.binary else space.index(gripper.dim)
    if isinstance(part, OneDimensional):
        if part.picks:
            return PICKS
        dim, members = int(part.dim), part.narrow(IntervalSet.everything(), 0.0)
        if dim == switch:
            members = _before_settling(members, gripper)  # type: ignore[arg-type]
        if len(members.pairs) != 1:
            return GAPS
        low, high = members.pairs[0].tolist()
        return [Bound(dim, np.eye(horizon)[t], low, high) for t in part.steps_in(horizon)]
    if isinstance(part, Change) and part.dim != switch:
        return _changes(part, horizon)
    if isinstance(part, WeightedSum) and len(part.dims) == 1 and part.power == 1 and part.dims[0] != switch:
        return _sums(part, horizon)
    return SETTLED if isinstance(part, (Change, WeightedSum)) and switch in part.dims else COUPLED


def _before_settling(members: IntervalSet, gripper: Gripper) -> IntervalSet:
    """The numbers that become an allowed state of a binary gripper; those at its threshold count as open."""
    edge = gripper.middle if gripper.threshold is None else gripper.threshold
    open_side, closed_side = (edge, math.inf), (-math.inf, float(np.nextafter(edge, -math.inf)))
    if gripper.open < gripper.closed:
        open_side, closed_side = (-math.inf, edge), (float(np.nextafter(edge, math.inf)), math.inf)
    sides = ((gripper.open, open_side), (gripper.closed, closed_side))
    return IntervalSet.from_pairs([side for state, side in sides if members.contains(state)])


def _changes(part: Change, horizon: int) -> list[Bound]:
    eye = np.eye(horizon)
    found = []
    for t in np.flatnonzero(np.isfinite(part.limits)).tolist():
        limit = float(part.limits[t])
        if t:
            found.append(Bound(part.dim, eye[t] - eye[t - 1], -limit, limit))
        elif part.last is not None:
            found.append(Bound(part.dim, eye[0], part.last - limit, part.last + limit))
    return found


def _sums(part: WeightedSum, horizon: int) -> list[Bound]:
    rows = np.tri(horizon) if part.cumulative else np.eye(horizon)
    if part.cumulative and part.counted is not None:
        rows = rows * part.counted
    (low, high), weight = part.bounds, float(part.weights[0])
    limited = np.flatnonzero(np.isfinite(low) | np.isfinite(high)).tolist()
    return [Bound(part.dims[0], weight * rows[t], float(low[t]), float(high[t])) for t in limited]


class _Sample:
    """The limits of one sample, and what they keep, as one constraint after another is taken in."""

    def __init__(
        self, space: ActionSpace, horizon: int, tokenizer: FASTActionTokenizer, stats: ActionStats, beyond: float
    ):
        self.space, self.horizon, self.tokenizer = space, horizon, tokenizer
        self.reach, self.limit = 1.0 + beyond, tokenizer.limit(horizon)
        self.middle, self.half = line(stats, horizon)
        self.grain = math.sqrt(horizon) / tokenizer.scale  # of a sum of normalized values
        self.rows = {row.tobytes(): row for row in np.eye(horizon)}
        self.ranges: list[tuple[int, int]] = [(-self.limit, self.limit)] * space.dof
        self.limits: list[dict[bytes, tuple[float, float]]] = [
            {key: (-self.reach, self.reach) for key in self.rows} for _ in range(space.dof)
        ]
        self.limited: set[int] = set()
        self.decoding: list[str] = []
        self.afterwards: list[tuple[str, str]] = []
        self.without_effect: list[str] = []

    @property
    def kept(self) -> KeptWhile:
        """What the limits keep."""
        return KeptWhile(tuple(self.decoding), tuple(self.afterwards), tuple(self.without_effect))

    def take(self, constraint: Constraint, hard: Sequence[Part], soft: bool) -> None:
        """Limit whatever keeps a constraint, given by its hard parts, as far as that is possible."""
        wanted: list[Bound] = []
        reasons: list[str] = []
        if soft:
            self.without_effect.append(str(constraint))
        for part in hard:
            found = bounds_of(part, self.space, self.horizon)
            if isinstance(found, str):
                reasons.append(found)
            else:
                wanted += found
        for dim in sorted({one.dim for one in wanted}):
            reasons += self._limit(dim, [one for one in wanted if one.dim == dim])
        if hard and reasons:
            self.afterwards.append((str(constraint), "; ".join(dict.fromkeys(reasons))))
        elif hard:
            self.decoding.append(str(constraint))

    def _limit(self, dim: int, wanted: Sequence[Bound]) -> list[str]:
        """Take bounds of one dimension in, if a constant keeps them; else say why not."""
        limits, ranges, reasons, vacuous = dict(self.limits[dim]), self.ranges[dim], [], True
        for one in wanted:
            row, low, high = self._normalized(one)
            if row is None or (low <= -self._most(row) and high >= self._most(row)):
                continue  # every chunk within reach keeps it
            vacuous = False
            if (row == 1.0).all():
                first, last = first_coefficients(low, high, self.grain, self.limit)
                if max(first, ranges[0]) > min(last, ranges[1]):
                    step = self.grain * abs(self.half[0, dim])
                    reasons.append(OFF_GRID.format(dim=self.space.describe(dim), step=step))
                    aim = (max(low, -self._most(row)) + min(high, self._most(row))) / 2 / self.grain
                    first = last = int(np.clip(round(aim), *ranges))
                ranges = max(first, ranges[0]), min(last, ranges[1])
                continue
            key = row.tobytes()
            self.rows.setdefault(key, row)
            before = limits.get(key, (-math.inf, math.inf))
            limits[key] = max(low, before[0]), min(high, before[1])
        if not self._has_constant(limits, ranges):
            return [NO_BACKUP.format(dim=self.space.describe(dim))]
        if not vacuous:
            self.limits[dim], self.ranges[dim] = limits, ranges
            self.limited.add(dim)
        return reasons

    def _normalized(self, one: Bound) -> tuple[np.ndarray | None, float, float]:
        """A row of weights (largest 1, first positive) and its normalized bounds; None where nothing can change it."""
        weights = one.weights * self.half[:, one.dim]
        size = np.abs(weights).max()
        if size == 0:
            return None, -math.inf, math.inf
        size = size * np.sign(weights[np.flatnonzero(weights)[0]])
        still = float(one.weights @ self.middle[:, one.dim])
        low, high = sorted(((one.low - still) / size, (one.high - still) / size))
        slip = ROUNDING * abs(still / size)
        return weights / size + 0.0, low + slip, high - slip  # + 0.0: -0.0 has other bytes

    def _most(self, row: np.ndarray) -> float:
        return self.reach * float(np.abs(row).sum())

    def _has_constant(self, limits: dict[bytes, tuple[float, float]], ranges: tuple[int, int]) -> bool:
        weights = np.stack([self.rows[key] for key in limits])
        low, high = np.array(list(limits.values())).T
        automaton = build(self.tokenizer, self.limit)
        return bool(len(constants(weights, low, high, ranges, self.tokenizer, automaton)))


def _stacked(samples: Sequence[_Sample], horizon: int) -> FASTLimits:
    """The limits of all samples, on the rows that any of them has."""
    rows: dict[bytes, np.ndarray] = {}
    for one in samples:
        for limits in one.limits:
            rows |= {key: one.rows[key] for key in limits}
    low, high = np.full((2, len(samples), len(rows), len(samples[0].limits)), [[[[-math.inf]]], [[[math.inf]]]])
    place = {key: r for r, key in enumerate(rows)}
    for s, one in enumerate(samples):
        for dim in one.limited:
            at = [place[key] for key in one.limits[dim]]
            low[s, at, dim], high[s, at, dim] = np.array(list(one.limits[dim].values())).T
    limit = samples[0].limit
    ranges = np.array([one.ranges for one in samples], dtype=np.int64)
    sums = None
    if len(rows) > horizon:
        sums = Sums(np.stack(list(rows.values()))[horizon:], low[:, horizon:], high[:, horizon:])
    free = not any(one.limited for one in samples)
    return FASTLimits(
        None if free else low[:, :horizon],
        None if free else high[:, :horizon],
        None if (ranges == [-limit, limit]).all() else ranges,
        sums,
        tuple(one.kept for one in samples),
    )
