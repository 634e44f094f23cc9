"""Masks and biases that depend on the beginning of the chunk: what the certificate leaves, and what soft terms pull."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hf_vla_actions.constraints import BoundConstraints
from hf_vla_actions.constraints.bound import Price
from hf_vla_actions.constraints.penalty import Prefix, pull_nats, squared_excess
from hf_vla_actions.constraints.terms import Hold, Pull


class CoupledMasks:
    """Everything about the next token that depends on those before it, on one device.

    Args:
        bound: constraints; bound to the token grid if they are to be certified.
        device: where the scores live.
        certify: False for decoding that only soft terms act on.
    """

    def __init__(self, bound: BoundConstraints, device: torch.device, certify: bool = True):
        self.device = device
        self.n_samples, self.dof = bound.n_samples, bound.space.dof
        self.values = torch.as_tensor(bound._grid().copy(), device=device)
        coupled = any(len(ways) > 1 or ways[0].terms for ways in bound.branches)
        self.certificate = bound.certificate(device) if certify and coupled else None
        self._prices = _alike([list(prices) for prices in bound.prices] or [[]] * self.n_samples)
        self._order = torch.as_tensor(np.argsort(bound._grid(), axis=1, kind="stable"), device=device)
        self.reluctant = _reluctant(bound, device)

    def samples(self, rows: int) -> torch.Tensor:
        """(rows,) the sample of each row."""
        return torch.arange(rows, device=self.device) // (rows // self.n_samples)

    def allowed(self, codes: torch.Tensor) -> torch.Tensor | None:
        """(rows, n_codes) bool after codes (rows, position); None if only single dimensions are constrained."""
        return None if self.certificate is None else self.certificate.allowed(codes, codes.shape[1])

    def bias(self, codes: torch.Tensor) -> torch.Tensor | None:
        """(rows, n_codes) nats after codes (rows, position); None if there are none here."""
        samples = self.samples(len(codes))
        total: torch.Tensor | None = None
        for members, prices in self._prices:
            rows = torch.isin(samples, torch.tensor(members, device=self.device)) if len(self._prices) > 1 else None
            mine = codes if rows is None else codes[rows]
            local = (
                samples
                if rows is None
                else torch.searchsorted(torch.tensor(members, device=self.device), samples[rows])
            )
            prefix = Prefix(mine, self.values, local)
            for alike in prices:
                nats = _nats(alike, prefix)
                if nats is None:
                    continue
                if total is None:
                    total = torch.zeros((len(codes), self.values.shape[1]), dtype=torch.float64, device=self.device)
                if rows is None:
                    total = total + nats
                else:
                    total[rows] = total[rows] + nats
        return total

    def nearest(self, allowed: torch.Tensor, dim: int) -> torch.Tensor:
        """(rows, n_codes) the allowed code closest in real units to each code; itself if allowed."""
        order, values = self._order[dim], self.values[dim]
        sorted_values, ok = values[order], allowed[:, order]
        places = torch.arange(len(order), device=self.device).expand_as(ok)
        below = torch.where(ok, places, -1).cummax(dim=1).values
        above = torch.where(ok, places, len(order)).flip(1).cummin(dim=1).values.flip(1)
        down = torch.where(below < 0, torch.inf, sorted_values - sorted_values[below.clamp(min=0)])
        up = torch.where(
            above == len(order), torch.inf, sorted_values[above.clamp(max=len(order) - 1)] - sorted_values
        )
        place = torch.where(down <= up, below, above).clamp(0, len(order) - 1)
        target = torch.empty_like(place)
        target[:, order] = order[place]
        return torch.where(allowed, torch.arange(len(order), device=self.device), target)

    def keep_state(
        self, codes: torch.Tensor, scores: torch.Tensor, allowed: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`allowed` without changes of the gripper that the policy is not sure enough of.

        Args:
            codes: (rows, position).
            scores: (rows, n_codes) of the action tokens.
            allowed: (rows, n_codes) bool, None for all.
        """
        dim = codes.shape[1] % self.dof
        if dim not in self.reluctant:
            return allowed
        is_open, first, theta = self.reluctant[dim]
        samples = self.samples(len(codes))
        t = codes.shape[1] // self.dof
        before = is_open[codes[:, (t - 1) * self.dof + dim]] if t else first[samples]
        keeps = is_open[None] == before[:, None]
        p = torch.softmax(scores.double(), dim=1)
        sure = (p * ~keeps).sum(dim=1) > theta[samples]
        allowed = torch.ones_like(keeps) if allowed is None else allowed
        kept = allowed & keeps
        return torch.where((sure | ~kept.any(dim=1))[:, None], allowed, kept)


