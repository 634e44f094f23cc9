"""How good a VQ tokenizer is on real chunks: use of its codebooks, errors in real units."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_vla_actions.actions import ActionSpace, ActionStats
from hf_vla_actions.errors import ActionTokenError

if TYPE_CHECKING:
    from hf_vla_actions.tokenizers.vq import VQActionTokenizer


@dataclass(frozen=True)
class VQReport:
    """Use of each codebook, and error of each dimension after encoding and decoding.

    Args:
        n_chunks: chunks looked at.
        codebook_size: entries of each codebook.
        utilization: share of the entries of each codebook that occur.
        perplexity: of each codebook, exp(entropy) of how often its entries occur: as many entries, evenly used, would
            carry as much. From 1 to `codebook_size`.
        mean_error: mean absolute error of each dimension, real units.
        p99_error: its 99th percentile.
        max_error: the largest.
        clipped: share of the values of each dimension that lie outside the statistics' range, where no code reaches.
        names: of the dimensions.
        units: of the dimensions and so of the errors; None where there is none.
    """

    n_chunks: int
    codebook_size: int
    utilization: tuple[float, ...]
    perplexity: tuple[float, ...]
    mean_error: tuple[float, ...]
    p99_error: tuple[float, ...]
    max_error: tuple[float, ...]
    clipped: tuple[float, ...]
    names: tuple[str, ...]
    units: tuple[str | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def text(self) -> str:
        """Two tables for people."""
        lines = [f"{self.n_chunks} chunks", f"{'codebook':>8} {'used':>6} {'perplexity':>10}  of {self.codebook_size}"]
        for i, (used, perplexity) in enumerate(zip(self.utilization, self.perplexity, strict=True)):
            lines.append(f"{i:>8} {used:>6.1%} {perplexity:>10.1f}")
        width = max(len(name) for name in (*self.names, "dimension"))
        lines.append(f"{'dimension':<{width}} {'unit':<5} {'mean':>10} {'99 %':>10} {'largest':>10} {'clipped':>8}")
        errors = zip(self.mean_error, self.p99_error, self.max_error, strict=True)
        for name, unit, error, clipped in zip(self.names, self.units, errors, self.clipped, strict=True):
            numbers = " ".join(f"{value:>10.4g}" for value in error)
            lines.append(f"{name:<{width}} {unit or '-':<5} {numbers} {clipped:>8.1%}")
        return "\n".join(lines) + "\n"


def make_report(
    tokenizer: VQActionTokenizer,
    actions,
    stats: ActionStats,
    space: ActionSpace | None,
    pad_mask: np.ndarray | None,
) -> VQReport:
    """See `VQActionTokenizer.report`."""
    horizon, dof = tokenizer.shape.horizon, tokenizer.shape.dof
    x = np.asarray(actions, dtype=np.float64)
    if x.ndim != 3 or x.shape[1:] != (horizon, dof) or not len(x):
        raise ActionTokenError(f"a report needs actions of shape (n, {horizon}, {dof}), got {x.shape}")
    real = np.ones(x.shape[:2], dtype=bool) if pad_mask is None else np.asarray(pad_mask, dtype=bool)
    if real.shape != x.shape[:2] or not real.any():
        raise ActionTokenError(f"pad_mask has shape {x.shape[:2]} and is True somewhere, got {real.shape}")
    space = ActionSpace.unnamed(dof) if space is None else space
    normalized = stats.normalize(x)
    codes = tokenizer.encode(normalized)
    back = space.settle(stats.unnormalize(tokenizer.decode(codes, horizon, dof)))
    error = np.abs(back - x)[real]
    within = stats.unnormalize(np.clip(normalized, -1.0, 1.0))
    width = np.maximum(np.ptp(x, axis=(0, 1)), np.finfo(float).tiny)
    clipped = (np.abs(within - x) > 1e-9 * width)[real]
    utilization, perplexity = usage(codes - tokenizer.code_ranges[:, 0], tokenizer.shape.codebook_size)
    return VQReport(
        n_chunks=len(x),
        codebook_size=tokenizer.shape.codebook_size,
        utilization=tuple(utilization.tolist()),
        perplexity=tuple(perplexity.tolist()),
        mean_error=tuple(error.mean(axis=0).tolist()),
        p99_error=tuple(np.quantile(error, 0.99, axis=0).tolist()),
        max_error=tuple(error.max(axis=0).tolist()),
        clipped=tuple(clipped.mean(axis=0).tolist()),
        names=space.names,
        units=space.units,
    )


def usage(entries: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Utilization and perplexity, each (n_codebooks,), of entries (n, n_codebooks) below `size`."""
    n, n_codebooks = entries.shape
    flat = (entries + np.arange(n_codebooks) * size).reshape(-1)
    share = np.bincount(flat, minlength=n_codebooks * size).reshape(n_codebooks, size) / n
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=1)
    return (share > 0).mean(axis=1), np.exp(entropy)
