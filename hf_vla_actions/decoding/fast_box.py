"""Limits on the values of a chunk while its FAST tokens are decoded, with a certificate that the end can be reached.

Every coefficient moves the whole chunk, so a token is judged by the chunk that results if the coefficients after it are
those of a backup: 0 in all frequencies but the mean. If that chunk is within the limits, so is some completion, and the
backup is known to be spellable; the rule holds after every token, hence at the end. What is limited may be the values
themselves or any weighted sums of them over time (positions, changes from step to step): the same rule serves all, as
all are linear in the coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hf_vla_actions.decoding.fast_states import NEVER, Automaton
from hf_vla_actions.errors import ConstraintError, InfeasibleConstraintError
from hf_vla_actions.tokenizers import FASTActionTokenizer

SLACK = 1e-9  # kept from the limits, far above what rounding in the transform can add
ROUNDING = 1e-12  # smaller entries of the transform are zeros


@dataclass(frozen=True, eq=False)
class Sums:
    """Limits on weighted sums over the steps of each dimension, normalized.

    Args:
        weights: (R, horizon) float64: row r speaks of weights[r] @ x[:, d] for each dimension d.
        lower: (R, dof) or (samples, R, dof); -inf where there is none.
        upper: likewise, inf where there is none.
    """

    weights: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True, eq=False)
class Box:
    """Limits of each value of a chunk and of sums over its steps, and the backup that keeps them.

    Args:
        weights: (rows, horizon) float64 what is limited: the values themselves first, then sums.
        lower: (samples, rows, dof) float64 normalized.
        upper: (samples, rows, dof).
        backup: (samples, dof) int64 first coefficients of the backup, a constant chunk.
        ranges: (samples or 1, dof, 2) allowed first coefficients, or None.
        tokenizer: whose tokens.
        automaton: of the tokenizer, for this horizon.
    """

    weights: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    backup: np.ndarray
    ranges: np.ndarray | None
    tokenizer: FASTActionTokenizer
    automaton: Automaton

    @classmethod
    def of(
        cls, lower, upper, sums: Sums | None, ranges, tokenizer, automaton: Automaton, horizon: int, dof: int
    ) -> Box:
        """Check what a caller gave; see `FASTLogitsProcessor`."""
        weights = np.eye(horizon)
        if sums is not None:
            weights = np.concatenate([weights, np.asarray(sums.weights, dtype=np.float64).reshape(-1, horizon)])
        given = {"lower and upper": (lower, upper, horizon)}
        if sums is not None:
            given["the limits of sums"] = (sums.lower, sums.upper, len(weights) - horizon)
        pairs, counts = [], [1 if ranges is None else len(ranges)]
        for low, high, _ in given.values():
            counts += [np.shape(x)[0] for x in (low, high) if np.ndim(x) == 3]
        for name, (low, high, rows) in given.items():
            pairs.append(_limits(name, low, high, (max(counts), rows, dof)))
        if any(count not in (1, max(counts)) for count in counts):
            raise ConstraintError(f"limits for {sorted(set(counts))} samples: give as many for each, or one for all")
        low, high = (np.concatenate(parts, axis=1) for parts in zip(*pairs, strict=True))
        backup = np.zeros((max(counts), dof), dtype=np.int64)
        for i, d in np.ndindex(backup.shape):
            allowed = None if ranges is None else ranges[i % len(ranges), d]
            backup[i, d] = _constant(weights, low[i, :, d], high[i, :, d], allowed, tokenizer, automaton, (i, d))
        return cls(weights, low, high, backup, ranges, tokenizer, automaton)

    @property
    def horizon(self) -> int:
        """Actions in a chunk."""
        return self.weights.shape[1]

    @property
    def dof(self) -> int:
        """Numbers in an action."""
        return self.lower.shape[2]

    @cached_property
    def basis(self) -> np.ndarray:
        """(horizon, rows) float64: what one step of coefficient k adds to each of the rows."""
        from scipy.fft import idct

        whole = idct(np.eye(self.horizon), axis=1, norm="ortho") @ self.weights.T
        return np.where(np.abs(whole) < ROUNDING, 0.0, whole) / self.tokenizer.scale

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


def _limits(name: str, lower, upper, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    try:
        low = np.broadcast_to(np.asarray(-np.inf if lower is None else lower, dtype=np.float64), shape)
        high = np.broadcast_to(np.asarray(np.inf if upper is None else upper, dtype=np.float64), shape)
    except ValueError:
        shapes = [np.shape(x) for x in (lower, upper) if x is not None]
        raise ConstraintError(f"{name} of shapes {shapes} do not fit {shape[1]} x {shape[2]} numbers") from None
    if np.isnan(low).any() or np.isnan(high).any():
        raise ConstraintError(f"{name} must not be NaN; leave a limit open with -inf or inf")
    return low, high


def constants(weights, low, high, allowed, tokenizer: FASTActionTokenizer, automaton: Automaton) -> np.ndarray:
    """First coefficients of constant chunks that keep limits and can be spelled.

    Args:
        weights: (rows, horizon) what is limited.
        low: (rows,) normalized, of one dimension.
        high: (rows,).
        allowed: (2,) lowest and highest first coefficient, or None.
        tokenizer: whose coefficients.
        automaton: of the tokenizer, for this horizon.

    Returns:
        (n,) int64, sorted; empty where there is none.
    """
    c = np.array([c for c in automaton.spelled if tokenizer.can_spell(c)], dtype=np.int64)
    if allowed is not None:
        c = c[(c >= allowed[0]) & (c <= allowed[1])]
    values = c[:, None] * _per_step(weights, tokenizer)
    return np.sort(c[((values >= low + 2 * SLACK) & (values <= high - 2 * SLACK)).all(axis=1)])


def _per_step(weights: np.ndarray, tokenizer: FASTActionTokenizer) -> np.ndarray:
    """(rows,) what one step of the first coefficient adds to each row."""
    sums = np.where(np.abs(weights.sum(axis=1)) < ROUNDING, 0.0, weights.sum(axis=1))
    return sums / (tokenizer.scale * math.sqrt(weights.shape[1]))


def _constant(weights, low, high, allowed, tokenizer, automaton: Automaton, where: tuple[int, int]) -> int:
    """The first coefficient of a constant that stays within limits (rows,): 0 if it can be, else in the middle."""
    inside = constants(weights, low, high, allowed, tokenizer, automaton)
    if len(inside):
        return 0 if 0 in inside else int(inside[len(inside) // 2])
    grain = 1 / (tokenizer.scale * math.sqrt(weights.shape[1]))
    horizon, (sample, dim) = weights.shape[1], where
    lowest, highest = low[:horizon].max() + SLACK, high[:horizon].min() - SLACK
    middle = (max(lowest, -1.0) + min(highest, 1.0)) / 2
    known = [c for c in automaton.spelled if allowed is None or allowed[0] <= c <= allowed[1]]
    raise InfeasibleConstraintError(
        sample=sample,
        step=int(np.argmax(low[:horizon])),
        dim=f"dimension {dim}",
        names=("limits on a FAST chunk",),
        wanted=f"a constant within {lowest:.6g}..{highest:.6g} (normalized)"
        + (" that keeps the limits of sums" if len(weights) > horizon else ""),
        reachable=(min(automaton.spelled) * grain, max(automaton.spelled) * grain),
        nearest=min((c * grain for c in known), key=lambda value: abs(value - middle), default=None),
        bin_width=grain,
        unit=None,
        suggestion="Decoding needs a constant action that keeps them, to fall back to: widen the limits, use a "
        "tokenizer of a larger scale, or decode freely and project the chunk",
    )
