"""What coupled constraints come down to: a few kinds of terms over a whole chunk, each with its excess in real units.

The language (`coupled.py`) says what a user means; a term says what has to hold of the numbers. Everything that works
on chunks (the certificate, projection, reports, losses) knows these kinds and nothing of the language.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

TOUCH = 1e-12  # excess of a path that touches a zone without entering it


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of one sample when its chunk begins; made from `Context`.

    Args:
        pose: (dof,) where each dimension is now, NaN where unknown; None if nothing is known.
        last_action: (dof,) the action carried out last; None if unknown.
        held_steps: steps for which the gripper has kept its state; None if unknown.
    """

    pose: np.ndarray | None = None
    last_action: np.ndarray | None = None
    held_steps: int | None = None


@dataclass(frozen=True, eq=False)
class Change:
    """|x[t, dim] - x[t - 1, dim]| <= limit at some steps.

    Args:
        dim: index of the dimension.
        limits: (horizon,) largest change into each step; infinite where nothing is asked.
        last: value before the chunk; None where the first step is free.
    """

    dim: int
    limits: np.ndarray
    last: float | None

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions it speaks of."""
        return (self.dim,)

    def excess(self, chunks: np.ndarray) -> np.ndarray:
        """(n, horizon, dof) to (n, horizon): how much each change is too large."""
        x = chunks[:, :, self.dim]
        before = np.full((len(x), 1), np.nan if self.last is None else self.last)
        change = np.abs(np.diff(x, axis=1, prepend=before))
        change[:, 0] = 0.0 if self.last is None else change[:, 0]
        return np.maximum(change - self.limits, 0.0)


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """low[t] <= sum over dims of weight * f(x[t, dim]) <= high[t], of one step or summed up over the chunk.

    Args:
        dims: indices of the dimensions.
        weights: one a dimension.
        power: f: 1 the number itself, "abs" its absolute value, 2 its square; of squares the root is compared.
        low: (horizon,) bounds, -inf where there is none.
        high: (horizon,) bounds, inf where there is none.
        cumulative: sum over steps 0..t, plus `origin`, instead of step t alone.
        counted: (horizon,) bool: steps that enter a cumulative sum.
        origin: of a cumulative sum.
    """

    dims: tuple[int, ...]
    weights: np.ndarray
    power: int | str
    low: np.ndarray
    high: np.ndarray
    cumulative: bool = False
    counted: np.ndarray | None = None
    origin: float = 0.0

    def weigh(self, values: np.ndarray, i: int) -> np.ndarray:
        """weight * f(values) of the dimension `dims[i]`; any shape."""
        powers = values if self.power == 1 else np.abs(values) if self.power == "abs" else values * values
        return self.weights[i] * powers

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(horizon,) bounds of the sum itself, without origin and root, a few roundings inside the given ones.

        Sums differ in their last bits with the order of addition; what holds inside holds in every order. A cumulative
        sum that starts within its bounds may always stay at 0.
        """
        low, high = np.array(self.low, dtype=np.float64), np.array(self.high, dtype=np.float64)
        if self.power == 2:
            return np.where(low > 0, low**2 * (1 + 1e-13), -np.inf), high**2 * (1 - 1e-13)
        if not self.cumulative and len(self.dims) == 1 and self.power == 1 and self.weights[0] == 1.0:
            return low, high
        finite = np.concatenate([[self.origin], low[np.isfinite(low)], high[np.isfinite(high)]])
        margin = 64 * np.spacing(np.abs(finite).max())
        inner = low - self.origin + margin, high - self.origin - margin
        at_low, at_high = self.origin >= low, self.origin <= high
        return np.where(at_low, np.minimum(inner[0], 0.0), inner[0]), np.where(
            at_high, np.maximum(inner[1], 0.0), inner[1]
        )

    def sums(self, chunks: np.ndarray) -> np.ndarray:
        """(n, horizon, dof) to (n, horizon): the sums that `bounds` speaks of."""
        total = sum(self.weigh(chunks[:, :, d], i) for i, d in enumerate(self.dims))
        if self.cumulative:
            total = np.cumsum(total if self.counted is None else np.where(self.counted, total, 0.0), axis=1)
        return np.asarray(total)

    def excess(self, chunks: np.ndarray) -> np.ndarray:
        """(n, horizon, dof) to (n, horizon): how far each sum (its root, for squares) is outside its bounds."""
        total = self.sums(chunks)
        total = np.sqrt(total) if self.power == 2 else total + self.origin
        return np.maximum(np.maximum(self.low - total, total - self.high), 0.0)


