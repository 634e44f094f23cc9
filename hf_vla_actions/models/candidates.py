"""Constraints on tokens that say nothing until a chunk is whole (VQ): other likely chunks, each judged as it comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_vla_actions.constraints import BoundConstraints

CANDIDATES = 16  # chunks that are looked at where the first is not allowed


@dataclass(frozen=True, eq=False)
class Chunks:
    """Decoded chunks, one a row.

    Args:
        tokens: (rows, length) ids, the end token and what comes after it included.
        normalized: (rows, horizon, dof) float64.
        actions: (rows, horizon, dof) real units, settled.
        log_prob: (rows,) of the tokens and the end token under the model.
    """

    tokens: np.ndarray
    normalized: np.ndarray
    actions: np.ndarray
    log_prob: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def replaced(self, rows: np.ndarray, other: Chunks, chosen: np.ndarray) -> Chunks:
        """The same with the chunks `chosen` of `other` in some rows; of tokens of one length."""
        out = {name: np.array(getattr(self, name)) for name in ("tokens", "normalized", "actions", "log_prob")}
        for name, values in out.items():
            values[rows] = getattr(other, name)[chosen]
        return Chunks(**out)


def certified(
    bound: BoundConstraints, chunks: Chunks, more: Callable[[dict[str, Any]], Chunks], n: int, sampled: bool
) -> tuple[Chunks, np.ndarray]:
    """Replace chunks that constraints do not allow by allowed ones, where a few more tries find any.

    A chunk counts as allowed only if projection would return it as it is. Greedy and with beams the candidates are the `n`
    most probable chunks that a beam search finds, and the most probable allowed one is taken. With sampling they are `n`
    draws, and the first allowed one is taken: the chunk is then drawn from the policy's own distribution, conditioned on
    the constraints (rejection sampling).

    Args:
        bound: the constraints.
        chunks: what was decoded; (rows,) of the same sample stand together.
        more: options of `generate` that change to more chunks of each sample.
        n: candidates of each sample; 1 to look at no others.
        sampled: whether `chunks` were drawn.

    Returns:
        the chunks, and (rows,) int64 which candidate each is: 0 the one decoded first, -1 none is allowed (the first
        stays, to be projected).
    """
    rows, held = _allowed(bound, chunks), _held(bound, len(chunks))
    candidate = np.where(rows | held, 0, -1)
    if n == 1 or (rows | held).all():
        return chunks, candidate
    options = {"num_return_sequences": n, "num_beams": 1 if sampled else n, "do_sample": sampled}
    others = more(options)
    n_samples = len(others) // n
    each, good = len(chunks) // n_samples, _allowed(bound, others).reshape(n_samples, n)
    if not sampled:
        good = good & _unlike(chunks.tokens, others.tokens, n_samples)
    # The j-th row of a sample that needs another chunk gets its j-th allowed candidate.
    order = np.argsort(~good, axis=1, kind="stable")
    need = (candidate < 0).reshape(n_samples, each)
    place = np.cumsum(need, axis=1) - 1
    sample, row = np.nonzero(need & (place < good.sum(axis=1, keepdims=True)))
    chosen, at = order[sample, place[sample, row]], sample * each + row
    candidate[at] = chosen + 1
    return chunks.replaced(at, others, sample * n + chosen), candidate


def _allowed(bound: BoundConstraints, chunks: Chunks) -> np.ndarray:
    return bound.excess(chunks.actions).max(axis=1) == 0


def _held(bound: BoundConstraints, rows: int) -> np.ndarray:
    """(rows,) bool: those of samples that are told to hold, whatever is decoded."""
    held = [fallback is not None and fallback.actions is not None for fallback in bound.fallbacks]
    return np.repeat(held or [False], rows // max(len(held), 1))


def _unlike(tokens: np.ndarray, others: np.ndarray, n_samples: int) -> np.ndarray:
    """(n_samples, n) bool: candidates that none of their sample's rows is already."""
    mine = tokens.reshape(n_samples, 1, -1, tokens.shape[-1])
    theirs = others.reshape(n_samples, -1, 1, others.shape[-1])
    return ~(mine == theirs).all(axis=-1).any(axis=-1)
