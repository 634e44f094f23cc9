"""How many codes a chunk takes with FAST: the fewest and the most that any can, and a budget for chunks like some data."""

from __future__ import annotations

import numpy as np

from hf_vla_actions.tokenizers.fast import FASTActionTokenizer
from hf_vla_actions.tokenizers.fast_bytes import MAX_CODE_POINT

MARGIN = 1.25
"""Budget of a chunk, in the length of the longest one that was seen."""


def fewest_codes(tokenizer: FASTActionTokenizer, n_values: int) -> int:
    """The fewest codes that can spell `n_values` coefficients; no sequence of fewer is a chunk.

    Exact where codes are whole characters (every tokenizer made by `fit`); where one may end inside a character, as in
    the reference's, it may take a code more.
    """
    spelled = np.unique(tokenizer.tokens.begun[tokenizer.tokens.usable])
    cost = np.full(n_values + 1, n_values)
    cost[0] = 0
    for n in range(1, n_values + 1):
        before = spelled[(spelled > 0) & (spelled <= n)]
        if before.size:
            cost[n] = min(n_values, 1 + cost[n - before].min())
    return int(cost[n_values])


def most_codes(tokenizer: FASTActionTokenizer, horizon: int, dof: int) -> int:
    """As many codes as no chunk exceeds: one a number, or one a byte of it where codes are bytes, as in the reference's."""
    if not tokenizer.byte_level:
        return horizon * dof
    widest = min(tokenizer.limit(horizon) - tokenizer.min_token, MAX_CODE_POINT)
    return horizon * dof * max(1, 1 + (widest > 0x7F) + (widest > 0x7FF) + (widest > 0xFFFF))


def code_budget(tokenizer: FASTActionTokenizer, normalized: np.ndarray) -> int:
    """Codes that a policy may spend on a chunk: a quarter more than the longest of some demonstrated ones takes.

    Any constant chunk fits into it too, so that limits under which nothing else is left never fail for want of codes.
    It is never more than `most_codes`.

    Args:
        tokenizer: of the policy.
        normalized: (n, horizon, dof) demonstrated chunks.
    """
    _, horizon, dof = normalized.shape
    longest = max(map(len, tokenizer.encode(normalized)), default=0)
    still = [len(ids) for ids in tokenizer.encode(np.zeros((1, horizon - 1, dof)))] if horizon > 1 else [0]
    most = most_codes(tokenizer, horizon, dof)
    return min(most, max(int(np.ceil(MARGIN * longest)), still[0] + most // horizon))
