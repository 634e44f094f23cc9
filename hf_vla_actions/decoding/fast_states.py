"""Which FAST tokens can come next: an automaton over the characters a chunk still needs and the bytes of a half-read one.

A state is (r, s): r coefficients are still to be completed, s is what has been read of the next one. UTF-8 says where
characters begin, so s follows from the last few tokens and r from a sum over all of them: no history has to be kept.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hf_vla_actions.tokenizers import FASTActionTokenizer
from hf_vla_actions.tokenizers.fast_bytes import MAX_CODE_POINT, REPLACEMENT, SURROGATES

NEVER = np.iinfo(np.int16).max  # tokens needed where no number of them suffices


@dataclass(frozen=True, eq=False)
class Automaton:
    """What every token does in every state. S states of half-read characters, V codes.

    Args:
        prefixes: (S) bytes of the half-read character, b"" first, shorter ones before longer ones.
        count: (S, V) int64 coefficients that a token completes; -1 where it is not valid.
        after: (S, V) int64 state after it; where it is not valid, that of the token in any state, or 0.
        first: (S, V) int64 the first coefficient that it completes; 0 where none.
        rest: for each token the other coefficients that it completes, (n,) int64.
        begun: (V,) int64 characters whose first byte the token holds.
        spelled: bytes of each allowed coefficient.
    """

    prefixes: tuple[bytes, ...]
    count: np.ndarray
    after: np.ndarray
    first: np.ndarray
    rest: tuple[np.ndarray, ...]
    begun: np.ndarray
    spelled: dict[int, bytes]

    @property
    def longest(self) -> int:
        """Bytes of the longest character."""
        return max(len(raw) for raw in self.spelled.values())


@lru_cache(maxsize=8)
def build(tokenizer: FASTActionTokenizer, limit: int) -> Automaton:
    """The automaton of a tokenizer for coefficients from -limit to limit; all others never appear."""
    spelled = {}
    for coefficient in range(-limit, limit + 1):
        point = coefficient - tokenizer.min_token
        if 0 <= point <= MAX_CODE_POINT and point not in SURROGATES and point != REPLACEMENT:
            spelled[coefficient] = chr(point).encode("utf-8")
    found = {raw[:i] for raw in spelled.values() for i in range(len(raw))}
    if not tokenizer.byte_level:
        found = {b""}  # tokens are whole characters
    prefixes = tuple(sorted(found, key=lambda raw: (len(raw), raw)))
    index = {raw: i for i, raw in enumerate(prefixes)}
    shape = (len(prefixes), tokenizer.n_codes)
    count, after, first = np.full(shape, -1, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    rest = [np.zeros(0, np.int64)] * tokenizer.n_codes
    low, high = min(spelled), max(spelled)
    for v, raw in enumerate(tokenizer.tokens.of):
        if not raw:
            continue
        for s in range(1, len(prefixes)) if tokenizer.tokens.continues[v] else (0,):
            done = _feed(prefixes[s] + raw)
            if done is None:
                continue
            coefficients, pending = done[0] + tokenizer.min_token, done[1]
            inside = (coefficients >= low) & (coefficients <= high) & (done[0] != REPLACEMENT)
            if not inside.all() or pending not in index:
                continue
            count[s, v], after[s, v] = len(coefficients), index[pending]
            if len(coefficients):
                first[s, v], rest[v] = coefficients[0], coefficients[1:]
    # A token that holds the beginning of a character leads to the same state from wherever it is read.
    for v in np.flatnonzero(tokenizer.tokens.begun > 0).tolist():
        valid = np.flatnonzero(count[:, v] >= 0)
        if len(valid):
            after[:, v] = after[valid[0], v]
    return Automaton(prefixes, count, after, first, tuple(rest), tokenizer.tokens.begun, spelled)


def _feed(raw: bytes) -> tuple[np.ndarray, bytes] | None:
    """Code points of the whole characters in some bytes, and the bytes left over; None if it is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(raw)
    except UnicodeDecodeError:
        return None
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64), decoder.getstate()[0]


