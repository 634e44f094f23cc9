"""Why coupled constraints cannot be met from here: the step, what is wanted, what could be reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_vla_actions.constraints.terms import Change, Hold, Known, Predicate, Term, WeightedSum, Zone
from hf_vla_actions.errors import InfeasibleConstraintError

if TYPE_CHECKING:
    from hf_vla_actions.constraints.base import Constraint
    from hf_vla_actions.constraints.binder import Binder
    from hf_vla_actions.constraints.branch import Branch

NOT_PROVEN = "No certified completion was found; that none exists is not proven"


def explain_start(
    binder: Binder, sample: int, guilty: Sequence[Constraint], known: Known
) -> InfeasibleConstraintError:
    """The error for a smallest set of constraints that has no certified completion from here.

    Args:
        binder: of the robot.
        sample: index within the batch.
        guilty: the constraints; without any one of them the others can hold.
        known: where the robot is.
    """
    try:
        ways = binder.ways(guilty, known)
        branch = binder.branch(sample, ways[0], known)
    except InfeasibleConstraintError as error:
        return error
    step, dim, term = _where(branch)
    low, high = binder.reaches[dim].bounds()
    wanted, nearest, proven = "a chunk that satisfies it", None, False
    many = len(guilty) > 1
    advice = "Relax or drop one of them" if many else "Relax it, or start from another pose or action"
    if isinstance(term, WeightedSum):
        (low, high), bounds = _range_of(term, branch, step)
        wanted = _text_of(*bounds)
        nearest = high if bounds[0] > high else low if bounds[1] < low else None
        proven = nearest is not None
    elif isinstance(term, Change):
        before = f" from {term.last:.6g}" if step == 0 and term.last is not None else ""
        wanted = f"a change of at most {term.limits[step]:.6g}{before}"
        if step == 0 and term.last is not None and not branch.laws.viable(0, dim).is_empty:
            nearest = float(branch.laws.viable(0, dim).nearest(np.array([term.last]))[0])
            proven = abs(nearest - term.last) > term.limits[0]
    elif isinstance(term, Predicate):
        wanted = f"a chunk that {term.name} allows"
    elif isinstance(term, Hold):
        wanted = "changes of the gripper that come neither too early nor too often"
    elif isinstance(term, Zone):
        corners = ", ".join(f"{a:.4g}..{b:.4g}" for a, b in zip(term.low, term.high, strict=True))
        here = ", ".join(f"{a:.4g}" for a in term.origin)
        wanted = f"a path from ({here}) that stays out of ({corners})"
        inside = ((term.origin >= term.low) & (term.origin <= term.high)).all()
        advice = "It starts inside: move out first, or make the zone or its margin smaller" if inside else advice
        proven = bool(inside and term.steps[0])
    proven = proven or branch.laws.moves.empty is not None  # going backward through sets and rates misses nothing
    proven = proven and len(ways) == 1  # of alternatives only the first is looked at here
    return InfeasibleConstraintError(
        sample=sample,
        step=step,
        dim=binder.space.describe(dim),
        names=tuple(str(constraint) for constraint in guilty),
        wanted=wanted,
        reachable=(low, high),
        nearest=nearest,
        bin_width=binder.reaches[dim].bin_width or None,
        unit=None if isinstance(term, (Predicate, Hold)) else binder.space.units[dim],
        suggestion=advice if proven else f"{NOT_PROVEN}. {advice}",
    )


def _text_of(low: float, high: float) -> str:
    if np.isinf(low):
        return f"at most {high:.6g}"
    return f"at least {low:.6g}" if np.isinf(high) else f"[{low:.6g}, {high:.6g}]"


def _where(branch: Branch) -> tuple[int, int, Term | None]:
    """Step, dimension and term where braking goes wrong first."""
    if branch.laws.moves.empty is not None:
        step, dim = branch.laws.moves.empty
        return step, dim, next((t for t in branch.terms if isinstance(t, Change) and t.dim == dim), None)
    chunk = branch.laws.complete(0, np.zeros((1, branch.laws.horizon, branch.laws.dof)), 0, 0)
    found = []
    for term in branch.terms:
        excess = term.excess(chunk)[0]
        if excess.any():
            found.append((int(np.argmax(excess > 0)), int(term.dims[0]) if term.dims else 0, term))
    return min(found, key=lambda entry: entry[0]) if found else (0, int(branch.terms[0].dims[0]), branch.terms[0])


def _range_of(term: WeightedSum, branch: Branch, step: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Smallest and largest sum that single dimensions could reach at a step, and the bounds of the term there."""
    low, high = np.zeros(step + 1), np.zeros(step + 1)
    for i, d in enumerate(term.dims):
        for t in range(step + 1):
            members = branch.laws.viable(t, d)
            start, change = branch.laws.start[d], branch.laws.moves.limits[: t + 1, d].sum()
            low_end, high_end = members.lows[0], members.highs[-1]
            if np.isfinite(start) and np.isfinite(change):  # what the rate limits leave, at the outside
                low_end, high_end = max(low_end, start - change), min(high_end, start + change)
            ends = np.array([low_end, high_end, np.clip(0.0, low_end, max(low_end, high_end))])
            amounts = term.weigh(ends, i)
            low[t] += amounts.min()
            high[t] += amounts.max()
    counted = np.ones(step + 1, dtype=bool) if term.counted is None else term.counted[: step + 1]
    span = (low[counted].sum(), high[counted].sum()) if term.cumulative else (low[step], high[step])
    reach = (float(np.sqrt(max(end, 0.0))) if term.power == 2 else float(end + term.origin) for end in span)
    return (next(reach), next(reach)), (float(term.low[step]), float(term.high[step]))
