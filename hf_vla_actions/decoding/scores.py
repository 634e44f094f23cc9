"""What every LogitsProcessor here asks of the scores it is given, and how it refuses."""

from __future__ import annotations

import torch

from hf_vla_actions.errors import ConstraintError


class RefusedByContinuousBatching:
    """False on the class; an error when continuous batching asks an instance.

    Transformers drops a processor that answers False with no more than a warning
    (`transformers/generation/continuous_batching/cb_logits_processors.py`), and would then emit free actions.
    """

    def __get__(self, instance, owner=None) -> bool:
        if instance is None:
            return False
        raise ConstraintError(
            "continuous batching (generate_batch) gives logits processors the last token only and cannot keep "
            "constraints on actions; use generate() or predict_action()"
        )


def require(condition: torch.Tensor, message: str) -> None:
    """Raise unless a condition () bool holds: at once, or asynchronously where reading it would stall the device."""
    if condition.device.type == "cuda":
        torch._assert_async(condition, message)
    elif not condition:
        raise ConstraintError(message)


def check_scores(input_ids: torch.Tensor, scores: torch.Tensor, highest: int) -> None:
    """Raise unless ids are (rows, length) and scores (rows, vocabulary), with a score for the id `highest`."""
    if input_ids.ndim != 2 or scores.ndim != 2 or len(input_ids) != len(scores):
        raise ConstraintError(
            f"expected ids (rows, length) and scores (rows, vocabulary), got {tuple(input_ids.shape)} and "
            f"{tuple(scores.shape)}; continuous batching is not supported"
        )
    if scores.shape[1] <= highest:
        raise ConstraintError(
            f"the model scores {scores.shape[1]} tokens, the action vocabulary goes up to id {highest}: its "
            "embeddings were not resized (to_vla does it) or it belongs to another checkpoint"
        )