@dataclass(frozen=True, eq=False)
class Zone:
    """A closed box that the path does not touch; a path runs straight from each position to the next.

    Args:
        dims: indices of the dimensions, one to three.
        low: (n,) corner of the box, margin included.
        high: (n,) corner of the box, margin included.
        origin: (n,) position before the chunk.
        delta: (n,) bool: the dimension is a change of position (summed up), else the position itself.
        steps: (horizon,) bool: steps whose piece of the path counts.
    """

    dims: tuple[int, ...]
    low: np.ndarray
    high: np.ndarray
    origin: np.ndarray
    delta: np.ndarray
    steps: np.ndarray

    def path(self, chunks: np.ndarray) -> np.ndarray:
        """(n, horizon, dof) to positions (n, horizon + 1, len(dims)), the one before the chunk first."""
        moves = chunks[:, :, list(self.dims)]
        positions = np.where(self.delta, self.origin + np.cumsum(moves, axis=1), moves)
        return np.concatenate([np.broadcast_to(self.origin, (len(moves), 1, len(self.dims))), positions], axis=1)

    def excess(self, chunks: np.ndarray) -> np.ndarray:
        """(n, horizon, dof) to (n, horizon): how deep each piece of the path is inside the box."""
        path = self.path(chunks)
        start, end = path[:, :-1], path[:, 1:]
        with np.errstate(divide="ignore", invalid="ignore"):
            first, second = (self.low - start) / (end - start), (self.high - start) / (end - start)
        still = end == start
        within = (start >= self.low) & (start <= self.high)
        enter = np.where(still, np.where(within, 0.0, 2.0), np.minimum(first, second)).max(axis=-1)
        leave = np.where(still, np.where(within, 1.0, -1.0), np.maximum(first, second)).min(axis=-1)
        enter, leave = np.maximum(enter, 0.0), np.minimum(leave, 1.0)
        hit = (enter <= leave) & self.steps
        middle = start + (np.where(hit, enter + leave, 0.0) / 2)[..., None] * (end - start)
        depth = [np.minimum(p - self.low, self.high - p).min(axis=-1) for p in (middle, end)]
        return np.where(hit, np.maximum(np.maximum(*depth), TOUCH), 0.0)


@dataclass(frozen=True, eq=False)
class Hold:
    """A gripper that keeps each state for a while and changes it a few times at most.

    Args:
        dim: index of the gripper's dimension.
        open: value of the open gripper.
        closed: value of the closed gripper.
        min_hold: steps for which a state is kept once taken.
        max_switches: changes of state within a chunk; None for any number.
        last: value before the chunk.
        held: steps for which that state had been kept; a large number if unknown.
        hysteresis: a change needs at least this probability of the other state; None for none. It is no property of
            a chunk and enters no excess.
    """

    dim: int
    open: float
    closed: float
    min_hold: int
    max_switches: int | None
    last: float
    held: int
    hysteresis: float | None = None

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions it speaks of."""
        return (self.dim,)

    def is_open(self, values) -> np.ndarray:
        """State of each value: the nearer one, halfway counts as open."""
        values = np.asarray(values)
        return np.abs(values - self.open) <= np.abs(values - self.closed)

    def excess(self, chunks: np.ndarray) -> np.ndarray:
        """(n, horizon, dof) to (n, horizon): 1 at every change of state that comes too early or is one too many."""
        states = self.is_open(chunks[:, :, self.dim])
        before = np.full(len(states), bool(self.is_open(self.last)))
        held, switches = np.full(len(states), self.held), np.zeros(len(states), dtype=int)
        out = np.zeros(states.shape)
        for t in range(states.shape[1]):
            change = states[:, t] != before
            switches = switches + change
            many = switches > self.max_switches if self.max_switches is not None else np.zeros_like(change)
            out[:, t] = change & ((held < self.min_hold) | many)
            held, before = np.where(change, 1, held + 1), states[:, t]
        return out


@dataclass(frozen=True, eq=False)
class Predicate:
    """A function of whole chunks that says which are allowed.

    Args:
        function: (n, horizon, dof) float64 array in real units to (n,) bool.
        backup: (horizon, dof) actions to fall back on, NaN where the brake is meant; None for the brake.
        name: for messages.
        dims: all dimensions.
    """

    function: Callable[[np.ndarray], np.ndarray]
    backup: np.ndarray | None
    name: str
    dims: tuple[int, ...] = field(default=())

    def excess(self, chunks: np.ndarray) -> np.ndarray:
        """(n, horizon, dof) to (n, horizon): 1 at the last step of a chunk that is not allowed."""
        out = np.zeros(chunks.shape[:2])
        out[:, -1] = ~np.asarray(self.function(chunks), dtype=bool)
        return out


@dataclass(frozen=True, eq=False)
class Pull:
    """A wanted total of one dimension over the chunk: nats for the next step, it excludes nothing.

    Args:
        dim: index of the dimension.
        counted: (horizon,) bool: steps that count towards the total.
        total: wanted sum, real units.
        sigma: standard deviation of the total around it, real units.
        weight: factor of the pull.
    """

    dim: int
    counted: np.ndarray
    total: float
    sigma: float
    weight: float = 1.0

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions it speaks of."""
        return (self.dim,)

    def nats(self, values: np.ndarray, steps_left: int, total_so_far: np.ndarray) -> np.ndarray:
        """The pull on each value of a counted step: a Brownian bridge from what is done to the total.

        Args:
            values: (K,) values the step may take, real units.
            steps_left: counted steps that are left, this one included.
            total_so_far: (n,) sum of the counted steps before this one.

        Returns:
            (n, K) nats, finite also in float32.
        """
        share = (self.total - np.asarray(total_so_far, dtype=np.float64)) / steps_left
        with np.errstate(over="ignore"):
            pull = -self.weight * steps_left * ((values - share[:, None]) / self.sigma) ** 2 / 2
        return np.maximum(pull, -1e30)


Term = Change | WeightedSum | Zone | Hold | Predicate
