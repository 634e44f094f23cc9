"""A sampler that looks for trouble: it takes whatever the processor leaves at its worst."""

import numpy as np
import torch
from random_specs import FIRST

STYLES = (
    *("largest", "largest", "largest", "smallest", "smallest", "random", "random", "random", "sample"),
    *("zone", "zone", "zone", "far", "far", "alternate", "late", "border", "border", "same", "turn"),
)


class Adversary:
    """Chooses codes for the rows of one case.

    Args:
        case: a `random_specs.Case`.
        rows: how many rows; row r has style r modulo the number of styles.
    """

    def __init__(self, case, rows, rng):
        self.case, self.rng = case, rng
        self.styles = [STYLES[r % len(STYLES)] for r in range(rows)]
        self.values = case.values
        self.actions = np.zeros((rows, case.config.horizon, len(self.values)))
        self.goals = list(zones(case.items))

    def choose(self, position, allowed, scores):
        """(rows,) codes: allowed (rows, K) bool and scores (rows, K) are what the processor left."""
        step, dim = divmod(position, len(self.values))
        values = self.values[dim]
        last = self.case.known.last if step == 0 else None
        codes = np.zeros(len(allowed), dtype=np.int64)
        for row, style in enumerate(self.styles):
            options = np.flatnonzero(allowed[row])
            before = last[dim] if step == 0 else self.actions[row, step - 1, dim]
            wish = self._wish(row, style, step, dim, before, values[options], scores[row, options])
            codes[row] = options[np.argmax(wish)]
            self.actions[row, step, dim] = values[codes[row]]
        return codes

    def _wish(self, row, style, step, dim, before, v, scores):
        horizon = self.actions.shape[1]
        if style == "sample":
            return scores + self.rng.gumbel(size=len(v))
        if style == "random":
            return self.rng.random(len(v))
        if style == "far":
            return np.abs(v - before)
        if style == "same":
            return -np.abs(v - before)
        if style == "border":  # the first, the last, or a value beside a gap
            gap = np.abs(np.diff(v, prepend=v[:1] - 1, append=v[-1:] + 1))
            return np.maximum(gap[1:], gap[:-1]) * (0.5 + self.rng.random(len(v)))
        if style == "zone" and self.goals:
            dims, center = self.goals[row % len(self.goals)]
            if dim in dims:
                here = 0.0
                if self.case.robot.delta[dim]:
                    here = self.case.known.pose[dim] + self.actions[row, :step, dim].sum()
                return -np.abs(here + v - center[dims.index(dim)])
            return self.rng.random(len(v))
        down = (
            style == "smallest"
            or (style == "alternate" and step % 2 == 1)
            or (style == "late" and step >= horizon // 2)
            or (style in ("turn", "zone") and (row + dim) % 2 == 0)
        )
        return -v if down else v


def zones(items):
    for item in items:
        if item["kind"] == "KeepOut":
            yield item["dims"], [(a + b) / 2 for a, b in zip(item["low"], item["high"], strict=True)]
        for parts in item.get("alternatives", []):
            yield from zones(parts)


class DeadEnd(Exception):
    """The processor left a row without a token, or raised, in the middle of a chunk."""


def drive(processor, case, rows, rng, prompt=3, dtype=torch.float32):
    """Decode `rows` chunks against the adversary: (rows, T, D) as `config.decode` returns them."""
    config = case.config
    n_codes, n_tokens = config.tokenizer.n_codes, config.n_tokens()
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    ids = torch.ones(rows, prompt, dtype=torch.long)
    adversary = Adversary(case, rows, rng)
    table = torch.tensor(config.vocabulary.token_ids.copy())
    for position in range(n_tokens + 1):
        scores = (torch.randn(rows, FIRST + n_codes + 3, generator=generator) * 5).to(dtype)
        try:
            result = processor(ids, scores)
        except Exception as error:
            raise DeadEnd(f"position {position}: {type(error).__name__}: {error}") from error
        left = torch.isfinite(result)
        if position == n_tokens:
            assert (left.sum(1) == 1).all()
            assert left[:, config.vocabulary.end_token_id].all()
            break
        allowed = left[:, table].numpy()
        if (left.sum(1).numpy() != allowed.sum(1)).any():
            raise DeadEnd(f"position {position}: a token that is no action has a finite score")
        if not allowed.any(axis=1).all():
            raise DeadEnd(f"position {position}: no token in row {int(np.argmin(allowed.any(axis=1)))}")
        codes = adversary.choose(position, allowed, result[:, table].double().numpy())
        ids = torch.cat([ids, table[torch.from_numpy(codes)][:, None]], dim=1)
    return config.decode(ids[:, prompt:].numpy())[1]
