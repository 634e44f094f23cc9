"""What action tokenizers cost and lose on the same chunks: length, use of the codes, errors in real units."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from hf_vla_actions.actions import ActionSpace, ActionStats
from hf_vla_actions.errors import ActionTokenError

SHOWN = {"m": (1e3, "mm"), "cm": (10.0, "mm"), "rad": (180 / np.pi, "deg")}


class Coder(Protocol):
    """An action tokenizer, or what encodes and decodes like one."""

    @property
    def n_codes(self) -> int:
        """How many codes there are."""

    def encode(self, normalized: np.ndarray) -> Any:
        """Codes of chunks (n, horizon, dof): an array (n, n_tokens) or a list of arrays."""

    def decode(self, codes: Any, horizon: int, dof: int) -> np.ndarray:
        """Chunks (n, horizon, dof) of codes."""


@dataclass(frozen=True)
class TokenizerCost:
    """One tokenizer on some chunks.

    Args:
        name: of the tokenizer.
        horizon: actions in a chunk.
        n_codes: different codes there are.
        tokens: codes a chunk, mean.
        tokens_p99: codes a chunk, 99th percentile.
        tokens_per_second: where every action of a chunk is carried out; None where the control rate is unknown.
        used: share of the codes that occur.
        perplexity: exp(entropy) of how often they occur: as many codes, evenly used, would carry as much.
        rmse: (dof) root mean square of the error that coding adds, in `units`.
        p99: (dof) 99th percentile of its absolute value.
        max: (dof) its largest absolute value.
        names: (dof) of the dimensions.
        units: (dof) of the errors: mm for lengths, deg for angles; None where there is none.
    """

    name: str
    horizon: int
    n_codes: int
    tokens: float
    tokens_p99: float
    tokens_per_second: float | None
    used: float
    perplexity: float
    rmse: tuple[float, ...]
    p99: tuple[float, ...]
    max: tuple[float, ...]
    names: tuple[str, ...]
    units: tuple[str | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def cost_of(
    name: str,
    coder: Coder,
    normalized: np.ndarray,
    stats: ActionStats,
    space: ActionSpace,
    rate_hz: float | None = None,
) -> TokenizerCost:
    """Encode and decode chunks and measure.

    Args:
        name: for the table.
        coder: the tokenizer.
        normalized: (n, horizon, dof) within [-1, 1], best such that nothing was fitted to them.
        stats: what turned the actions into `normalized`; errors are those of the numbers it gives back.
        space: names and units.
        rate_hz: control rate.
    """
    x = np.asarray(normalized, dtype=np.float64)
    if x.ndim != 3 or not x.size or x.shape[-1] != space.dof:
        raise ActionTokenError(f"chunks are (n, horizon, {space.dof}), got shape {x.shape}")
    _, horizon, dof = x.shape
    codes = coder.encode(x)
    lengths = np.array([len(row) for row in codes])
    flat = np.concatenate([np.asarray(row).reshape(-1) for row in codes])
    share = np.bincount(flat, minlength=coder.n_codes) / len(flat)
    entropy = -float(np.sum(share * np.log(np.where(share > 0, share, 1.0))))
    lost = np.abs(stats.unnormalize(coder.decode(codes, horizon, dof)) - stats.unnormalize(x)).reshape(-1, dof)
    shown = [SHOWN.get(unit or "", (1.0, unit)) for unit in space.units]
    lost = lost * [factor for factor, _ in shown]
    return TokenizerCost(
        name=name,
        horizon=horizon,
        n_codes=int(coder.n_codes),
        tokens=float(lengths.mean()),
        tokens_p99=float(np.quantile(lengths, 0.99)),
        tokens_per_second=None if rate_hz is None else float(lengths.mean() / horizon * rate_hz),
        used=float((share > 0).mean()),
        perplexity=float(np.exp(entropy)),
        rmse=tuple(np.sqrt((lost**2).mean(0)).tolist()),
        p99=tuple(np.quantile(lost, 0.99, axis=0).tolist()),
        max=tuple(lost.max(0).tolist()),
        names=space.names,
        units=tuple(unit for _, unit in shown),
    )


def energy_shares(normalized: np.ndarray) -> np.ndarray:
    """How much of the motion each frequency of the chunk carries: what FAST's coefficients have to spell.

    Args:
        normalized: (n, horizon, dof).

    Returns:
        (horizon, dof): share of the squared orthonormal DCT-II coefficients of each dimension, 0 = the mean of the
        chunk. A dimension that is always 0 has shares of 0.
    """
    from scipy.fft import dct

    energy = (dct(np.asarray(normalized, dtype=np.float64), axis=1, norm="ortho") ** 2).sum(axis=0)
    total = energy.sum(axis=0)
    return energy / np.where(total > 0, total, 1.0)


def text_of(costs: list[TokenizerCost]) -> str:
    """A table for people: one line a tokenizer and horizon, root mean square / largest error of each dimension."""
    first = costs[0]
    units = [f" {unit}" if unit else "" for unit in first.units]
    heads = [f"{name}{unit}" for name, unit in zip(first.names, units, strict=True)]
    wide = max(len(cost.name) for cost in costs)
    cells = [[f"{a:.3g} / {b:.3g}" for a, b in zip(cost.rmse, cost.max, strict=True)] for cost in costs]
    widths = [max(len(head), *(len(row[d]) for row in cells)) for d, head in enumerate(heads)]
    lines = [
        f"{'tokenizer':<{wide}} {'horizon':>7} {'codes':>6} {'used':>5} {'tokens':>7} {'p99':>5} {'a second':>8}  "
        + "  ".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))
    ]
    for cost, row in zip(costs, cells, strict=True):
        rate = "-" if cost.tokens_per_second is None else f"{cost.tokens_per_second:.1f}"
        lines.append(
            f"{cost.name:<{wide}} {cost.horizon:>7} {cost.n_codes:>6} {cost.used:>5.0%} {cost.tokens:>7.1f} "
            f"{cost.tokens_p99:>5.0f} {rate:>8}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        )
    return "\n".join(lines) + "\n"
