"""Moving decoded chunks into what is allowed: as little as possible, and with a guarantee.

First the nearest chunk within everything convex, then the certificate walk for what is still outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.constraints.allowed import Allowed
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.nearest import CLOSE, Nearest
from hf_vla_actions.constraints.terms import Term, WeightedSum
from hf_vla_actions.constraints.walk import Completing, Walk
from hf_vla_actions.errors import ConstraintError

STYLES = ("axis", "direction")
DRAWN = (1e-6, 1e-5, 1e-4, 1e-3)  # how far a chunk that is just outside is drawn inside
ALIKE = 3.0  # the widest bound over the narrowest one of a translation up to which they limit the length of its steps
SINGLE_VALUES = 2  # a set of more single values than this is a grid: solved as if values between them were allowed


def project_chunks(
    chunks: np.ndarray,
    sets: Mapping[tuple[int, int], IntervalSet],
    terms: Sequence[Term],
    laws: Completing,
    space: ActionSpace,
    style: str = "axis",
) -> np.ndarray:
    """Move chunks of one sample into the allowed set.

    Args:
        chunks: (n, horizon, dof) finite numbers in real units; a binary gripper is in one of its two states.
        sets: values that constraints leave, for the (step, dim) that have any.
        terms: coupled constraints.
        laws: ways of completing a beginning of a chunk; one of them must lead from the start to an allowed chunk.
        space: meaning of the numbers.
        style: "axis": as close to the given chunk as possible; "direction": first the translation (and likewise the
            rotation) of each step is shortened as a whole to the limits on its length, so that it keeps its direction;
            then as close to that as possible, so that steps slide along walls.

    Returns:
        float64 of the same shape, a new array. Every number is in its set and no term has any excess, exactly. A
        chunk that is allowed already is returned bit by bit. Each chunk is moved without regard to the others.

    Raises:
        ConstraintError: an unknown style, or no law leads from the start to an allowed chunk.
    """
    if style not in STYLES:
        raise ConstraintError(f"style is one of {list(STYLES)}, got {style!r}")
    out = np.array(chunks, dtype=np.float64)
    allowed = Allowed(sets, terms)
    rows = np.flatnonzero(~allowed.exactly(out))
    if len(rows) and style == "direction":
        out[rows] = _shortened(out[rows], sets, terms, space)
        rows = rows[~allowed.exactly(out[rows])]
    if not len(rows):
        return out
    task = _Task(out[rows], allowed, terms, laws, space)
    wanted = task.by_axis()
    left = ~allowed.safely(wanted)
    out[rows[~left]] = wanted[~left]
    if left.any():
        out[rows[left]] = Walk(wanted[left], allowed, laws, [[d] for d in range(space.dof)], task.switches).run()
    return out


def _shortened(
    chunks: np.ndarray, sets: Mapping[tuple[int, int], IntervalSet], terms: Sequence[Term], space: ActionSpace
) -> np.ndarray:
    """Chunks whose steps are scaled down to the limits on their length, translation and rotation each as a whole.

    Limits on the length are norms, and bounds on every dimension of the translation (or rotation) that are alike; of
    two bounds around 0 the wider one, for the nearer one may be a wall, along which the step slides later. A bound on
    one dimension alone, such as a rail, says nothing about the others.
    """
    gripper = None if space.gripper is None else space.index(space.gripper.dim)
    units = [space.units[d] if space.delta[d] and d != gripper else None for d in range(space.dof)]
    longest = np.full(chunks.shape[1:], np.inf)
    for (t, d), members in sets.items():
        if not members.is_empty and members.lows[0] <= 0 <= members.highs[-1]:
            longest[t, d] = max(-members.lows[0], members.highs[-1])
    out = chunks.copy()
    for group in ([d for d, u in enumerate(units) if u == unit] for unit in ("m", "rad")):
        with np.errstate(divide="ignore", invalid="ignore"):
            here = longest[:, group]
            alike = (here.max(axis=1, initial=0) <= ALIKE * here.min(axis=1, initial=np.inf)) & np.isfinite(here).all(
                1
            )
            factors = [np.where(alike[:, None], here, np.inf) / np.abs(chunks[:, :, group])]
            for term in terms:
                norm = isinstance(term, WeightedSum) and term.power != 1 and not term.cumulative
                if norm and set(term.dims) <= set(group):  # type: ignore[union-attr]
                    share = term.bounds[1] / term.sums(chunks)  # type: ignore[union-attr]
                    factors.append((np.sqrt(share) if term.power == 2 else share)[..., None])  # type: ignore[union-attr]
        factor = np.nan_to_num(np.concatenate(factors, axis=2), nan=np.inf, posinf=np.inf).min(axis=2, initial=1.0)
        out[:, :, group] = np.where(
            factor[..., None] < 1.0, chunks[:, :, group] * factor[..., None], chunks[:, :, group]
        )
    return out


class _Task:
    """The chunks (n, horizon, dof) of one call that are not allowed, and what is nearest to them within everything convex."""

    def __init__(
        self, chunks: np.ndarray, allowed: Allowed, terms: Sequence[Term], laws: Completing, space: ActionSpace
    ):
        self.chunks, self.allowed, self.laws = chunks, allowed, laws
        self.convex = Nearest(terms, *chunks.shape[1:])
        gripper = space.gripper
        dim = None if gripper is None else space.index(gripper.dim)
        self.switches = [dim] if gripper is not None and dim is not None and gripper.binary else []
        self.cells = self._find_cells()
        self.starts: dict[int, np.ndarray] = {}  # what each law makes of the start, once it is asked for

    def _find_cells(self) -> list[tuple[IntervalSet, np.ndarray, np.ndarray]]:
        """What each (step, dim) can be at all: different sets, each with its steps and dims."""
        places: dict[bytes, tuple[IntervalSet, list[tuple[int, int]]]] = {}
        low, high = self.convex.local
        for t, d in np.ndindex(low.shape):
            members = self.laws.viable(t, d)
            if np.isfinite(low[t, d]) or np.isfinite(high[t, d]):
                near = np.clip(members.nearest(np.clip(0.0, low[t, d], high[t, d])), low[t, d], high[t, d])
                if members.contains(near):  # else the walk has to find out
                    members = members.intersect(IntervalSet.from_pairs([(low[t, d], high[t, d])]))
            places.setdefault(members.pairs.tobytes(), (members, []))[1].append((t, d))
        return [(members, *np.array(cells).T) for members, cells in places.values()]

    def nearest(self, chunks: np.ndarray) -> np.ndarray:
        """The nearest member for each number (n, horizon, dof)."""
        out = np.array(chunks)
        for members, steps, dims in self.cells:
            out[:, steps, dims] = members.nearest(chunks[:, steps, dims])
        return out

    def _intervals(self, near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the interval that each member (n, horizon, dof) is in; of a grid, of all its values."""
        low, high = np.empty_like(near), np.empty_like(near)
        for members, steps, dims in self.cells:
            if len(members.pairs) > SINGLE_VALUES and (members.lows == members.highs).all():
                low[:, steps, dims], high[:, steps, dims] = members.lows[0], members.highs[-1]
                continue
            at = np.searchsorted(members.lows, near[:, steps, dims], side="right") - 1
            low[:, steps, dims], high[:, steps, dims] = members.lows[at], members.highs[at]
        for d in self.switches:
            low[:, :, d] = high[:, :, d] = near[:, :, d]
        return low, high

    def by_axis(self) -> np.ndarray:
        """The nearest chunks within everything convex, numbers that need not move at all as they were."""
        near = self.nearest(self.chunks)
        if self.convex.is_trivial:
            return near
        left = np.flatnonzero(~self.allowed.safely(near))
        if not len(left):
            return near
        solved = self.nearest(self.convex.solve(self.chunks[left], *self._intervals(near[left])))
        moved = np.abs(solved - self.chunks[left]).max(axis=(1, 2), keepdims=True)
        kept = np.where(np.abs(solved - near[left]) <= 2 * CLOSE * moved, near[left], solved)
        fine = self.allowed.safely(kept)
        near[left] = np.where(fine[:, None, None], kept, solved)
        return self._other_sides(self._drawn_back(near))

    def _completion(self, law: int, chunks: np.ndarray) -> np.ndarray:
        """What a law makes of the start, the gripper as in `chunks`."""
        if law not in self.starts:
            self.starts[law] = self.laws.complete(law, chunks[:1], 0, 0)
        completion = np.repeat(self.starts[law], len(chunks), axis=0)
        completion[:, :, self.switches] = chunks[:, :, self.switches]
        return completion

    def _other_sides(self, chunks: np.ndarray) -> np.ndarray:
        """Where the nearest sides of gaps do not go together: the nearest chunk on the sides that some law takes."""
        out, left = chunks.copy(), np.flatnonzero(~self.allowed.safely(chunks))
        gaps = any(
            len(members.pairs) > 1 and not np.isin(dims, self.switches).all() for members, _, dims in self.cells
        )
        shortest = np.full(len(left), np.inf)
        for law in range(self.laws.n_laws if gaps and len(left) else 0):
            inside = self.nearest(self._completion(law, chunks[left]))
            solved = self._drawn_back(self.nearest(self.convex.solve(self.chunks[left], *self._intervals(inside))))
            way = np.linalg.norm((solved - self.chunks[left]).reshape(len(left), -1), axis=1)
            closer = self.allowed.safely(solved) & (way < shortest)
            out[left[closer]], shortest[closer] = solved[closer], way[closer]
        return out

    def _drawn_back(self, chunks: np.ndarray) -> np.ndarray:
        """Chunks that are just outside, drawn toward a completion inside until they are in; others as they are."""
        out = chunks.copy()
        for law in range(self.laws.n_laws):
            left = np.flatnonzero(~self.allowed.safely(out))
            if not len(left):
                break
            inside = self._completion(law, chunks[left])
            for share in DRAWN:
                tried = chunks[left] + share * (inside - chunks[left])
                tried = np.where(chunks[left] == inside, inside, tried)
                fine = self.allowed.safely(tried) & (out[left] == chunks[left]).all(axis=(1, 2))
                out[left[fine]] = tried[fine]
        return out
