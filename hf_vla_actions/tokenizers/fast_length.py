"""How many codes a chunk takes with FAST: the fewest that any can, and a budget for chunks like those of some data."""

from __future__ import annotations

import numpy as np

from hf_vla_actions.tokenizers.fast import FASTActionTokenizer

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


def code_budget(tokenizer: FASTActionTokenizer, normalized: np.ndarray) -> int:
    """Codes that a policy may spend on a chunk: a quarter more than the longest of some demonstrated ones takes.

    Any constant chunk fits into it too, so that limits under which nothing else is left never fail for want of codes.
    It is never more than one code a number.

    Args:
        tokenizer: of the policy.
        normalized: (n, horizon, dof) demonstrated chunks.
    """
    _, horizon, dof = normalized.shape
    longest = max(map(len, tokenizer.encode(normalized)), default=0)
    still = [len(ids) for ids in tokenizer.encode(np.zeros((1, horizon - 1, dof)))] if horizon > 1 else [0]
    return min(horizon * dof, max(int(np.ceil(MARGIN * longest)), still[0] + dof))
