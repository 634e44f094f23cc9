"""The certificate on the token grid: which codes may come next so that the chunk can still be completed.

A code is allowed if, for some law (see `laws`), what is decided, the code, and the law carried on to the end of the
chunk satisfy every hard constraint. The rest of that completion is again the completion of its own beginning, so the
next code of a certified completion is allowed in turn: whatever is chosen, there is always a code left, and a finished
chunk satisfies everything. It is a function of the codes decided so far and of nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from hf_vla_actions.constraints.branch import Branch
from hf_vla_actions.constraints.component import Component
from hf_vla_actions.constraints.laws import HoldTable
from hf_vla_actions.constraints.tables import LawTables
from hf_vla_actions.constraints.terms import Change, Hold, Predicate, WeightedSum, Zone

Coupled = WeightedSum | Zone | Predicate


class Certificate:
    """Masks of the next code for a batch, on one device.

    Args:
        branches: for each sample, the ways of choosing among alternatives, feasible or not.
        values: (dof, n_codes) real value of each code.
        device: where the codes live.
    """

    def __init__(self, branches: Sequence[Sequence[Branch]], values: np.ndarray, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.values = values
        self.n_samples = len(branches)
        self._samples: dict[int, torch.Tensor] = {}
        kinds: dict[Any, list[int]] = {}
        for sample, ways in enumerate(branches):
            kinds.setdefault(tuple(_kind(way) for way in ways), []).append(sample)
        self._groups = [
            (samples, [_Way([branches[s][i] for s in samples], values, self.device) for i in range(len(kind))])
            for kind, samples in kinds.items()
        ]

    def allowed(self, codes: torch.Tensor, position: int) -> torch.Tensor:
        """Codes that may come at a position.

        Args:
            codes: (rows, position) int64, decided so far; row r belongs to sample r // (rows / samples).
            position: tokens of the chunk decided so far.

        Returns:
            (rows, n_codes) bool. A row that is not certified has none.
        """
        dof, n_codes = self.values.shape
        t, d = divmod(position, dof)
        rows = len(codes)
        each = rows // self.n_samples
        if len(self._groups) == 1:
            if rows not in self._samples:
                self._samples = {rows: torch.arange(rows, device=self.device) // each}
            samples = self._samples[rows]
            return _any_way(self._groups[0][1], codes, t, d, samples).expand(rows, n_codes)
        out = torch.zeros((rows, n_codes), dtype=torch.bool, device=self.device)
        for members, ways in self._groups:
            mine = torch.cat([torch.arange(s * each, (s + 1) * each, device=self.device) for s in members])
            samples = torch.arange(len(members), device=self.device).repeat_interleave(each)
            out[mine] = _any_way(ways, codes[mine], t, d, samples).expand(len(mine), n_codes)
        return out

    def starts(self) -> list[list[bool]]:
        """For each sample, for each of its branches: whether some completion of the empty chunk is certified."""
        found: list[list[bool]] = [[] for _ in range(self.n_samples)]
        for members, ways in self._groups:
            for way in ways:
                for sample, good in zip(members, way.starts(len(members)).tolist(), strict=True):
                    found[sample].append(good)
        return found


class _Way:
    """One branch of several samples with the same kinds of terms."""

    def __init__(self, branches: Sequence[Branch], values: np.ndarray, device: torch.device):
        self.device = device
        self.dof = len(values)
        self.values = torch.tensor(values, device=device)
        tables = [cast(LawTables, branch.tables) for branch in branches]
        different = list(dict.fromkeys(tables))
        self.table_of = torch.tensor([different.index(table) for table in tables], device=device)
        self.viable = torch.as_tensor(np.stack([table.viable for table in different]), device=device)  # (U, T, D, K)
        limits = np.stack([table.moves.limits for table in different])
        self.limits = torch.as_tensor(limits, device=device)
        self.limited = np.isfinite(limits).any(axis=0)
        self.plans, self.first = different[0].plans, {}  # type: ignore[var-annotated]
        self.last = torch.as_tensor(np.stack([branch.laws.start for branch in branches]), device=device)  # (S, D)
        self.holds = {
            d: _Holds([b.laws.holds[d] for b in branches], values[d], device) for d in branches[0].laws.holds
        }
        self.components = self._components(branches, tables)
        self.of_dim = {d: part for part in self.components for d in part.dims}

    def _components(self, branches: Sequence[Branch], tables) -> list[Component]:
        coupled = [i for i, term in enumerate(branches[0].terms) if isinstance(term, Coupled)]
        first = _first(branches) if coupled else np.zeros(0)
        parts = []
        for dims, chosen in _connected([(i, branches[0].terms[i].dims) for i in coupled]):
            terms = [[branch.terms[i] for i in chosen] for branch in branches]
            aims = [{d: a for d, a in branch.laws.aims.items() if d in dims} for branch in branches]
            parts.append(Component(dims, terms, tables, aims, first, self.device))  # type: ignore[arg-type]
        return parts

    def allowed(self, codes: torch.Tensor, t: int, d: int, samples: torch.Tensor) -> torch.Tensor:
        """(R or 1, K): what the present dimension may be."""
        ok = self._single(codes, t, d, samples)
        if d in self.of_dim:
            ok = ok & self.of_dim[d].certified(codes, t, d, samples, own=True)
        return ok

    def _single(self, codes: torch.Tensor, t: int, d: int, samples: torch.Tensor) -> torch.Tensor:
        """What sets, rate limits and holds leave of the present dimension; exact."""
        if len(self.viable) == 1 and self.limited[t, d]:
            ok = self._within_reach(codes, t, d, samples)
        else:
            ok = self.viable[:, t, d] if len(self.viable) == 1 else self.viable[self.table_of[samples], t, d]
        if len(self.viable) > 1 and self.limited[t, d]:
            before = self.values[d][codes[:, (t - 1) * self.dof + d]] if t else self.last[samples, d]
            limit = self.limits[self.table_of[samples], t, d]
            change = (self.values[d] - before[:, None]).abs()
            ok = ok & ((change <= limit[:, None]) | before.isnan()[:, None])
        if d in self.holds:
            ok = ok & self.holds[d].allowed(codes[:, d :: self.dof], t, samples)
        return ok

    def _within_reach(self, codes: torch.Tensor, t: int, d: int, samples: torch.Tensor) -> torch.Tensor:
        """(R, K) what sets and the rate limit leave; all samples share their tables."""
        key = "reach", str(self.device), t, d
        known = self.plans if t else self.first
        if key not in known:
            before = self.values[d] if t else self.last[:, d]
            change = (self.values[d] - before[:, None]).abs()
            known[key] = self.viable[0, t, d] & ((change <= self.limits[0, t, d]) | before.isnan()[:, None])
        return known[key].index_select(0, codes[:, (t - 1) * self.dof + d] if t else samples)

    def still_open(self, codes: torch.Tensor, t: int, d: int, samples: torch.Tensor) -> torch.Tensor:
        """(R, 1): whether what is decided keeps to this branch and the other dimensions can be completed in it."""
        n, ok = t * self.dof + d, torch.ones((len(codes), 1), dtype=torch.bool, device=self.device)
        for i in range(n):
            step, dim = divmod(i, self.dof)
            single = self._single(codes[:, :i], step, dim, samples).expand(len(codes), -1)
            ok = ok & single.gather(1, codes[:, i : i + 1])
        for part in self.components:
            for step in range(t):
                at = codes[:, : (step + 1) * self.dof]
                ok = ok & part.kept(at, step, samples)
            if d not in part.dims:
                ok = ok & part.certified(codes, t, d, samples, own=False)
        return ok

    def starts(self, n_samples: int) -> torch.Tensor:
        """(S,) bool: whether some completion of the empty chunk is certified."""
        codes = torch.zeros((n_samples, self.dof), dtype=torch.int64, device=self.device)
        samples = torch.arange(n_samples, device=self.device)
        ok = torch.ones(n_samples, dtype=torch.bool, device=self.device)
        for d in range(self.dof):
            ok = ok & self._single(codes[:, :d], 0, d, samples).any(dim=1)
        for part in self.components:
            ok = ok & part.certified(codes[:, :0], 0, 0, samples, own=False)[:, 0]
        return ok


class _Holds:
    """The automaton of a gripper's states as a table."""

    def __init__(self, tables: Sequence[HoldTable], values: np.ndarray, device: torch.device):
        self.cap, self.top = tables[0].cap, tables[0].top
        self.is_open = torch.as_tensor(tables[0].term.is_open(values).astype(np.int64), device=device)  # (K,)
        horizon = len(tables[0].states)
        fine = [
            [[[table.allowed(t, before, after) for after in (0, 1)] for before in (0, 1)] for t in range(horizon)]
            for table in tables
        ]
        self.fine = torch.as_tensor(np.array(fine), device=device)  # (S, T, before, after, held, switches)
        self.first = torch.tensor(
            [bool(table.term.is_open(table.term.last)) for table in tables], device=device
        ).long()
        self.held = torch.tensor([min(table.term.held, table.cap) for table in tables], device=device)

    def allowed(self, codes: torch.Tensor, t: int, samples: torch.Tensor) -> torch.Tensor:
        """(R, K) from the codes (R, >= t) of the gripper's dimension."""
        states = torch.cat([self.first[samples][:, None], self.is_open[codes[:, :t]]], dim=1)
        change = (states[:, 1:] != states[:, :-1]).long()
        switches = change.sum(dim=1).clamp(max=self.top)
        since = (change.flip(1).cumsum(1) == 0).long().sum(1)  # steps after the last change
        held = torch.where(change.any(1), since + 1, self.held[samples] + t).clamp(max=self.cap)
        fine = self.fine[samples, t, states[:, -1], :, held, switches]  # (R, after)
        return fine[:, self.is_open]