def fewest_tokens(automaton: Automaton, n: int) -> np.ndarray:
    """(n + 1, S) int64: the fewest tokens that complete exactly r coefficients from state s; NEVER where none do."""
    n_states = len(automaton.prefixes)
    cost = np.full((n + 1, n_states), NEVER, np.int64)
    cost[0, 0] = 0
    steps = []
    for s in range(n_states):
        valid = automaton.count[s] >= 0
        steps.append(np.unique(np.stack([automaton.count[s, valid], automaton.after[s, valid]]), axis=1))
    for r in range(n + 1):
        for s in reversed(range(n_states)):  # a token that completes nothing leads to a longer prefix, done before
            count, after = steps[s][:, steps[s][0] <= r]
            if count.size and (r or s):
                cost[r, s] = min(NEVER, 1 + cost[r - count, after].min())
    return cost


def needed(automaton: Automaton, cost: np.ndarray, remaining: range, allowed: np.ndarray | None = None) -> np.ndarray:
    """Tokens needed up to the end if a token comes next: itself and the fewest after it.

    Args:
        automaton: of the tokenizer.
        cost: (n + 1, S) tokens needed from each state.
        remaining: coefficients still to be completed, one block of rows for each.
        allowed: (len(remaining), S, V) bool, tokens that something else rules out; None if nothing does.

    Returns:
        (len(remaining) * S, V) int16, NEVER where the chunk could not be completed.
    """
    out = np.full((len(remaining), *automaton.count.shape), NEVER, np.int16)
    for i, r in enumerate(remaining):
        valid = (automaton.count >= 0) & (automaton.count <= r)
        if allowed is not None:
            valid &= allowed[i]
        total = 1 + cost[np.where(valid, r - automaton.count, 0), automaton.after]
        out[i] = np.where(valid, np.minimum(total, NEVER), NEVER)
    return out.reshape(-1, automaton.count.shape[1])


def fewest_tokens_at_start(automaton: Automaton, cost: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """`fewest_tokens` where the first positions allow only some tokens: the rows of `cost` for them, computed anew.

    Args:
        automaton: of the tokenizer.
        cost: (n + 1, S) as `fewest_tokens` returns it.
        allowed: (D, S, V) bool tokens that may stand at position 0, 1, ... D - 1.
    """
    cost, n = cost.copy(), len(cost) - 1
    for position in reversed(range(len(allowed))):
        r = n - position
        for s in reversed(range(len(automaton.prefixes))):
            valid = allowed[position, s] & (automaton.count[s] >= 0) & (automaton.count[s] <= r)
            count, after = automaton.count[s, valid], automaton.after[s, valid]
            cost[r, s] = min(NEVER, 1 + cost[r - count, after].min()) if count.size else NEVER
    return cost


def within(automaton: Automaton, ranges: np.ndarray) -> np.ndarray:
    """Which tokens keep the first coefficients of a chunk within ranges.

    Args:
        automaton: of the tokenizer.
        ranges: (D, 2) int lowest and highest value of the coefficient at position 0, 1, ... D - 1.

    Returns:
        (D, S, V) bool: whether the token may stand where the position is the next to be completed.
    """
    n_positions = len(ranges)
    out = np.broadcast_to(automaton.count >= 0, (n_positions, *automaton.count.shape)).copy()
    width = n_positions - 1
    rest = np.zeros((len(automaton.rest), width), np.int64)
    has = np.zeros(rest.shape, dtype=bool)
    for v, coefficients in enumerate(automaton.rest):
        k = min(width, len(coefficients))
        rest[v, :k], has[v, :k] = coefficients[:k], True
    for position in range(n_positions):
        low, high = ranges[position]
        out[position] &= (automaton.count == 0) | ((automaton.first >= low) & (automaton.first <= high))
        for j in range(n_positions - position - 1):
            low, high = ranges[position + 1 + j]
            out[position] &= ~has[:, j] | ((rest[:, j] >= low) & (rest[:, j] <= high))
    return out
