"""Rows of new action tokens in the input and output embeddings: added where missing, and what they start from.

What a new row starts from is one of two things:

- "mean": the mean of the trained rows plus a trace of noise, as Transformers' `mean_resizing` does (Hewitt 2021,
  "Initializing New Word Embeddings for Pretrained Language Models"). All action tokens start as the same word.
- "distance": the mean plus a smooth random curve over the bins, a Gaussian process whose covariance across
  coordinates is that of the trained rows. Neighboring bins start as neighbors, far ones as unlike as two words.

`benchmarks/row_initialization.py`, mean ± standard error of 3 seeds, held-out loss; "apart" is "distance" with a length
so short that neighbors are as unlike as far bins ("distance:1:0.001"):

========================================  =============  =============  =============
.                                         mean           distance       apart
========================================  =============  =============  =============
random weights, 300 steps                 0.315 ± 0.016  0.279 ± 0.012  0.283 ± 0.010
random weights, 900 steps                 0.226 ± 0.013  0.181 ± 0.016  0.201 ± 0.008
random weights, 900 steps, success        47 ± 4 %       70 ± 11 %      58 ± 6 %
all but the rows trained, 100 steps       0.285 ± 0.006  0.282 ± 0.013  0.285 ± 0.013
all but the rows trained, 300 steps       0.212 ± 0.009  0.219 ± 0.007  0.217 ± 0.012
========================================  =============  =============  =============

In a model of random weights "distance" beats "mean" for each seed, mostly because the rows start apart: that neighbors
are near adds less than its error. In a trained one they differ in the first 50 steps only. So it is the default: it was
never measurably worse. A large pretrained model was not measured.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hf_vla_actions.errors import VLAActionsError

logger = logging.getLogger(__name__)

INITIALIZATIONS = ("mean", "distance")
DEFAULT_INITIALIZATION = "distance"
SCALE = 1.0
"""Spread of a curve, in those of the trained rows."""
LENGTH = 0.1
"""Share of the bins over which a curve forgets where it was."""
MEAN_SCALE = 1e-9**0.5
"""Spread of "mean": Transformers' epsilon on the covariance."""
UNTRAINED = 0.1
"""Rows shorter than this share of the median length are taken for never trained (padding, reserved tokens)."""
SAMPLE, SLAB = 4096, 8192


class EmbeddingError(VLAActionsError):
    """Rows of the embeddings that are not there, or a start that they cannot be given."""


def grow_embeddings(model, vocabulary, tokenizer_length: int, how: str = DEFAULT_INITIALIZATION) -> None:
    """Add rows for tokens the embeddings do not have yet; never shrinks, keeps a multiple of 64 if it was one.

    Added rows of action tokens start as `how` says, those of other tokens and of padding near the mean of the old ones
    (Transformers' `mean_resizing`); the same on every load. Rows the model already had stay as they are, whether
    trained or unused: a new policy gives those a start with `initialize_rows`.

    Args:
        model: a PreTrainedModel; changed in place.
        vocabulary: the ActionVocabulary; its `token_ids` are (n,) or (blocks, n), each block in the order of the codes.
        tokenizer_length: number of tokens, with the added ones.
        how: one of `INITIALIZATIONS`.

    Raises:
        EmbeddingError: `how` is unknown.
    """
    _check_how(how)
    rows = model.get_input_embeddings().weight.shape[0]
    ids = np.asarray(vocabulary.token_ids)
    needed = max(int(ids.max()) + 1, tokenizer_length)
    if needed <= rows:
        return
    # What Transformers says of the start is not what the rows of action tokens start from.
    with torch.random.fork_rng(), _without("The new "):
        torch.manual_seed(0)
        model.resize_token_embeddings(
            needed, pad_to_multiple_of=64 if rows % 64 == 0 else None, mean_resizing=not _is_outline(model)
        )
    if how != "mean" and (ids >= rows).any():
        _initialize(model, np.atleast_2d(ids), how, first_written=rows, scale=SCALE, length=LENGTH, seed=0)
    logger.info("embeddings grew from %d to %d rows", rows, model.get_input_embeddings().weight.shape[0])


def initialize_rows(
    model, ids, how: str = DEFAULT_INITIALIZATION, *, scale: float = SCALE, length: float = LENGTH, seed: int = 0
) -> None:
    """Give the rows of action tokens a start, in the input and the output embeddings (tied ones: once).

    Everything they held is lost, so this is for a policy that is new. It is needed where action tokens fall on rows
    that the model has but never trained (Qwen2.5-VL has more rows than its tokenizer has tokens). All other rows stay as
    they are, to the bit. An output bias becomes the mean of the trained ones.

    The trained rows are the others, without those that were never trained: the few behind the largest id (padding), and
    rows that are short: `UNTRAINED`.

    Args:
        model: a PreTrainedModel; changed in place.
        ids: (n,) or (blocks, n) token ids, each block in the order of the codes; blocks get independent curves.
        how: one of `INITIALIZATIONS`.
        scale: for "distance": spread around the mean, in those of the trained rows.
        length: for "distance": rows d bins apart have correlation exp(-d / (length * n)) around the mean.
        seed: of the curves; the caller's random state is neither used nor changed.

    Raises:
        EmbeddingError: `how` is unknown, ids are malformed or beyond the embeddings, or no trained row is left.
    """
    _check_how(how)
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or not ids.size or len(np.unique(ids)) != ids.size:
        raise EmbeddingError(
            f"ids must be different whole numbers of shape (n,) or (blocks, n), got {ids.dtype} of shape {ids.shape}; "
            "pass the token_ids of an ActionVocabulary"
        )
    if not (scale > 0 and length > 0):
        raise EmbeddingError(f"scale and length must be above 0, got {scale} and {length}")
    _initialize(model, np.atleast_2d(ids), how, first_written=0, scale=scale, length=length, seed=seed)


