"""The loss over the tokens of demonstrated chunks; the batches are made by `models.collator`."""

from __future__ import annotations

import torch

from hf_vla_actions.models.collator import IGNORED, ActionCollator

__all__ = ["IGNORED", "ActionCollator", "action_loss"]


def action_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Cross entropy over action tokens and closing tokens.

    Args:
        outputs: model output with logits (batch, labels + 1 or more, vocabulary); the last position predicts nothing.
        labels: (batch, horizon * dof + 1), -100 where ignored.
        num_items_in_batch: labels of the whole step over all processes and accumulated batches; the sum is divided
            by it, so that every token weighs the same however the step was split. None: the mean of this batch.
    """
    logits = outputs["logits"][:, -labels.shape[1] - 1 : -1].float()
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
