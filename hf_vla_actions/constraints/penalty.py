"""What each next code would cost: squared excess over constraints, for soft constraints and for losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hf_vla_actions.constraints.terms import TOUCH, Change, Hold, Pull, Term, WeightedSum, Zone


class Prefix:
    """What is decided, in real units.

    Args:
        codes: (R, t * dof + d) codes.
        values: (dof, K) real value of each code.
        samples: (R,) sample of each row.
    """

    def __init__(self, codes: torch.Tensor, values: torch.Tensor, samples: torch.Tensor):
        dof = len(values)
        self.samples, self.table = samples, values
        self.t, self.d = divmod(codes.shape[1], dof)
        taken = values[torch.arange(codes.shape[1], device=codes.device) % dof, codes]
        self.before = taken[:, : self.t * dof].view(len(codes), self.t, dof)
        self.now = taken[:, self.t * dof :]  # (R, d)
        self.next = values[self.d]  # (K,)

    def at(self, dim: int) -> torch.Tensor:
        """(R or 1, 1 or K) value of a dimension at the present step; of the present one all its codes."""
        return self.next[None] if dim == self.d else self.now[:, dim, None]


def squared_excess(terms: Sequence[Term], prefix: Prefix) -> torch.Tensor | None:
    """Squared excess (R or 1, K) that each next code adds to one constraint; None if the code has no say in it.

    Sums and zones are charged when their last dimension of a step is decided; norms grow with each dimension, and
    each is charged for what it adds.

    Args:
        terms: the constraint for each sample; they differ in numbers only.
        prefix: what is decided.
    """
    one = terms[0]
    if prefix.d not in one.dims:
        return None
    if isinstance(one, Change):
        return _change(terms, prefix)  # type: ignore[arg-type]
    if isinstance(one, WeightedSum):
        return _sum(terms, prefix)  # type: ignore[arg-type]
    if isinstance(one, Zone):
        return _zone(terms, prefix) if prefix.d == max(one.dims) else None  # type: ignore[arg-type]
    if isinstance(one, Hold):
        return _hold(terms, prefix)  # type: ignore[arg-type]
    return None  # a predicate says yes or no to whole chunks, which has no slope


def pull_nats(pulls: Sequence[Pull], prefix: Prefix) -> torch.Tensor | None:
    """Nats (R, K) of a soft sum over the chunk (Brownian bridge from what is summed up so far); None elsewhere."""
    one = pulls[0]
    if prefix.d != one.dim or not one.counted[prefix.t]:
        return None
    left = int(one.counted[prefix.t :].sum())
    counted = _tensor(one.counted[: prefix.t], prefix)
    total = torch.where(counted, prefix.before[:, :, one.dim], 0.0).sum(dim=1)
    goal, sigma, weight = (
        _tensor([getattr(pull, name) for pull in pulls], prefix)[prefix.samples]
        for name in ("total", "sigma", "weight")
    )
    off = prefix.next[None] - ((goal - total) / left)[:, None]
    return -(weight / sigma**2)[:, None] * off**2 * left / 2


def _tensor(values, prefix: Prefix) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), device=prefix.table.device)


def _change(terms: Sequence[Change], prefix: Prefix) -> torch.Tensor:
    dim, t = terms[0].dim, prefix.t
    if t:
        before = prefix.before[:, -1, dim]
    else:
        last = [np.nan if term.last is None else term.last for term in terms]
        before = _tensor(last, prefix)[prefix.samples]
    limit = _tensor([term.limits[t] for term in terms], prefix)[prefix.samples]
    change = (prefix.next[None] - before[:, None]).abs() - limit[:, None]
    return change.nan_to_num(nan=0.0, neginf=0.0).clamp(min=0.0) ** 2


def _sum(terms: Sequence[WeightedSum], prefix: Prefix) -> torch.Tensor | None:
    one, t = terms[0], prefix.t
    low, high = (
        _tensor([b[t] for b in ends], prefix)[prefix.samples, None]
        for ends in zip(*[(x.low, x.high) for x in terms], strict=True)
    )
    amounts = {d: _weigh(one, i, prefix.at(d)) for i, d in enumerate(one.dims) if d <= prefix.d}
    used = sum((a for d, a in amounts.items() if d < prefix.d), torch.zeros_like(low))
    after = used + amounts[prefix.d]
    if one.power != 1 and not one.cumulative and not np.isfinite(np.stack([term.low for term in terms])).any():
        root = torch.sqrt if one.power == 2 else (lambda x: x)
        return (root(after) - high).clamp(min=0.0) ** 2 - (root(used) - high).clamp(min=0.0) ** 2
    if prefix.d != max(one.dims):
        return None
    if one.cumulative:
        counted = np.ones(len(one.low), dtype=bool) if one.counted is None else one.counted
        past = sum(_weigh(one, i, prefix.before[:, :, d]) for i, d in enumerate(one.dims))
        past = torch.where(_tensor(counted[:t], prefix), past, 0.0).sum(dim=1)  # type: ignore[arg-type]
        origin = _tensor([term.origin for term in terms], prefix)[prefix.samples]
        after = (origin + past)[:, None] + (after if counted[t] else torch.zeros_like(after))
    elif one.power == 2:
        after = torch.sqrt(after)
    return torch.maximum(low - after, after - high).clamp(min=0.0) ** 2


def _weigh(term: WeightedSum, i: int, values: torch.Tensor) -> torch.Tensor:
    powers = values if term.power == 1 else values.abs() if term.power == "abs" else values * values
    return float(term.weights[i]) * powers


def _zone(zones: Sequence[Zone], prefix: Prefix) -> torch.Tensor:
    one, t = zones[0], prefix.t
    enter, leave, start, end, corners = None, None, [], [], []
    for i, d in enumerate(one.dims):
        origin = _tensor([zone.origin[i] for zone in zones], prefix)[prefix.samples]
        here = (
            origin + prefix.before[:, :, d].sum(dim=1) if one.delta[i] else (prefix.before[:, -1, d] if t else origin)
        )
        a = here[:, None]
        b = a + prefix.at(d) if one.delta[i] else prefix.at(d).expand(len(a), -1)
        low, high = (
            _tensor([corner[i] for corner in ends], prefix)[prefix.samples, None]
            for ends in ([zone.low for zone in zones], [zone.high for zone in zones])
        )
        still, within = a == b, (a >= low) & (a <= high)
        first, second = (low - a) / (b - a), (high - a) / (b - a)
        into = torch.where(still, torch.where(within, 0.0, 2.0), torch.minimum(first, second))
        out = torch.where(still, torch.where(within, 1.0, -1.0), torch.maximum(first, second))
        enter = into.clamp(min=0.0) if enter is None else torch.maximum(enter, into)
        leave = out.clamp(max=1.0) if leave is None else torch.minimum(leave, out)
        start.append(a)
        end.append(b)
        corners.append((low, high))
    steps = _tensor([zone.steps[t] for zone in zones], prefix)[prefix.samples, None]
    hit = (enter <= leave) & steps  # type: ignore[operator]
    middle = torch.where(hit, enter + leave, 0.0) / 2  # type: ignore[operator]
    deep = None
    for share in (middle, torch.ones_like(middle)):
        inside = [
            torch.minimum(a + share * (b - a) - low, high - a - share * (b - a))
            for a, b, (low, high) in zip(start, end, corners, strict=True)
        ]
        depth = torch.stack(torch.broadcast_tensors(*inside)).amin(dim=0)
        deep = depth if deep is None else torch.maximum(deep, depth)
    return torch.where(hit, deep.clamp(min=TOUCH), 0.0) ** 2  # type: ignore[union-attr]


def _hold(holds: Sequence[Hold], prefix: Prefix) -> torch.Tensor:
    one = holds[0]

    def is_open(values: torch.Tensor) -> torch.Tensor:
        return (values - one.open).abs() <= (values - one.closed).abs()

    first = _tensor([bool(hold.is_open(hold.last)) for hold in holds], prefix)[prefix.samples]
    states = torch.cat([first[:, None], is_open(prefix.before[:, :, one.dim])], dim=1)
    change = (states[:, 1:] != states[:, :-1]).long()
    since = (change.flip(1).cumsum(1) == 0).long().sum(1)
    held = torch.where(
        change.any(1), since + 1, _tensor([hold.held for hold in holds], prefix)[prefix.samples] + prefix.t
    )
    early = held < one.min_hold
    if one.max_switches is not None:
        early = early | (change.sum(1) >= one.max_switches)
    differs = is_open(prefix.next)[None] != states[:, -1:]
    return (differs & early[:, None]).double()
