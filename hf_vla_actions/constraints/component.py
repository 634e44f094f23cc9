"""One group of coupled dimensions on the device: whether some law completes each beginning within all of its terms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hf_vla_actions.constraints.laws import Aim
from hf_vla_actions.constraints.tables import Amounts, LawTables, amounts_of, positions_of
from hf_vla_actions.constraints.terms import Predicate, WeightedSum, Zone


class Component:
    """Dimensions that terms tie together, for samples with the same kinds of terms.

    Shapes: S samples, U different tables (samples share them where they can), J completions (laws, and for zones
    escapes in one dimension), R rows, K codes, L = T - t steps from the present one.

    Args:
        dims: the dimensions.
        terms: for each sample, its terms, in the same order.
        tables: for each sample, the laws as tables; equal ones are the same object.
        aims: for each sample, the sums that its dimensions go for.
        first: (S, J + 2, dof) codes of step 0 by each law and by going as low and as high as possible.
        device: where tensors live.
    """

    def __init__(
        self,
        dims: Sequence[int],
        terms: Sequence[Sequence[WeightedSum | Zone | Predicate]],
        tables: Sequence[LawTables],
        aims: Sequence[dict[int, Aim]],
        first: np.ndarray,
        device: torch.device,
    ):
        self.dims, self.device = tuple(dims), device
        different = list(dict.fromkeys(tables))
        self.tables = different
        self.values = different[0].values
        self.horizon, self.n_laws = different[0].horizon, different[0].n_laws
        self.table_of = self._tensor([different.index(table) for table in tables])
        self.first = self._tensor(first)
        self._paths: dict[int, torch.Tensor] = {}
        self.following = {d: self._stack([t.following(d) for t in different]) for d in self.dims}  # (J, U, T, K)
        zones = [i for i, term in enumerate(terms[0]) if isinstance(term, Zone)]
        self.escaping = sorted({d for i in zones for d in terms[0][i].dims})
        self.extremes = {d: self._stack([t.extremes(d) for t in different]) for d in self.escaping}  # (2, U, T, K)
        self.aims = _Aims(aims, different, [table.viable for table in different], self) if aims[0] else None
        self.sums = [_Sum(self, [sample[i] for sample in terms]) for i in self._kinds(terms, WeightedSum)]
        self.zones = [_Zone(self, [sample[i] for sample in terms]) for i in zones]
        self.predicates = [_Predicate(self, [s[i] for s in terms]) for i in self._kinds(terms, Predicate)]

    def paths(self, e: int) -> torch.Tensor:
        """(J, U, T, K, T) codes of dimension e along the laws."""
        if e not in self._paths:
            self._paths[e] = self._stack([table.paths(e) for table in self.tables])
        return self._paths[e]

    @staticmethod
    def _kinds(terms, kind) -> list[int]:
        return [i for i, term in enumerate(terms[0]) if isinstance(term, kind)]

    def _tensor(self, values) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), device=self.device)

    def _stack(self, arrays: Sequence[np.ndarray]) -> torch.Tensor:
        """(J, ...) of each table to (J, U, ...)."""
        return self._tensor(np.stack(arrays, axis=1))

    def certified(self, codes: torch.Tensor, t: int, d: int, samples: torch.Tensor, own: bool) -> torch.Tensor:
        """Whether some completion satisfies every term.

        Args:
            codes: (R, n) decided codes, n = t * dof + d.
            t: present step.
            d: present dimension.
            samples: (R,) sample of each row.
            own: True: for each code of the present dimension, (R, K). False: for what is decided alone, (R, 1).
        """
        state = _State(self, codes, t, d, samples, own)
        good = None
        for part in (*self.sums, *self.zones, *self.predicates):
            ok = part.holds(state)  # (J, R, K or 1)
            good = ok if good is None else good & ok
        return good.any(dim=0)  # type: ignore[union-attr]  # a component has at least one term

    def kept(self, codes: torch.Tensor, t: int, samples: torch.Tensor) -> torch.Tensor:
        """(R, 1): whether step t, all of whose dimensions are decided in codes (R, (t + 1) * dof), kept to the terms."""
        state = _State(self, codes, t, self.first.shape[2], samples, own=False, steps=1)
        ok = torch.ones((len(codes), 1), dtype=torch.bool, device=self.device)
        for part in (*self.sums, *self.zones):
            ok = ok & part.holds(state)[0]
        return ok


class _State:
    """What is decided, and the codes of the present step by each completion; L = `steps`."""

    def __init__(self, part: Component, codes, t: int, d: int, samples, own: bool, steps: int | None = None):
        self.t, self.d, self.own, self.samples, self.rows = t, d, own and d in part.dims, samples, len(codes)
        self.steps = part.horizon - t if steps is None else steps
        self.part = part
        self.dof = part.first.shape[2]
        self.prefix = codes[:, : t * self.dof].view(self.rows, t, self.dof)
        self.now = codes[:, t * self.dof :]
        self.table = part.table_of[samples]  # (R,)
        undecided = [e for e in part.escaping if e > d or (e == d and not self.own)]
        self.laws = torch.tensor([*range(part.n_laws), *[0] * (2 * len(undecided))], device=part.device)
        self.present = {e: self._present(e, undecided) for e in part.dims if e != d or not self.own}
        self.taken: dict[int, torch.Tensor] = {}

    @property
    def single(self) -> bool:
        """All samples share their tables."""
        return len(self.part.tables) == 1

    def _present(self, e: int, undecided: list[int]) -> torch.Tensor:
        """(J, R) code of dimension e at the present step."""
        if e < self.d:
            return self.now[:, e].expand(len(self.laws), -1)
        part, n = self.part, self.part.n_laws
        if self.t:
            before = self.prefix[:, -1, e]
            codes = part.following[e][:, self.table, self.t, before]
            ends = part.extremes[e][:, self.table, self.t, before] if e in undecided else codes[:0]
        else:
            first = part.first[self.samples, :, e].T
            codes, ends = first[:n], first[n:]
        brake = codes[:1].expand(2, -1)
        return torch.cat([codes, *[ends if other == e else brake for other in undecided]])

    def path_codes(self, e: int) -> torch.Tensor:
        """(J, R, K or 1, L) codes of dimension e from the present step on, by each completion."""
        if e not in self.taken:
            part = self.part
            if part.aims is not None and e in part.aims.dims:
                self.taken[e] = part.aims.walk(self, e)
            else:
                paths = part.paths(e)[:, :, self.t, :, self.t :]
                if e == self.d and self.own:
                    chosen = paths[self.laws]
                    self.taken[e] = chosen if self.single else chosen[:, self.table]
                else:
                    self.taken[e] = paths[self.laws[:, None], self.table[None], self.present[e]][:, :, None]
        return self.taken[e]


class _Amount:
    """Sums of one dimension along the completions, from tables or, where it goes for an aim, by walking."""

    def __init__(self, part: Component, e: int, amounts: Sequence[np.ndarray], counted, cumulative: bool):
        self.part, self.e, self.cumulative = part, e, cumulative
        self.codes = part._tensor(np.stack(amounts))  # (S or 1, K)
        self.counted = None if counted is None else part._tensor(counted)
        self.falls = False
        self.paths: torch.Tensor | None = None
        if part.aims is None or e not in part.aims.dims:
            made = [Amounts(table, e, amounts[0], counted, cumulative) for table in part.tables]
            self.falls = all(one.falls for one in made)
            self.paths = part._stack([one.paths for one in made])  # (J, U, T, K, T)

    def along(self, state: _State) -> torch.Tensor:
        """(J, R, K or 1, L): what this dimension adds from the present step on."""
        t = state.t
        if self.paths is None:
            taken = self.codes[0][state.path_codes(self.e)]
            if self.counted is not None:
                taken = torch.where(self.counted[t:], taken, 0.0)
            return (taken.cumsum(dim=-1) if self.cumulative else taken)[..., : state.steps]
        paths = self.paths[:, :, t, :, t : t + state.steps]
        if self.e == state.d and state.own:
            chosen = paths[state.laws] if len(state.laws) != self.part.n_laws else paths
            return chosen if state.single else chosen[:, state.table]
        if state.single:
            return paths[state.laws[:, None], 0, state.present[self.e]][:, :, None]
        return paths[state.laws[:, None], state.table[None], state.present[self.e]][:, :, None]

    def so_far(self, state: _State) -> torch.Tensor:
        """(R,) sum over the steps before the present one."""
        taken = self.codes[0][state.prefix[:, :, self.e]]
        return (taken if self.counted is None else torch.where(self.counted[: state.t], taken, 0.0)).sum(dim=1)


class _Sum:
    def __init__(self, part: Component, terms: Sequence[WeightedSum]):
        one = terms[0]
        amounts, slack = amounts_of(one, part.values, part.horizon)
        self.cumulative, self.dims = one.cumulative, one.dims
        self.amounts = [
            _Amount(part, d, [amount], one.counted if one.cumulative else None, one.cumulative)
            for d, amount in zip(one.dims, amounts, strict=True)
        ]
        bounds = [term.bounds for term in terms]
        low, high = np.stack([b[0] for b in bounds]), np.stack([b[1] for b in bounds])
        # A sum that may stay at 0 stays there exactly; every other bound leaves room for the rounding of amounts.
        self.low = part._tensor(np.where(low == 0, 0.0, low + slack))
        self.high = part._tensor(np.where(high == 0, 0.0, high - slack))
        self.has_low, self.has_high = np.isfinite(low).any(axis=0), np.isfinite(high).any(axis=0)
        even = bool((high == high[:, :1]).all())
        self.now_only = even and not self.has_low.any() and all(amount.falls for amount in self.amounts)

    def holds(self, state: _State) -> torch.Tensor:
        t = state.t
        total = None
        for amount in self.amounts:
            along = amount.along(state)
            along = along[..., :1] if self.now_only and not self.cumulative else along
            total = along if total is None else total + along
        assert total is not None
        if self.cumulative:
            total = total + sum(a.so_far(state) for a in self.amounts)[None, :, None, None]
        steps = slice(t, t + total.shape[-1])
        ok = None
        if self.has_high[steps].any():
            ok = (total <= self.high[state.samples, steps][None, :, None]).all(dim=-1)
        if self.has_low[steps].any():
            least = (total >= self.low[state.samples, steps][None, :, None]).all(dim=-1)
            ok = least if ok is None else ok & least
        if ok is None:
            return torch.ones((len(state.laws), state.rows, 1), dtype=torch.bool, device=total.device)
        return ok.expand(-1, state.rows, -1)


class _Zone:
    def __init__(self, part: Component, zones: Sequence[Zone]):
        one = zones[0]
        made = [positions_of(zone, part.values, part.horizon) for zone in zones]
        self.moves = [
            _Amount(part, d, [made[0][0][i]], None, bool(one.delta[i])) for i, d in enumerate(one.dims)
        ]
        self.delta = one.delta
        grow = np.array([margin for *_, margin in made])[:, None]
        self.low = part._tensor(np.stack([zone.low for zone in zones]) - grow)  # (S, n)
        self.high = part._tensor(np.stack([zone.high for zone in zones]) + grow)
        self.origin = part._tensor(np.stack([origin for _, origin, _ in made]))
        self.steps = part._tensor(np.stack([zone.steps for zone in zones]))

    def holds(self, state: _State) -> torch.Tensor:
        enter, leave = None, None
        for i, move in enumerate(self.moves):
            start, end = self._pieces(state, i, move)
            low, high = (bound[state.samples, i][None, :, None, None] for bound in (self.low, self.high))
            first, second = (low - start) / (end - start), (high - start) / (end - start)
            still, within = start == end, (start >= low) & (start <= high)
            into = torch.where(still, torch.where(within, 0.0, 2.0), torch.minimum(first, second))
            out = torch.where(still, torch.where(within, 1.0, -1.0), torch.maximum(first, second))
            enter = into.clamp(min=0.0) if enter is None else torch.maximum(enter, into)
            leave = out.clamp(max=1.0) if leave is None else torch.minimum(leave, out)
        steps = slice(state.t, state.t + state.steps)
        hit = (enter <= leave) & self.steps[state.samples, steps][None, :, None]  # type: ignore[operator]
        return ~hit.any(dim=-1)

    def _pieces(self, state: _State, i: int, move: _Amount) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (J, R, K or 1, L) in one dimension before and after each step from the present one on."""
        origin = self.origin[state.samples, i]
        if self.delta[i]:
            here = origin + move.so_far(state)
            end = here[None, :, None, None] + move.along(state)
        else:
            here = move.codes[0][state.prefix[:, -1, move.e]] if state.t else origin
            end = move.along(state).expand(-1, state.rows, -1, -1)
        before = here[None, :, None, None].expand(*end.shape[:-1], 1)
        return torch.cat([before, end[..., :-1]], dim=-1), end