def _initialize(
    model, blocks: np.ndarray, how: str, *, first_written: int, scale: float, length: float, seed: int
) -> None:
    """Set rows `blocks` (blocks, n) that are not below `first_written`; rows below that and all ids are the old ones."""
    if _is_outline(model):
        return
    targets: list[Any] = [model.get_input_embeddings()]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not targets[0].weight:
        targets.append(output)
    for target in targets:
        rows = target.weight.shape[0]
        if blocks.min() < 0 or blocks.max() >= rows:
            raise EmbeddingError(
                f"ids run from {blocks.min()} to {blocks.max()}, the embeddings have the rows 0 to {rows - 1}; call "
                "grow_embeddings (to_vla does) before initialize_rows"
            )
    root = _kernel_root(blocks.shape[1], length) if how == "distance" else None
    for matrix, target in enumerate(targets):
        trained, mean = _trained_rows(target.weight, _old_rows(blocks, target.weight.shape[0], first_written))
        for block, ids in enumerate(blocks):
            # One stream a matrix and block: neither depends on how many others there are.
            rng = np.random.default_rng([seed, matrix, block])
            curve = _draw(target.weight, trained, mean, len(ids), rng)
            values = mean + (MEAN_SCALE * curve if root is None else scale * root @ curve)
            written = torch.from_numpy(np.flatnonzero(ids >= first_written))
            _write(target, torch.from_numpy(ids.astype(np.int64))[written], values[written], trained)


def _old_rows(blocks: np.ndarray, rows: int, first_written: int) -> np.ndarray:
    """(n,) bool: which of the first rows are not among those that are set, nor behind them."""
    stop = first_written or rows
    if not first_written and rows - blocks.max() - 1 <= blocks.max():
        stop = int(
            blocks.max()
        )  # what is behind is padding; else these are reserved tokens in front of the vocabulary
    old = np.ones(stop, dtype=bool)
    old[blocks[blocks < stop]] = False
    return old


def _trained_rows(weight: torch.Tensor, old: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (k,) of the trained ones among the old rows (n,) bool, and their mean (hidden,), float32 on the CPU.

    On the CPU so that a model starts the same wherever it is; in slabs because a float32 copy of a large vocabulary
    takes gigabytes.
    """
    slabs = [slice(start, min(start + SLAB, len(old))) for start in range(0, len(old), SLAB)]
    lengths = torch.cat([_cpu(weight[slab]).norm(dim=1) for slab in slabs] or [torch.zeros(0)])
    finite = torch.isfinite(lengths) & (lengths > 0) & torch.from_numpy(old)
    if not finite.any():
        raise EmbeddingError(
            f"no trained row is among the first {len(old)} of the embeddings, so there is no mean to start from; load the "
            "model's weights first, and pass the ids of action tokens alone"
        )
    trained = finite & (lengths > UNTRAINED * lengths[finite].median())
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for slab in slabs:
        rows, used = _cpu(weight[slab]), trained[slab]
        total += (rows if used.all() else rows[used]).sum(dim=0)
    return trained.nonzero()[:, 0], (total / trained.sum()).float()


def _draw(weight: torch.Tensor, trained: torch.Tensor, mean: torch.Tensor, n: int, rng) -> torch.Tensor:
    """(n, hidden) independent draws with mean 0 and the covariance of (at most `SAMPLE` of) the trained rows.

    Random mixtures of centered rows have their covariance, without a hidden x hidden matrix.
    """
    chosen = np.sort(rng.permutation(len(trained))[:SAMPLE])
    centered = _cpu(weight[trained[torch.from_numpy(chosen)].to(weight.device)]) - mean
    mixture = torch.from_numpy(rng.standard_normal((n, len(chosen)), dtype=np.float32))
    return mixture @ centered / len(chosen) ** 0.5


def _kernel_root(n: int, length: float) -> torch.Tensor:
    """(n, n) symmetric square root of the covariance exp(-|i - j| / (length * n)) between bins i and j.

    Exponential, not Gaussian: smoother curves leave direct neighbors equal to many digits, and half precision rounds.
    """
    bins = torch.arange(n, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.exp(-(bins[:, None] - bins).abs() / (length * n)))
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()


def _write(target, ids: torch.Tensor, values: torch.Tensor, trained: torch.Tensor) -> None:
    """Set rows `ids` (k,) of an embedding or output layer to `values` (k, hidden)."""
    with torch.no_grad():
        weight = target.weight
        weight[ids.to(weight.device)] = values.to(weight.device, weight.dtype)
        bias = getattr(target, "bias", None)
        if bias is not None:
            bias[ids.to(bias.device)] = _cpu(bias)[trained].mean().to(bias.device, bias.dtype)


@contextmanager
def _without(start: str) -> Iterator[None]:
    """Keep messages of Transformers' models that begin with `start` out of the log."""
    log = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def _is_outline(model) -> bool:
    """Whether it has shapes and no numbers, as a plan of a training needs it."""
    return model.get_input_embeddings().weight.is_meta


def _cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _check_how(how: str) -> None:
    if how not in INITIALIZATIONS:
        raise EmbeddingError(f"rows can start as one of {list(INITIALIZATIONS)}, got {how!r}")