def _any_way(ways: Sequence[_Way], codes, t: int, d: int, samples) -> torch.Tensor:
    if len(ways) == 1:
        return ways[0].allowed(codes, t, d, samples)
    masks = [way.allowed(codes, t, d, samples) & way.still_open(codes, t, d, samples) for way in ways]
    return torch.stack([mask.expand(len(codes), -1) for mask in masks]).any(dim=0)


def _kind(branch: Branch) -> tuple:
    """Branches of equal kind differ in numbers only."""
    facts: list[tuple] = []
    for term in branch.terms:
        if isinstance(term, WeightedSum):
            counted = None if term.counted is None else tuple(term.counted)
            facts.append(("sum", term.dims, tuple(term.weights), term.power, term.cumulative, counted))
        elif isinstance(term, Zone):
            facts.append(("zone", term.dims, tuple(term.delta)))
        elif isinstance(term, Hold):
            facts.append(("hold", term.dim, term.min_hold, term.max_switches, term.open, term.closed))
        elif isinstance(term, Change):
            facts.append(("change", term.dim))
        else:
            facts.append(("predicate",))
    aims = tuple((d, tuple(aim.counted)) for d, aim in branch.laws.aims.items())
    return tuple(facts), branch.laws.n_laws, aims


def _connected(terms: Sequence[tuple[int, tuple[int, ...]]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Group terms that share dimensions: (dimensions, indices of terms) of each group."""
    groups: list[tuple[set[int], list[int]]] = []
    for i, dims in terms:
        joined = set(dims), [i]
        for group in [g for g in groups if g[0] & set(dims)]:
            joined[0].update(group[0])
            joined[1].extend(group[1])
            groups.remove(group)
        groups.append(joined)
    return [(tuple(sorted(dims)), sorted(chosen)) for dims, chosen in groups]


def _first(branches: Sequence[Branch]) -> np.ndarray:
    """(S, J + 2, dof) codes of step 0 by each law, and as low and as high as can be."""
    starts = np.stack([branch.laws.start for branch in branches])
    tables = [cast(LawTables, branch.tables) for branch in branches]
    n_laws, dof = branches[0].laws.n_laws, starts.shape[1]
    first = np.empty((len(branches), n_laws + 2, dof), dtype=np.int64)
    for one in dict.fromkeys(tables):
        mine = np.array([table is one for table in tables])
        for d in range(dof):
            first[mine, :, d] = one.first(d, starts[mine, d])
    for sample, branch in enumerate(branches):
        for d, aim in branch.laws.aims.items():
            value = branch.laws.moves.step(0, 0, d, starts[sample, d : d + 1], aim.goal(0, np.zeros(1)))
            first[sample, :n_laws, d] = tables[sample].codes_of(d, value)[0]
    return first
