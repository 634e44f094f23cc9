"""All sums of a component at once, where no step has to be looked at: the room that is left for the next code.

Along a law, what a code leads to is a number for each bound; the codes that fit into the room left by everything else
are found by bisection, and are codes next to each other: bounds of intervals instead of tables of all codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from hf_vla_actions.constraints.component import Component
    from hf_vla_actions.constraints.parts import SumPart


@dataclass(frozen=True, eq=False)
class _Plan:
    """One position; I bounds, J laws, K codes, n dimensions other than the present one.

    `asked` are the tokens that say something, as columns of the decided codes.
    """

    past: torch.Tensor  # (p * K, I): what each code of the steps before adds
    past_at: torch.Tensor  # (p,) columns
    past_first: torch.Tensor  # (p,) where the entries of each begin
    others: torch.Tensor  # (n * K, I * J): what it adds from here on, by each law
    others_at: torch.Tensor  # (n,) columns
    others_first: torch.Tensor  # (n,)
    rising: torch.Tensor  # (I * J, K): what the codes of the present dimension add, sorted
    row: torch.Tensor  # (I * J, 1): where the entries of each row of `ends` begin
    ends: torch.Tensor  # (2, I * J * (K + 1)) int16: lowest of the first c sorted codes, and minus the highest


class Rooms:
    """Sums that are judged by their ends; all samples share one table of laws.

    Args:
        part: the component.
        sums: its sums.
    """

    def __init__(self, part: Component, sums: Sequence[SumPart]):
        self.part, self.sums = part, sums
        self.rows = [(s, which) for s in sums for which in (0, 1) if (s.has_low, s.has_high)[which].any()]
        bounds = [(-s.low, s.high)[which][:, s.at] for s, which in self.rows]
        steps = torch.arange(part.horizon, device=part.device)
        ended = torch.stack([steps > s.last for s, _ in self.rows], dim=1)  # (T, I)
        self.bounds = torch.where(ended[:, None], torch.inf, torch.stack(bounds, dim=1)).contiguous()  # (T, S, I)
        self.starts: dict[int, torch.Tensor] = {}
        codes = torch.arange(part.values.shape[1], device=part.device, dtype=torch.int16)
        self.codes = torch.stack([codes, -codes])[:, None, None]  # (2, 1, 1, K)
        self.key = ("rooms", str(part.device), *[s.key for s in sums])

    @staticmethod
    def serve(part: Component, sums: Sequence[SumPart]) -> bool:
        """Whether they can say what a component allows."""
        plain = not part.zones and not part.predicates and part.aims is None and len(part.tables) == 1
        return plain and all(s.by_ends for s in sums)

    def allowed(self, codes: torch.Tensor, t: int, d: int, samples: torch.Tensor) -> torch.Tensor | None:
        """(R, K) bool: codes of dimension d at step t that some law completes; None if they are no intervals."""
        key = (*self.key, t, d)
        memory = self.part.tables[0].plans
        if key not in memory:
            memory[key] = self._plan(t, d)
        plan = memory[key]
        if plan is None:
            return None
        rows, n = len(codes), len(self.rows)
        room = self.bounds[t].index_select(0, samples)
        if t:
            at = codes.index_select(1, plan.past_at) + plan.past_first
            room = room - plan.past.index_select(0, at.view(-1)).view(rows, -1, n).sum(dim=1)
        room = room[:, :, None].expand(-1, -1, self.part.n_laws).reshape(rows, -1)
        if len(plan.others_at):
            at = codes.index_select(1, plan.others_at) + plan.others_first
            room = room - plan.others.index_select(0, at.view(-1)).view(rows, len(plan.others_at), -1).sum(dim=1)
        if not t:
            room = room - self._start(d).index_select(0, samples)
        fit = torch.searchsorted(plan.rising, room.t().contiguous(), right=True)  # (I * J, R)
        ends = plan.ends.index_select(1, (fit + plan.row).view(-1)).view(2, n, -1, rows).amax(dim=1)
        inside = self.codes >= ends[..., None]  # (2, J, R, K)
        return (inside[0] & inside[1]).any(dim=0)

    def _ends_of(self, i: int, e: int, t: int) -> torch.Tensor | None:
        """(J, K) what codes of dimension e at step t lead to, by bound i; None if it does not count there."""
        total, which = self.rows[i]
        for amount in total.amounts:
            if amount.e == e:
                return amount.ends[which][:, 0, t] * (1.0 if which else -1.0)  # type: ignore[index]
        return None

    def _start(self, d: int) -> torch.Tensor:
        """(S, I * J) what the dimensions after d add from step 0 on."""
        if d not in self.starts:
            part = self.part
            out = torch.zeros((len(part.first), len(self.rows), part.n_laws), dtype=torch.float64, device=part.device)
            for i in range(len(self.rows)):
                for e in part.dims:
                    ends = self._ends_of(i, e, 0)
                    if e > d and ends is not None:
                        out[:, i] += ends.gather(1, part.first[:, : part.n_laws, e].T).T
            self.starts[d] = out.reshape(len(out), -1)
        return self.starts[d]

    def _plan(self, t: int, d: int) -> _Plan | None:
        part, n = self.part, len(self.rows)
        n_laws, n_codes, dof = part.n_laws, part.values.shape[1], part.first.shape[2]
        zero = torch.zeros((n_laws, n_codes), dtype=torch.float64, device=part.device)
        others, others_at = [], []
        for e in part.dims:
            if e == d or (e > d and not t):
                continue
            ends = torch.stack([zero if (x := self._ends_of(i, e, t)) is None else x for i in range(n)])  # (I, J, K)
            if e > d:
                ends = ends.gather(2, part.following[e][:, 0, t].expand(n, -1, -1))
            others.append(ends.permute(2, 0, 1).reshape(n_codes, -1))
            others_at.append((t - (e > d)) * dof + e)
        past, past_at = [], []
        for s in range(t):
            for e in part.dims:
                added = [self._added(i, e, s) for i in range(n)]
                past.append(torch.stack(added, dim=1))
                past_at.append(s * dof + e)
        own = torch.stack([zero if (x := self._ends_of(i, d, t)) is None else x for i in range(n)]).reshape(
            -1, n_codes
        )
        intervals = _intervals(own.cpu().numpy())
        if intervals is None:
            return None
        return _Plan(
            *self._table(past, past_at, n),
            *self._table(others, others_at, n * n_laws),
            own.sort(dim=1).values.contiguous(),
            part._tensor(np.arange(n * n_laws)[:, None] * (n_codes + 1)),
            part._tensor(intervals.reshape(2, -1)),
        )

    def _added(self, i: int, e: int, s: int) -> torch.Tensor:
        """(K,) what codes of dimension e at step s add to the sums after it, by bound i."""
        total, which = self.rows[i]
        for amount in total.amounts if total.cumulative else ():
            if amount.e == e and (amount.counted is None or bool(amount.counted[s])):
                return amount.codes[0] * (1.0 if which else -1.0)
        return torch.zeros(self.part.values.shape[1], dtype=torch.float64, device=self.part.device)

    def _table(
        self, rows: list[torch.Tensor], at: list[int], width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        part, n_codes = self.part, self.part.values.shape[1]
        empty = torch.zeros((0, width), dtype=torch.float64, device=part.device)
        first = np.arange(len(at), dtype=np.int64) * n_codes
        return torch.cat(rows) if rows else empty, part._tensor(np.array(at, dtype=np.int64)), part._tensor(first)


def _intervals(rows: np.ndarray) -> np.ndarray | None:
    """(2, n, K + 1) lowest and minus highest of the first c codes (n, K) in rising order; None if some lie between."""
    n, n_codes = rows.shape
    order = np.argsort(rows, axis=1, kind="stable")
    ends = np.empty((2, n, n_codes + 1), dtype=np.int16)
    ends[0, :, 0], ends[1, :, 0] = n_codes, 1  # no code is as high as K, none has a minus above 0
    ends[0, :, 1:] = np.minimum.accumulate(order, axis=1)
    ends[1, :, 1:] = -np.maximum.accumulate(order, axis=1)
    rising = np.take_along_axis(rows, order, axis=1)
    met = np.ones((n, n_codes + 1), dtype=bool)
    met[:, 1:-1] = rising[:, 1:] > rising[:, :-1]
    count = 1 - ends[1].astype(np.int64) - ends[0]
    count[:, 0] = 0
    return ends if (count == np.arange(n_codes + 1))[met].all() else None