def penalties(bound: BoundConstraints, device: torch.device | str = "cpu") -> Callable[[torch.Tensor], torch.Tensor]:
    """Make the function from codes (rows, position) to what each next code costs, (rows, n_codes) float64.

    The cost is the squared excess, in real units, over every hard constraint that the code has a say in (see
    `squared_excess`); of alternatives the first that can be completed counts.
    """
    values = torch.as_tensor(bound._grid().copy(), device=device)
    dof = bound.space.dof
    firsts = [ways[0] for ways in bound.branches]
    distance = np.zeros((len(firsts), bound.horizon, *values.shape))
    for sample, way in enumerate(firsts):
        for (step, dim), members in way.sets.items():
            row = bound._grid()[dim]
            distance[sample, step, dim] = (members.nearest(row) - row) ** 2
    squares = torch.as_tensor(distance, device=device)
    groups = _alike([list(way.terms) for way in firsts])

    def cost(codes: torch.Tensor) -> torch.Tensor:
        samples = torch.arange(len(codes), device=codes.device) // (len(codes) // len(firsts))
        t, d = divmod(codes.shape[1], dof)
        total = squares[samples, t, d].clone()
        for members, terms in groups:
            rows = torch.isin(samples, torch.tensor(members, device=codes.device))
            local = torch.searchsorted(torch.tensor(members, device=codes.device), samples[rows])
            prefix = Prefix(codes[rows], values, local)
            for alike in terms:
                excess = squared_excess(alike, prefix)
                if excess is not None:
                    total[rows] = total[rows] + excess
        return total

    return cost


def _nats(alike: Sequence[Any], prefix: Prefix) -> torch.Tensor | None:
    if isinstance(alike[0], Pull):
        return pull_nats(alike, prefix)
    excess = squared_excess([price.term for price in alike], prefix)
    if excess is None:
        return None
    weights = torch.tensor([price.weight for price in alike], dtype=torch.float64, device=prefix.table.device)
    return -weights[prefix.samples, None] * excess


def _alike(lists: Sequence[Sequence[Any]]) -> list[tuple[list[int], list[list[Any]]]]:
    """Samples whose parts are of the same kinds: (samples, for each part its version of every sample)."""
    kinds: dict[tuple, list[int]] = {}
    for sample, parts in enumerate(lists):
        kinds.setdefault(tuple(_kind(part) for part in parts), []).append(sample)
    return [
        (members, [[lists[s][i] for s in members] for i in range(len(kind))])
        for kind, members in kinds.items()
        if kind
    ]


def _kind(part: Any) -> tuple:
    term = part.term if isinstance(part, Price) else part
    dims = (term.dim,) if isinstance(term, (Pull, Hold)) else term.dims
    facts = [getattr(term, name, None) for name in ("weights", "power", "cumulative", "counted", "delta", "min_hold")]
    return (
        type(term),
        dims,
        *[np.asarray(fact).tobytes() if isinstance(fact, np.ndarray) else fact for fact in facts],
    )


def _reluctant(bound: BoundConstraints, device: torch.device) -> dict[int, tuple[torch.Tensor, ...]]:
    """For each dimension with hysteresis: state of each code, state before the chunk, mass that a change needs."""
    holds = [[t for t in ways[0].terms if isinstance(t, Hold) and t.hysteresis is not None] for ways in bound.branches]
    dims = {hold.dim for found in holds for hold in found}
    reluctant: dict[int, tuple[torch.Tensor, ...]] = {}
    for dim in dims:
        mine = [next((h for h in found if h.dim == dim), None) for found in holds]
        one = next(hold for hold in mine if hold is not None)
        first = [bool(hold.is_open(hold.last)) if hold else False for hold in mine]
        theta = [float(hold.hysteresis) if hold else -1.0 for hold in mine]  # type: ignore[arg-type]
        is_open = torch.as_tensor(one.is_open(bound._grid()[dim]), device=device)
        reluctant[dim] = (is_open, torch.tensor(first, device=device), torch.tensor(theta, device=device))
    return reluctant
