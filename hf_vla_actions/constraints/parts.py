"""The terms of a component on the device: whether each completion of a beginning keeps to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_vla_actions.constraints.tables import Amounts, amounts_of, positions_of
from hf_vla_actions.constraints.terms import Predicate, WeightedSum, Zone

if TYPE_CHECKING:
    from hf_vla_actions.constraints.component import Component, State


class Amount:
    """Sums of one dimension along the completions, from tables or, where it goes for an aim, by walking."""

    def __init__(self, part: Component, e: int, amounts: Sequence[np.ndarray], counted, cumulative: bool):
        self.part, self.e, self.cumulative = part, e, cumulative
        self.codes = part._tensor(np.stack(amounts))  # (S or 1, K)
        self.counted = None if counted is None else part._tensor(counted)
        self.made: list[Amounts] = []
        self.paths: torch.Tensor | None = None
        self.ends: tuple[torch.Tensor, torch.Tensor] | None = None
        if part.aims is None or e not in part.aims.dims:
            self.made = [table.amounts(e, amounts[0], counted, cumulative) for table in part.tables]
            self.paths = part._stack([one.paths for one in self.made])  # (J, U, T, K, T)

    def find_ends(self, bounded: np.ndarray) -> None:
        """Look up the least and largest amount along each path instead of the path itself."""
        ends = [one.ends(bounded) for one in self.made]
        least, largest = (self.part._stack([end[i] for end in ends]) for i in (0, 1))  # (J, U, T, K)
        self.ends = least, largest

    def end(self, state: State, which: int) -> torch.Tensor:
        """(J, R or 1, K or 1): least (0) or largest (1) amount from the present step on."""
        table = self.ends[which][:, :, state.t]  # type: ignore[index]
        if self.e == state.d and state.own:
            chosen = table if len(state.laws) == self.part.n_laws else table[state.laws]
            return chosen if state.single else chosen[:, state.table]
        rows = 0 if state.single else state.table[None]
        return table[state.laws[:, None], rows, state.present[self.e]][:, :, None]

    def along(self, state: State) -> torch.Tensor:
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

    def so_far(self, state: State) -> torch.Tensor:
        """(R,) sum over the steps before the present one."""
        taken = self.codes[0][state.prefix[:, :, self.e]]
        return (taken if self.counted is None else torch.where(self.counted[: state.t], taken, 0.0)).sum(dim=1)


class SumPart:
    """A weighted sum of the samples of a component.

    Args:
        part: the component.
        terms: the sum of each sample; they differ in bounds and origin only.
    """

    def __init__(self, part: Component, terms: Sequence[WeightedSum]):
        one = terms[0]
        amounts, slack = amounts_of(one, part.values, part.horizon)
        self.cumulative, self.dims = one.cumulative, one.dims
        self.amounts = [
            Amount(part, d, [amount], one.counted if one.cumulative else None, one.cumulative)
            for d, amount in zip(one.dims, amounts, strict=True)
        ]
        bounds = [term.bounds for term in terms]
        low, high = np.stack([b[0] for b in bounds]), np.stack([b[1] for b in bounds])
        # A sum that may stay at 0 stays there exactly; every other bound leaves room for the rounding of amounts. Bounds
        # that are multiples of the grain, as sums are, can be subtracted from in any order.
        step = slack / (len(one.dims) * (part.horizon if one.cumulative else 1))
        self.low = part._tensor(np.where(low == 0, 0.0, np.ceil((low + slack) / step) * step))
        self.high = part._tensor(np.where(high == 0, 0.0, np.floor((high - slack) / step) * step))
        self.has_low, self.has_high = np.isfinite(low).any(axis=0), np.isfinite(high).any(axis=0)
        self.by_ends = self._by_ends(low, high)
        counted = None if one.counted is None else np.asarray(one.counted).tobytes()
        asked = self.has_low.tobytes(), self.has_high.tobytes()
        self.key = one.dims, tuple(one.weights), one.power, one.cumulative, counted, *asked

    def _by_ends(self, low: np.ndarray, high: np.ndarray) -> bool:
        """Whether the ends of each dimension's path say enough, so that no step has to be looked at.

        Where several dimensions are added, the sum of their ends covers every step. What was certified by it stays
        certified: the ends of what is left of a path are never further out. Only a sum over dimensions and steps would
        lose much.
        """
        bounded = np.isfinite(low[0]) | np.isfinite(high[0])
        same = all(np.array_equal(np.isfinite(row), np.isfinite(end[0])) for end in (low, high) for row in end)
        level = all(((end == end[:, bounded][:, :1]) | ~bounded).all() for end in (low, high) if bounded.any())
        if not (same and level and bounded.any()) or (self.cumulative and len(self.amounts) > 1):
            return False
        if any(amount.paths is None for amount in self.amounts):
            return False
        for amount in self.amounts:
            amount.find_ends(bounded)
        self.at = int(np.flatnonzero(bounded)[0])
        self.last = int(np.flatnonzero(bounded)[-1])
        return True

    def holds(self, state: State) -> torch.Tensor:
        """(J, R, K or 1) bool: the sums of each completion, from the present step on, are within their bounds."""
        if self.by_ends and state.steps > 1:
            return self._ends_hold(state)
        t = state.t
        total = self.amounts[0].along(state)
        for amount in self.amounts[1:]:
            total = total + amount.along(state)
        if self.cumulative:
            past: Any = sum(amount.so_far(state) for amount in self.amounts)
            total = total + past[None, :, None, None]
        steps = slice(t, t + total.shape[-1])
        ok = None
        if self.has_high[steps].any():
            ok = (total <= self.high[state.samples, steps][None, :, None]).all(dim=-1)
        if self.has_low[steps].any():
            least = (total >= self.low[state.samples, steps][None, :, None]).all(dim=-1)
            ok = least if ok is None else ok & least
        return _all_true(state, total.device) if ok is None else ok.expand(-1, state.rows, -1)

    def _ends_hold(self, state: State) -> torch.Tensor:
        device = self.high.device
        if state.t > self.last:
            return _all_true(state, device)
        mine = [amount for amount in self.amounts if amount.e == state.d and state.own]
        others = [amount for amount in self.amounts if amount not in mine]
        past = self.amounts[0].so_far(state)[None, :, None] if self.cumulative else 0.0
        ok = None
        for which, bounds, asked in ((0, self.low, self.has_low), (1, self.high, self.has_high)):
            if not asked.any():
                continue
            room = bounds[state.samples, self.at][None, :, None] - past
            for other in others:
                room = room - other.end(state, which)
            end = mine[0].end(state, which) if mine else torch.zeros_like(room)
            fine = end <= room if which else end >= room
            ok = fine if ok is None else ok & fine
        return _all_true(state, device) if ok is None else ok


def _all_true(state: State, device: torch.device) -> torch.Tensor:
    return torch.ones((len(state.laws), state.rows, 1), dtype=torch.bool, device=device)


class ZonePart:
    """A zone of the samples of a component.

    Args:
        part: the component.
        zones: the zone of each sample.
    """

    def __init__(self, part: Component, zones: Sequence[Zone]):
        one = zones[0]
        moves, starts, low, high = positions_of(zones, part.values, part.horizon)
        self.moves = [Amount(part, d, [moves[i]], None, bool(one.delta[i])) for i, d in enumerate(one.dims)]
        self.delta = one.delta
        self.low, self.high, self.origin = part._tensor(low), part._tensor(high), part._tensor(starts)  # (S, n)
        self.steps = part._tensor(np.stack([zone.steps for zone in zones]))

    def holds(self, state: State) -> torch.Tensor:
        """(J, R, K or 1) bool: the path of each completion, from the present step on, stays out of the box."""
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

    def _pieces(self, state: State, i: int, move: Amount) -> tuple[torch.Tensor, torch.Tensor]:
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


class PredicatePart:
    """Asks the user's function about whole chunks; that costs a copy to the host, and all rows at once."""

    def __init__(self, part: Component, terms: Sequence[Predicate]):
        self.terms, self.part = terms, part

    def holds(self, state: State) -> torch.Tensor:
        """(J, R, K or 1) bool: the function allows the chunk that each completion leads to."""
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
