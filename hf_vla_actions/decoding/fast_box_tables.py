"""The certificate of a box, worked out for all tokens at once on one device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_vla_actions.decoding.fast_box import SLACK, Box

if TYPE_CHECKING:
    from hf_vla_actions.decoding.fast import State

NUMBERS = 2**20  # worked on at once


@dataclass(frozen=True)
class _Entries:
    """E coefficients of tokens that move a chunk away from its backup, on one device."""

    token: torch.Tensor  # (E,) int64
    offset: torch.Tensor  # (E,) int64 place within the token
    value: torch.Tensor  # (E,) int64, of entries that do not depend on the state
    firsts: torch.Tensor  # (n,) int64 entries that are the first coefficient of a token
    halves: torch.Tensor  # (m,) int64 entries that are the half-read coefficient at its end

    @classmethod
    def on(cls, table: np.ndarray, device: torch.device) -> _Entries:
        """Entries of a table (E, 4): token, offset, value, kind (0: that value; 1: first; 2: half-read)."""
        arrays = [*table[:, :3].T, np.flatnonzero(table[:, 3] == 1), np.flatnonzero(table[:, 3] == 2)]
        return cls(*(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays))


@dataclass(frozen=True)
class BoxTables:
    """The box on one device.

    A token that changes one coefficient of a dimension is judged by the interval that this coefficient may be in; where
    it changes several of the same dimension, their sum is worked out in every bounded row.
    """

    dof: int
    lower: torch.Tensor  # (samples, dof, rows) float64
    upper: torch.Tensor
    basis: torch.Tensor  # (horizon, rows) float64: what one step of each frequency adds to each bounded row
    backup: torch.Tensor  # (samples, dof + 1) int64; the last is that of all later positions, 0
    completions: torch.Tensor  # (samples, dof + 1, S) int64
    count: torch.Tensor  # (S, V + 1) int64
    first: torch.Tensor  # (S, V + 1) int64
    after: torch.Tensor  # (S, V + 1) int64
    rest_place: torch.Tensor  # (V + 1, K) int64 offset of each coefficient that is not 0, behind the first
    rest_value: torch.Tensor  # (V + 1, K) int64; 0 where there are fewer than K
    single: _Entries  # the only one of their token in a dimension
    joint: _Entries  # the others, first those that begin a group of the same token and dimension
    place: torch.Tensor  # (G,) int64 offset modulo dof of each group
    more: tuple[tuple[int, torch.Tensor], ...]  # joint entries in slices: where each begins, and their groups
    group_token: torch.Tensor  # (G,) int64

    @classmethod
    def on(cls, box: Box, device: torch.device) -> BoxTables:
        """The tables of a box on a device."""
        a, dof, n = box.automaton, box.dof, box.horizon * box.dof
        completions = np.array([[[c for c, _ in row] for row in box.completions(i)] for i in range(len(box.backup))])
        moved = box.backup.any() or completions.any()
        entries: list[tuple[int, int, int, int]] = []
        valid, pending = np.any(a.count >= 0, axis=0).tolist(), (a.count >= 0) & (a.after > 0)
        rest = []
        for v, coefficients in enumerate(a.rest):
            coefficients = coefficients[:n]
            places = np.flatnonzero(coefficients)
            rest.append((places + 1, coefficients[places]))
            if not valid[v]:
                continue
            if moved or a.first[:, v].any():
                entries.append((v, 0, 0, 1))
            zeros = [j for j in range(min(dof - 1, len(coefficients))) if not coefficients[j]]
            listed = [*places.tolist(), *(zeros if box.backup.any() else [])]
            entries += [(v, j + 1, int(coefficients[j]), 0) for j in listed]
            if moved and pending[:, v].any():
                entries.append((v, int(a.count[np.argmax(pending[:, v]), v]), 0, 2))
        table = np.array(entries, dtype=np.int64).reshape(-1, 4)
        _, group, sizes = np.unique(table[:, 0] * dof + table[:, 1] % dof, return_inverse=True, return_counts=True)
        alone = sizes[group] == 1
        joint, (keys, group) = table[~alone], np.unique(group[~alone], return_inverse=True)
        order = np.lexsort((group, _rank(group)))
        joint, group = joint[order], group[order]
        leaders = joint[: len(keys)]
        width = max(len(places) for places, _ in rest)
        padded = [np.zeros((len(rest) + 1, max(width, 1)), np.int64) for _ in range(2)]
        for v, pair in enumerate(rest):
            for array, values in zip(padded, pair, strict=True):
                array[v, : len(values)] = values
        arrays = {
            "lower": box.lower.transpose(0, 2, 1) + SLACK,
            "upper": box.upper.transpose(0, 2, 1) - SLACK,
            "basis": box.basis,
            "backup": np.pad(box.backup, ((0, 0), (0, 1))),
            "completions": completions,
            "count": np.pad(np.maximum(a.count, 0), ((0, 0), (0, 1))),
            "first": np.pad(a.first, ((0, 0), (0, 1))),
            "after": np.pad(a.after, ((0, 0), (0, 1))),
            "rest_place": padded[0],
            "rest_value": padded[1],
            "place": leaders[:, 1] % dof,
            "group_token": leaders[:, 0],
        }
        parts: dict[str, Any] = {n: torch.from_numpy(np.ascontiguousarray(a)).to(device) for n, a in arrays.items()}
        parts |= {"single": _Entries.on(table[alone], device), "joint": _Entries.on(joint, device)}
        return cls(dof=dof, **parts, more=_slices(group, device)[1:])

    def keeps(self, state: State, sample: torch.Tensor) -> torch.Tensor:
        """(rows, V) bool: the codes after which the chunk is within the limits if the backup follows.

        Args:
            state: where each row stands.
            sample: (rows,) int64 whose limits.
        """
        sample = sample % len(self.lower)
        position, s = state.completed[:, -1].clamp(0, self.dof * len(self.basis)), state.half_read[:, -1]
        now = self.chunk(state, sample)
        widest = self.basis.shape[1] * max(len(self.joint.token), self.dof * len(self.basis))
        parts = zip(*(x.split(max(1, NUMBERS // widest)) for x in (now, position, s, sample)), strict=True)
        return torch.cat([self._keeps(*part) for part in parts])

    def chunk(self, state: State, sample: torch.Tensor) -> torch.Tensor:
        """(rows, dof, R) float64: the bounded rows of the chunk if the backup follows what is completed so far."""
        n, rows = self.dof * len(self.basis), len(sample)
        before, at = state.half_read[:, :-1], state.completed[:, :-1].clamp(0, n - 1)
        codes = state.codes[:, 1:]
        coefficients = torch.zeros(rows, n, dtype=torch.float64, device=codes.device)
        has_first = self.count[before, codes] > 0
        coefficients.scatter_add_(1, at, torch.where(has_first, self.first[before, codes], 0).double())
        places = (at[..., None] + self.rest_place[codes]).clamp(max=n - 1)
        coefficients.scatter_add_(1, places.flatten(1), self.rest_value[codes].flatten(1).double())
        place = torch.arange(n, device=codes.device)
        backup = self.backup[sample][:, place.clamp(max=self.dof)].double()
        coefficients = torch.where(place < state.completed[:, -1:], coefficients, backup)
        return torch.einsum("bkd,kt->bdt", coefficients.view(rows, len(self.basis), self.dof), self.basis)

    def _keeps(self, now, position, s, sample) -> torch.Tensor:
        rows, horizon = len(now), len(self.basis)
        keeps = torch.ones(rows, self.count.shape[1] - 1, dtype=torch.int8, device=now.device)
        room = torch.stack([self.lower[sample] - now, self.upper[sample] - now])  # (2, rows, dof, R)
        # How far each coefficient may move: the interval of x with x * basis within the room in every row.
        bounds = room[..., None, :] / self.basis  # (2, rows, dof, frequency, R)
        least = torch.where(self.basis == 0, -torch.inf, bounds.amin(0)).amax(-1).transpose(1, 2).flatten(1)
        most = torch.where(self.basis == 0, torch.inf, bounds.amax(0)).amin(-1).transpose(1, 2).flatten(1)
        moved, at = self._moved(self.single, position, s, sample)
        at = at.clamp(max=least.shape[1] - 1)
        inside = (moved >= least.gather(1, at)) & (moved <= most.gather(1, at))
        tokens = self.single.token.expand(rows, -1)
        keeps.scatter_reduce_(1, tokens, inside.to(torch.int8), "amin")
        if len(self.group_token):
            moved, at = self._moved(self.joint, position, s, sample)
            added = self.basis[(at // self.dof).clamp(max=horizon - 1)] * moved.double()[..., None]
            total = added[:, : len(self.place)]
            for begin, groups in self.more:
                total[:, groups] += added[:, begin : begin + len(groups)]
            dim = (position[:, None] + self.place) % self.dof  # (rows, G)
            left = room[:, torch.arange(rows, device=now.device)[:, None], dim]
            inside = ((total >= left[0]) & (total <= left[1])).all(dim=-1)
            keeps.scatter_reduce_(1, self.group_token.expand(rows, -1), inside.to(torch.int8), "amin")
        return keeps > 0

    def _moved(self, entries: _Entries, position, s, sample) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, E) int64 how far each entry is from the backup, and its position in the chunk."""
        row, state = sample[:, None], s[:, None]
        at = position[:, None] + entries.offset
        early = at.clamp(max=self.dof)
        aim = self.backup[row, early]
        value = entries.value.expand(len(s), -1).clone()
        tokens = entries.token[entries.firsts]
        first = self.first[state, tokens]
        value[:, entries.firsts] = torch.where(self.count[state, tokens] > 0, first, aim[:, entries.firsts])
        after = self.after[state, entries.token[entries.halves]]
        half = self.completions[row, early[:, entries.halves], after]
        value[:, entries.halves] = torch.where(after > 0, half, aim[:, entries.halves])
        return value - aim, at


def _rank(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(values)])
    rank = np.empty(len(values), np.int64)
    rank[order] = np.arange(len(values)) - np.repeat(starts, np.diff(np.append(starts, len(values))))
    return rank


def _slices(values: np.ndarray, device: torch.device) -> tuple[tuple[int, torch.Tensor], ...]:
    """Values ordered by rank, cut where the rank changes: where each slice begins, and its values (all different)."""
    rank = _rank(values)
    begins = np.append(np.flatnonzero(np.append(True, rank[1:] != rank[:-1])[: len(values)]), len(values))
    return tuple((int(a), torch.from_numpy(np.ascontiguousarray(values[a:b])).to(device)) for a, b in pairwise(begins))
