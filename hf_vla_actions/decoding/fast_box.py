"""Limits on the values of a chunk while its FAST tokens are decoded, with a certificate that the end can be reached.

Every coefficient moves the whole chunk, so a token is judged by the chunk that results if the coefficients after it are
those of a backup: 0 in all frequencies but the mean. If that chunk is within the limits, so is some completion, and the
backup is known to be spellable; the rule holds after every token, hence at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_vla_actions.decoding.fast_states import NEVER, Automaton
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError
from hf_vla_actions.tokenizers import FASTActionTokenizer

if TYPE_CHECKING:
    from hf_vla_actions.decoding.fast import State

SLACK = 1e-9  # kept from the limits, far above what rounding in the transform can add
NUMBERS = 2**20  # worked on at once


@dataclass(frozen=True, eq=False)
class Box:
    """Limits of each value of a chunk, and the backup that keeps them.

    Args:
        lower: (samples, horizon, dof) float64 normalized.
        upper: (samples, horizon, dof).
        backup: (samples, dof) int64 first coefficients of the backup, a constant chunk.
        ranges: (samples or 1, dof, 2) allowed first coefficients, or None.
        tokenizer: whose tokens.
        automaton: of the tokenizer, for this horizon.
    """

    lower: np.ndarray
    upper: np.ndarray
    backup: np.ndarray
    ranges: np.ndarray | None
    tokenizer: FASTActionTokenizer
    automaton: Automaton

    @classmethod
    def of(cls, lower, upper, ranges, tokenizer, automaton: Automaton, horizon: int, dof: int) -> Box:
        """Check what a caller gave; see `FASTLogitsProcessor`."""
        shapes = [np.shape(x) for x in (lower, upper) if x is not None]
        n_samples = max([shape[0] for shape in shapes if len(shape) == 3] + [1 if ranges is None else len(ranges)])
        full = (n_samples, horizon, dof)
        try:
            low = np.broadcast_to(np.asarray(-np.inf if lower is None else lower, dtype=np.float64), full)
            high = np.broadcast_to(np.asarray(np.inf if upper is None else upper, dtype=np.float64), full)
        except ValueError:
            raise ConstraintError(
                f"lower and upper of shapes {shapes} do not fit chunks of {horizon} x {dof}"
            ) from None
        if np.isnan(low).any() or np.isnan(high).any():
            raise ConstraintError("lower and upper must not be NaN; leave a limit open with -inf or inf")
        if ranges is not None and len(ranges) not in (1, n_samples):
            raise ConstraintError(f"dc_ranges for {len(ranges)} samples, limits for {n_samples}")
        backup = np.array(
            [
                [
                    _constant(
                        low[i, :, d],
                        high[i, :, d],
                        None if ranges is None else ranges[i % len(ranges), d],
                        tokenizer,
                        automaton,
                        (i, d),
                    )
                    for d in range(dof)
                ]
                for i in range(n_samples)
            ]
        )
        return cls(low, high, backup, ranges, tokenizer, automaton)

    @property
    def horizon(self) -> int:
        """Actions in a chunk."""
        return self.lower.shape[1]

    @property
    def dof(self) -> int:
        """Numbers in an action."""
        return self.lower.shape[2]

    @cached_property
    def basis(self) -> np.ndarray:
        """(horizon, horizon) float64: what one step of coefficient k adds to the value at step t."""
        from scipy.fft import idct

        return idct(np.eye(self.horizon), axis=1, norm="ortho") / self.tokenizer.scale

    @cached_property
    def _pieces(self) -> frozenset[bytes]:
        valid = np.any(self.automaton.count >= 0, axis=0).tolist()
        return frozenset(raw for raw, ok in zip(self.tokenizer.tokens.of, valid, strict=True) if raw and ok)

    @cached_property
    def _zeros(self) -> list[int]:
        """Fewest tokens for the backup from each byte on, behind the first coefficients: 0, 0, ... to the end."""
        whole = self.automaton.spelled[0] * (self.horizon * self.dof - self.dof)
        longest = self.automaton.spelled[0] * (max(map(len, self._pieces)) + 1)
        return _path(whole, {piece for piece in self._pieces if piece in longest}, [0])

    def path_costs(self, sample: int) -> np.ndarray:
        """(n + 1, S) int64: tokens that spell the backup from each state on; NEVER where none do."""
        n, spelled, sample = self.horizon * self.dof, self.automaton.spelled, sample % len(self.backup)
        values = [spelled[int(c)] for c in self.backup[sample]] + [spelled[0]] * (n - self.dof)
        costs = _path(b"".join(values), self._pieces, self._zeros)
        starts = np.cumsum([0] + [len(raw) for raw in values])
        out = np.full((n + 1, len(self.automaton.prefixes)), NEVER, np.int64)
        for position in range(n + 1):
            rest = costs[starts[position]]
            out[n - position, 0] = rest
            if position < n:
                for s in range(1, out.shape[1]):
                    _, tokens = self.completions(sample)[min(position, self.dof)][s]
                    out[n - position, s] = min(NEVER, tokens + costs[starts[position + 1]])
        return out

    def completions(self, sample: int) -> list[list[tuple[int, int]]]:
        """What a half-read character becomes if the backup follows.

        Returns:
            for each position 0, 1, ... dof - 1 and all later ones, for each state: the coefficient nearest to the
            backup's that begins with what was read, and the tokens that it takes; (0, NEVER) where there is none.
        """
        if sample not in self._completions:
            aims = [int(c) for c in self.backup[sample]] + [0]
            ranges = None if self.ranges is None else self.ranges[sample % len(self.ranges)]
            found = []
            for position, aim in enumerate(aims):
                inside = ranges is not None and position < self.dof
                low, high = ranges[position] if inside and ranges is not None else (-math.inf, math.inf)
                found.append([self._complete(s, aim, low, high) for s in range(len(self.automaton.prefixes))])
            self._completions[sample] = found
        return self._completions[sample]

    @cached_property
    def _completions(self) -> dict[int, list[list[tuple[int, int]]]]:
        return {}

    def _complete(self, s: int, aim: int, low: float, high: float) -> tuple[int, int]:
        prefix = self.automaton.prefixes[s]
        begins = [c for c, raw in self.automaton.spelled.items() if raw.startswith(prefix) and low <= c <= high]
        for coefficient in sorted(begins, key=lambda c: abs(c - aim)) if prefix else ():
            tokens = _path(self.automaton.spelled[coefficient][len(prefix) :], self._pieces, [0])[0]
            if tokens < NEVER:
                return coefficient, tokens
        return 0, NEVER


def _path(whole: bytes, pieces, tail: list[int]) -> list[int]:
    """Fewest pieces that some bytes can be cut into, from each byte on; `tail` holds those of the last bytes.

    Returns:
        for each of len(whole) + 1 places; NEVER where it is impossible.
    """
    lengths = sorted({len(piece) for piece in pieces})
    costs = [NEVER] * (len(whole) + 1 - len(tail)) + list(tail)
    for start in reversed(range(len(whole) + 1 - len(tail))):
        for length in lengths:
            if start + length > len(whole):
                break
            if costs[start + length] + 1 < costs[start] and whole[start : start + length] in pieces:
                costs[start] = costs[start + length] + 1
    return costs


def _constant(low, high, allowed, tokenizer, automaton: Automaton, where: tuple[int, int]) -> int:
    """The first coefficient of a constant that stays within limits (horizon,): 0 if it can be, else in the middle."""
    grain = 1 / (tokenizer.scale * math.sqrt(len(low)))
    lowest, highest = low.max() + SLACK, high.min() - SLACK
    inside = [
        c
        for c in automaton.spelled
        if lowest <= c * grain <= highest
        and tokenizer.can_spell(c)
        and (allowed is None or allowed[0] <= c <= allowed[1])
    ]
    if not inside:
        sample, dim = where
        middle = (max(lowest, -1.0) + min(highest, 1.0)) / 2
        known = [c for c in automaton.spelled if allowed is None or allowed[0] <= c <= allowed[1]]
        raise InfeasibleConstraintError(
            sample=sample,
            step=int(np.argmax(low)),
            dim=f"dimension {dim}",
            names=("limits on the values of a FAST chunk",),
            wanted=f"a constant within {lowest:.6g}..{highest:.6g} (normalized)",
            reachable=(min(automaton.spelled) * grain, max(automaton.spelled) * grain),
            nearest=min((c * grain for c in known), key=lambda value: abs(value - middle), default=None),
            bin_width=grain,
            unit=None,
            suggestion="Decoding needs a constant action that keeps them, to fall back to: widen the limits, use a "
            "tokenizer of a larger scale, or decode freely and project the chunk",
        )
    return 0 if 0 in inside else sorted(inside)[len(inside) // 2]


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
    it changes several of the same dimension, their sum is worked out at every step of the chunk.
    """

    dof: int
    lower: torch.Tensor  # (samples, dof, horizon) float64
    upper: torch.Tensor
    basis: torch.Tensor  # (horizon, horizon) float64
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
        widest = len(self.basis) * max(len(self.joint.token), self.dof * len(self.basis))
        parts = zip(*(x.split(max(1, NUMBERS // widest)) for x in (now, position, s, sample)), strict=True)
        return torch.cat([self._keeps(*part) for part in parts])

    def chunk(self, state: State, sample: torch.Tensor) -> torch.Tensor:
        """(rows, dof, horizon) float64: the decoded chunk if the backup follows what is completed so far."""
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
        room = torch.stack([self.lower[sample] - now, self.upper[sample] - now])  # (2, rows, dof, horizon)
        # How far each coefficient may move: the interval of x with x * basis within the room at every step.
        bounds = room[..., None, :] / self.basis  # (2, rows, dof, frequency, horizon)
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
