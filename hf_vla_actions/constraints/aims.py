"""Dimensions that go for a sum over the chunk, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_vla_actions.constraints.tables import LawTables

if TYPE_CHECKING:
    from hf_vla_actions.constraints.component import Component, State


class Aims:
    """Dimensions that go for a sum: what they do depends on what has been summed up, so they are walked."""

    def __init__(self, aims, tables: Sequence[LawTables], viable: Sequence[np.ndarray], part: Component):
        self.part = part
        self.dims = tuple(aims[0])
        self.counted = {d: aims[0][d].counted for d in self.dims}
        self._counts = {d: part._tensor(counted) for d, counted in self.counted.items()}
        values = part.values
        self.value = {d: part._tensor(values[d]) for d in self.dims}
        self.targets = {d: part._tensor(np.array([sample[d].target for sample in aims])) for d in self.dims}
        self.limits = part._tensor(np.stack([table.moves.limits for table in tables]))  # (U, T, dof)
        grids = {d: [[_grid(values[d], v[t, d]) for t in range(part.horizon)] for v in viable] for d in self.dims}
        self.edges = {d: part._tensor(np.array([[g[0] for g in row] for row in grids[d]])) for d in self.dims}
        self.codes = {d: part._tensor(np.array([[g[1] for g in row] for row in grids[d]])) for d in self.dims}

    def walk(self, state: State, e: int) -> torch.Tensor:
        """(J, R, K or 1, L) codes from the present step on."""
        part, value = self.part, self.value[e]
        own = e == state.d and state.own
        taken = value[state.prefix[:, :, e]]
        counted = self.counted[e]
        total = torch.where(self._counts[e][: state.t], taken, 0.0).sum(dim=1)[:, None]
        if own:
            code = torch.arange(len(value), device=value.device).expand(state.rows, -1)
        elif e < state.d:
            code = state.now[:, e, None]
        elif state.t:
            code = self._next(state, e, state.t, value[state.prefix[:, -1, e, None]], total)
        else:
            code = part.first[state.samples, 0, e][:, None]
        codes = [code]
        for s in range(state.t + 1, part.horizon):
            if counted[s - 1]:
                total = total + value[codes[-1]]
            codes.append(self._next(state, e, s, value[codes[-1]], total))
        return torch.stack(codes, dim=-1).expand(len(state.laws), -1, -1, -1)

    def _next(self, state: State, e: int, s: int, before: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """(R, M) codes at step s after values `before`, with `total` summed up."""
        left = int(self.counted[e][s:].sum())
        goal = (self.targets[e][state.samples, None] - total) / left if self.counted[e][s] else torch.zeros_like(total)
        limit = self.limits[state.table, s, e][:, None]
        goal = torch.minimum(torch.maximum(goal, before - limit), before + limit)
        goal = goal.expand_as(before)
        code = self._near(state, e, s, before)
        closest = torch.full_like(before, torch.inf)
        for aside in (0, -1, 1):  # the nearest may just be out of reach
            near = self._near(state, e, s, goal, aside)
            value = self.value[e][near]
            off = torch.where((value - before).abs() <= limit, (value - goal).abs(), torch.inf)
            code, closest = torch.where(off < closest, near, code), torch.minimum(off, closest)
        return code

    def _near(self, state: State, e: int, s: int, wanted: torch.Tensor, aside: int = 0) -> torch.Tensor:
        """Codes nearest to values (R, M), or so many places beside them."""
        edges, codes = self.edges[e][:, s], self.codes[e][:, s]
        if state.single:
            at = torch.searchsorted(edges[0], wanted.contiguous()) + aside
            return codes[0][at.clamp(0, codes.shape[1] - 1)]
        mine = torch.searchsorted(edges[state.table].contiguous(), wanted.contiguous()) + aside
        return codes[state.table].gather(1, mine.clamp(0, codes.shape[1] - 1))


def _grid(values: np.ndarray, viable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges (K - 1,) between viable values and the code (K,) of each piece, padded behind."""
    known, first = np.unique(np.where(viable, values, np.inf), return_index=True)
    first = first[np.isfinite(known)]
    known = known[np.isfinite(known)]
    edges = np.full(len(values) - 1, np.inf)
    edges[: len(known) - 1] = (known[:-1] + known[1:]) / 2
    codes = np.full(len(values), first[-1])
    codes[: len(first)] = first
    return edges, codes
