"""One group of coupled dimensions on the device: whether some law completes each beginning within all of its terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_vla_actions.constraints.aims import Aims
from hf_vla_actions.constraints.laws import Aim
from hf_vla_actions.constraints.parts import PredicatePart, SumPart, ZonePart
from hf_vla_actions.constraints.rooms import Rooms
from hf_vla_actions.constraints.tables import LawTables
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
        self.aims = Aims(aims, different, [table.viable for table in different], self) if aims[0] else None
        each: Any = [[sample[i] for sample in terms] for i in range(len(terms[0]))]
        self.sums = [SumPart(self, each[i]) for i in self._kinds(terms, WeightedSum)]
        self.zones = [ZonePart(self, each[i]) for i in zones]
        self.predicates = [PredicatePart(self, each[i]) for i in self._kinds(terms, Predicate)]
        self.rooms = Rooms(self, self.sums) if Rooms.serve(self, self.sums) else None
        self._laws: dict[int, torch.Tensor] = {}

    def paths(self, e: int) -> torch.Tensor:
        """(J, U, T, K, T) codes of dimension e along the laws."""
        if e not in self._paths:
            self._paths[e] = self._stack([table.paths(e) for table in self.tables]).long()
        return self._paths[e]

    def laws(self, escapes: int) -> torch.Tensor:
        """(J,) law that each completion goes on by: after its first step an escape brakes."""
        if escapes not in self._laws:
            self._laws[escapes] = self._tensor(np.array([*range(self.n_laws), *[0] * escapes]))
        return self._laws[escapes]

    @staticmethod
    def _kinds(terms, kind) -> list[int]:
        return [i for i, term in enumerate(terms[0]) if isinstance(term, kind)]

    def _tensor(self, values) -> torch.Tensor:
        return torch.tensor(np.asarray(values), device=self.device)

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
        allowed = self.rooms.allowed(codes, t, d, samples) if self.rooms is not None and own else None
        if allowed is not None:
            return allowed
        state = State(self, codes, t, d, samples, own)
        good: Any = None
        parts: Any = (*self.sums, *self.zones, *self.predicates)
        for part in parts:
            ok = part.holds(state)  # (J, R, K or 1)
            good = ok if good is None else good & ok
        return good.any(dim=0)

    def kept(self, codes: torch.Tensor, t: int, samples: torch.Tensor) -> torch.Tensor:
        """(R, 1): whether step t, all of whose dimensions are decided in codes (R, (t + 1) * dof), kept to the terms."""
        state = State(self, codes, t, self.first.shape[2], samples, own=False, steps=1)
        ok = torch.ones((len(codes), 1), dtype=torch.bool, device=self.device)
        checked: Any = (*self.sums, *self.zones)
        for part in checked:
            ok = ok & part.holds(state)[0]
        return ok


class State:
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
        self.laws = part.laws(2 * len(undecided))
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
