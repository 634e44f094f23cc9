"""What one dimension can reach, whether constraints leave anything of it, and why not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.language import OneDimensional
from hf_vla_actions.errors import InfeasibleConstraintError


@dataclass(frozen=True)
class Reach:
    """The values that one dimension can take, in real units.

    Args:
        space: meaning of the numbers.
        dim: index of the dimension.
        tokens: sorted different values of the dimension's tokens; None where no token grid is involved.
        grid: True if only values of tokens count, False if everything between them does (decoded values that are
            moved afterwards); a binary gripper has its states in either case.
    """

    space: ActionSpace
    dim: int
    tokens: np.ndarray | None
    grid: bool

    @property
    def states(self) -> tuple[float, ...]:
        """(open, closed) for the dimension of a binary gripper, else empty."""
        gripper = self.space.gripper
        if gripper is None or not gripper.binary or self.space.index(gripper.dim) != self.dim:
            return ()
        return float(gripper.open), float(gripper.closed)

    @property
    def bin_width(self) -> float | None:
        """Largest distance of neighboring token values; 0 for a binary gripper, None without a grid."""
        if self.tokens is None:
            return None
        return 0.0 if self.states or len(self.tokens) == 1 else float(np.diff(self.tokens).max())

    @property
    def half_bin(self) -> float:
        """Tolerance of constraints that name single values: half a bin on the grid, else 0."""
        return (self.bin_width or 0.0) / 2 if self.grid else 0.0

    @property
    def members(self) -> IntervalSet:
        """All values within reach. Off the grid that includes half a bin beyond the outermost token values."""
        if self.tokens is None:
            return IntervalSet.points(self.states) if self.states else IntervalSet.everything()
        if self.grid or not self.bin_width:
            return IntervalSet.points(self.tokens)
        half = self.bin_width / 2 * (1 + 1e-9)
        low, high = self.tokens[0] - half, self.tokens[-1] + half
        return IntervalSet.from_pairs([(low - 4 * np.spacing(abs(low)), high + 4 * np.spacing(abs(high)))])

    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value within reach."""
        members = self.members
        return float(members.lows[0]), float(members.highs[-1])

    def satisfying(self, constraints: Sequence[OneDimensional]) -> IntervalSet:
        """The values within reach that satisfy all constraints (of this dimension and step); may be empty."""
        members = self.members
        for constraint in sorted(constraints, key=lambda c: c.picks):
            members = constraint.narrow(members, self.half_bin)
        return members

    def steps_needed(self, wanted: float) -> str:
        """Why one step of a delta dimension cannot reach a value, and what to ask for instead; "" elsewhere."""
        low, high = self.bounds()
        furthest = high if wanted > 0 else low
        named = self.space.named and self.space.delta[self.dim] and not self.states
        if not named or not math.isfinite(furthest) or furthest * wanted <= 0 or abs(wanted) <= abs(furthest):
            return ""
        unit = f" {self.space.units[self.dim]}" if self.space.units[self.dim] else ""
        n = math.ceil(abs(wanted) / abs(furthest) - 1e-9)
        return (
            f"This dimension is a change per step and the reach of one step is {furthest:.6g}{unit}: {wanted:.6g}{unit} "
            f"needs at least {n} steps; ask for {wanted / n:.6g}{unit} in each of {n} steps, over chunks if the horizon "
            "is shorter"
        )

    def explain(
        self, sample: int, step: int, named: Sequence[tuple[str, OneDimensional]]
    ) -> InfeasibleConstraintError:
        """The error for constraints that leave nothing: names the one to blame, or the smallest set in conflict.

        Args:
            sample: index within the batch.
            step: index within the horizon.
            named: the constraints, each with its text as the user gave it.
        """
        alone = [pair for pair in named if self.satisfying([pair[1]]).is_empty]
        blamed = alone[:1] or self._smallest_conflict(named)
        wanted = [constraint.narrow(IntervalSet.everything(), 0.0) for _, constraint in blamed]
        nearest = self._nearest_to(wanted[0]) if alone else None
        return InfeasibleConstraintError(
            sample=sample,
            step=step,
            dim=self.space.describe(self.dim),
            names=tuple(text for text, _ in blamed),
            wanted=" and ".join(str(s) for s in wanted),
            reachable=self.bounds(),
            nearest=nearest,
            bin_width=self.bin_width or None,
            unit=self.space.units[self.dim],
            suggestion=self._suggestion(wanted[0], nearest)
            if alone
            else "Each can be satisfied alone: drop or relax one of them",
        )

    def _smallest_conflict(self, named: Sequence[tuple[str, OneDimensional]]) -> list[tuple[str, OneDimensional]]:
        """Leave out one after another as long as the rest still cannot hold: what remains is needed for the conflict."""
        active = list(named)
        for pair in named:
            rest = [other for other in active if other is not pair]
            if rest and self.satisfying([constraint for _, constraint in rest]).is_empty:
                active = rest
        return active

    def _nearest_to(self, wanted: IntervalSet) -> float | None:
        if wanted.is_empty:
            return None
        candidates = np.unique(np.append(self.members.lows, self.members.highs))
        candidates = candidates[np.isfinite(candidates)]
        if not len(candidates):
            return None
        return float(candidates[np.argmin(np.abs(wanted.nearest(candidates) - candidates))])

    def _suggestion(self, wanted: IntervalSet, nearest: float | None) -> str:
        if wanted.is_empty or nearest is None:
            return "No number satisfies it: check its bounds"
        if self.states:
            return f"A binary gripper is only ever open ({self.states[0]:g}) or closed ({self.states[1]:g})"
        if self.tokens is not None and len(self.tokens) == 1:
            return f"The dimension is constant in the statistics: every token means {nearest:.6g} and none can move it"
        low, high = self.bounds()
        if not wanted.intersect(IntervalSet.from_pairs([(low, high)])).is_empty:
            return "No token has a value there: allow at least one bin width, or use mode 'project'"
        return self.steps_needed(float(wanted.nearest(nearest))) or (
            "Choose values within reach; check that the numbers are in the unit of the action space, and the unnorm_key"
        )