class _Predicate:
    """Asks the user's function about whole chunks; that costs a copy to the host, and all rows at once."""

    def __init__(self, part: Component, terms: Sequence[Predicate]):
        self.terms, self.part = terms, part

    def holds(self, state: _State) -> torch.Tensor:
        part, values = self.part, self.part.values
        paths = [state.path_codes(e).expand(-1, state.rows, -1, -1) for e in part.dims]
        width = max(path.shape[2] for path in paths)
        shape = (len(state.laws), state.rows, width)
        chunks = np.empty((*shape, part.horizon, len(part.dims)))
        prefix = state.prefix.cpu().numpy()
        for e in part.dims:
            chunks[..., : state.t, e] = values[e][prefix[:, :, e]][None, :, None]
            chunks[..., state.t :, e] = values[e][paths[e].expand(-1, -1, width, -1).cpu().numpy()]
        samples = state.samples.cpu().numpy()
        good = np.empty(shape, dtype=bool)
        for sample, term in enumerate(self.terms):
            rows = samples == sample
            mine = chunks[:, rows]
            said = np.asarray(term.function(mine.reshape(-1, *chunks.shape[-2:])))
            good[:, rows] = said.reshape(mine.shape[:3])
        return torch.from_numpy(good).to(part.device)


class _Aims:
    """Dimensions that go for a sum: what they do depends on what has been summed up, so they are walked."""

    def __init__(self, aims, tables: Sequence[LawTables], viable: Sequence[np.ndarray], part: Component):
        self.part = part
        self.dims = tuple(aims[0])
        self.counted = {d: aims[0][d].counted for d in self.dims}
        values = part.values
        self.value = {d: part._tensor(values[d]) for d in self.dims}
        self.targets = {d: part._tensor(np.array([sample[d].target for sample in aims])) for d in self.dims}
        self.limits = part._tensor(np.stack([table.moves.limits for table in tables]))  # (U, T, dof)
        grids = {d: [[_grid(values[d], v[t, d]) for t in range(part.horizon)] for v in viable] for d in self.dims}
        self.edges = {d: part._tensor(np.array([[g[0] for g in row] for row in grids[d]])) for d in self.dims}
        self.codes = {d: part._tensor(np.array([[g[1] for g in row] for row in grids[d]])) for d in self.dims}

    def walk(self, state: _State, e: int) -> torch.Tensor:
        """(J, R, K or 1, L) codes from the present step on."""
        part, value = self.part, self.value[e]
        own = e == state.d and state.own
        taken = value[state.prefix[:, :, e]]
        counted = self.counted[e]
        total = torch.where(part._tensor(counted[: state.t]), taken, 0.0).sum(dim=1)[:, None]
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

    def _next(self, state: _State, e: int, s: int, before: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """(R, M) codes at step s after values `before`, with `total` summed up."""
        left = int(self.counted[e][s:].sum())
        goal = (self.targets[e][state.samples, None] - total) / left if self.counted[e][s] else torch.zeros_like(total)
        limit = self.limits[state.table, s, e][:, None]
        goal = torch.minimum(torch.maximum(goal, before - limit), before + limit)
        near = self._near(state, e, s, goal.expand_as(before))
        back = self._near(state, e, s, before)
        return torch.where((self.value[e][near] - before).abs() <= limit, near, back)

    def _near(self, state: _State, e: int, s: int, wanted: torch.Tensor) -> torch.Tensor:
        edges, codes = self.edges[e][:, s], self.codes[e][:, s]
        if state.single:
            return codes[0][torch.searchsorted(edges[0], wanted.contiguous())]
        mine = torch.searchsorted(edges[state.table].contiguous(), wanted.contiguous())
        return codes[state.table].gather(1, mine)


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
