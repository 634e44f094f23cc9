"""One loss of words and actions, for a model that goes on speaking while it learns to act."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hf_vla_actions.heads.base import HeadError, check_number

IGNORED = -100
"""Label of a token that no loss is taken of, as in Transformers."""


@dataclass(frozen=True)
class TransfusionLoss:
    """A loss of two parts.

    Args:
        loss: the sum, `language + weight * action`.
        language: mean cross entropy over the labelled tokens; 0 if there are none.
        action: what the action head's `loss` gave.
    """

    loss: torch.Tensor
    language: torch.Tensor
    action: torch.Tensor


def transfusion_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    action_loss: torch.Tensor,
    *,
    weight: float = 1.0,
    n_tokens: torch.Tensor | float | None = None,
) -> TransfusionLoss:
    """The loss of Transfusion (arXiv 2408.11039): cross entropy of the next token, and `weight` times the actions' loss.

    Each part is a mean over its own items: labelled tokens here, real numbers of the chunks in `ActionHead.loss`. A
    batch with more padding, or with fewer labelled tokens, weighs the other part no differently.

    Args:
        logits: (batch, length, vocabulary) of the model.
        labels: (batch, length) token ids, -100 where none is to be learned; not shifted, as in Transformers: the
            logits of a position are compared with the label of the next one.
        action_loss: scalar, from `ActionHead.loss`.
        weight: of the actions, lambda in the paper.
        n_tokens: labelled tokens (that follow another one) of the whole step over all processes and accumulated
            batches, by which the sum is divided; None: those of this batch.

    Returns:
        The sum and its parts, each a scalar with its gradient.

    Raises:
        HeadError: shapes that do not fit, or labels that are no ids of the vocabulary.
    """
    check_number("weight", weight, above=False)
    if action_loss.ndim:
        raise HeadError(f"action_loss is a scalar, as from `head.loss`, got shape {tuple(action_loss.shape)}")
    language = token_loss(logits, labels, n_tokens=n_tokens)
    return TransfusionLoss(language + weight * action_loss.to(language), language, action_loss)


def token_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, n_tokens: torch.Tensor | float | None = None
) -> torch.Tensor:
    """The language part of `transfusion_loss`, alone; float32 at least, as the cross entropy of Transformers."""
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise HeadError(
            "logits have shape (batch, length, vocabulary) and labels (batch, length), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))
    if wrong.any():
        found = sorted(set(labels[wrong].tolist()))[:5]
        raise HeadError(f"labels are ids below {logits.shape[-1]}, or {IGNORED} for none, got {found}")
    learned = labels[:, 1:] != IGNORED
    # Only the rows that count: the logits of a whole batch in float32 are large, and padding may hold NaN.
    rows = logits[:, :-1][learned]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = F.cross_entropy(rows, labels[:, 1:][learned], reduction="sum")
    return total / (learned.sum().clamp(min=1) if n_tokens is None else n_tokens)
