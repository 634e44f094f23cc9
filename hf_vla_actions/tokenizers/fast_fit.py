"""Fitting FAST to data: which codes, which scale, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from hf_vla_actions.errors import ActionTokenError
from hf_vla_actions.tokenizers.fast_dct import check_scale, coefficient_limit, from_coefficients, to_coefficients

if TYPE_CHECKING:
    from hf_vla_actions.tokenizers.fast import FASTActionTokenizer

# A block of 20992 characters of one kind (CJK ideographs): no spaces, digits or marks that a text tool could touch.
FIRST_CHARACTER, N_CHARACTERS = 0x4E00, 20992
LARGEST_SCALE = 10_000


def fit_bpe(chunks, vocab_size: int, scale: float, progress: bool = False) -> tuple[str, int]:
    """Train a BPE on whole coefficients; see `FASTActionTokenizer.fit`.

    Returns:
        content of a `tokenizer.json`, and its `min_token`.
    """
    check_scale(scale)
    groups = _groups(chunks)
    limit = max(coefficient_limit(group.shape[1], scale) for group in groups)
    n_characters = 2 * limit + 1
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, np.integer)) or vocab_size < n_characters:
        raise ActionTokenError(
            f"coefficients of chunks of up to {max(g.shape[1] for g in groups)} actions run from {-limit} to {limit} at "
            f"scale {scale:g}: vocab_size must be at least {n_characters} (and more to join any), got {vocab_size!r}"
        )
    if n_characters > N_CHARACTERS:
        raise ActionTokenError(f"scale {scale:g} needs {n_characters} characters, there are {N_CHARACTERS}: use less")
    texts = []
    for group in groups:
        codes = to_coefficients(group, scale) + (FIRST_CHARACTER + limit)
        n = codes.shape[1] * codes.shape[2]
        text = codes.astype("<u4").tobytes().decode("utf-32-le")
        texts += [text[i : i + n] for i in range(0, len(text), n)]
    backend = Tokenizer(BPE())
    backend.decoder = Fuse()  # without a decoder the library puts spaces between tokens
    trainer = BpeTrainer(
        vocab_size=int(vocab_size),
        min_frequency=2,
        show_progress=progress,
        special_tokens=[],
        initial_alphabet=[chr(FIRST_CHARACTER + i) for i in range(n_characters)],
    )
    backend.train_from_iterator(texts, trainer=trainer, length=len(texts))
    return backend.to_str(), -(FIRST_CHARACTER + limit)


def _groups(chunks) -> list[np.ndarray]:
    """Chunks of the same horizon together: a list of (n, horizon, dof)."""
    if isinstance(chunks, np.ndarray):
        groups = [chunks.reshape(-1, *chunks.shape[-2:])] if chunks.ndim >= 2 else []
    else:
        by_shape: dict[tuple[int, ...], list[np.ndarray]] = {}
        for chunk in chunks:
            array = np.asarray(chunk, dtype=np.float64)
            by_shape.setdefault(array.shape, []).append(array)
        groups = [np.stack(same) for same in by_shape.values()]
    if not groups or any(group.ndim != 3 or not group.size for group in groups):
        raise ActionTokenError(
            f"chunks are an array (n, horizon, dof) or a list of arrays (horizon, dof), got {[g.shape for g in groups]}"
        )
    return groups


@dataclass(frozen=True)
class FASTReport:
    """What a tokenizer makes of some chunks.

    Args:
        scale: of the tokenizer.
        n_codes: of the tokenizer.
        n_chunks: how many chunks were looked at.
        n_values: numbers in a chunk: codes of a tokenizer with one code a number.
        codes_mean: codes a chunk.
        codes_p99: codes a chunk, 99th percentile.
        codes_max: codes a chunk.
        rmse: (dof) error of a value, root mean square, in the units of `half_range`.
        p99: (dof) 99th percentile of the absolute error.
        max: (dof) largest absolute error.
    """

    scale: float
    n_codes: int
    n_chunks: int
    n_values: int
    codes_mean: float
    codes_p99: float
    codes_max: int
    rmse: tuple[float, ...]
    p99: tuple[float, ...]
    max: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def report(
    tokenizer: FASTActionTokenizer, chunks, half_range: Sequence[float] | np.ndarray | None = None
) -> FASTReport:
    """Encode and decode chunks, and say how long the codes are and how large the errors.

    Args:
        tokenizer: to be looked at.
        chunks: (n, horizon, dof) normalized, best such that it was not fitted on.
        half_range: (dof,) real units in a normalized 1, such as (q99 - q01) / 2; normalized units if None.
    """
    (x,) = _groups(np.asarray(chunks, dtype=np.float64))
    codes = tokenizer.encode(x)
    lengths = np.array([len(ids) for ids in codes])
    error = np.abs(tokenizer.decode(codes, *x.shape[1:]) - x).reshape(-1, x.shape[2])
    error = error * (1.0 if half_range is None else np.asarray(half_range, dtype=np.float64))
    return FASTReport(
        scale=tokenizer.scale,
        n_codes=tokenizer.n_codes,
        n_chunks=len(x),
        n_values=x.shape[1] * x.shape[2],
        codes_mean=float(lengths.mean()),
        codes_p99=float(np.quantile(lengths, 0.99)),
        codes_max=int(lengths.max()),
        rmse=tuple(np.sqrt((error**2).mean(0)).tolist()),
        p99=tuple(np.quantile(error, 0.99, axis=0).tolist()),
        max=tuple(error.max(0).tolist()),
    )


def largest_error(chunks: np.ndarray, scale: float) -> np.ndarray:
    """(dof,) largest absolute error of chunks (n, horizon, dof) at a scale; it does not depend on the codes."""
    return np.abs(from_coefficients(to_coefficients(chunks, scale), scale) - chunks).max(axis=(0, 1))


def scale_for(chunks, max_error: Sequence[float] | np.ndarray | float) -> float:
    """The smallest whole scale found that keeps every value of some chunks within a wanted error.

    Args:
        chunks: (n, horizon, dof) normalized.
        max_error: (dof,) or one number, normalized units; `inf` where any error will do.

    Raises:
        ActionTokenError: no scale up to 10000 does it.
    """
    (x,) = _groups(np.asarray(chunks, dtype=np.float64))
    wanted = np.broadcast_to(np.asarray(max_error, dtype=np.float64), x.shape[-1:])
    if not (wanted > 0).all():
        raise ActionTokenError(f"max_error must be positive in every dimension, got {wanted.tolist()}")

    def good(scale: int) -> bool:
        return bool((largest_error(x, scale) <= wanted).all())

    high = 1
    while not good(high):
        high *= 2
        if high > LARGEST_SCALE:
            raise ActionTokenError(f"no scale up to {LARGEST_SCALE} keeps errors within {wanted.tolist()}; allow more")
    low = high // 2  # the error is not quite monotone: of what bisection finds, `high` has been tried
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return float(high)
