"""Action tokens whose places in a chunk have codes of their own: nothing else may stand there."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LogitsProcessor

from hf_vla_actions.decoding.scores import RefusedByContinuousBatching, check_scores, require
from hf_vla_actions.errors import ConstraintError
from hf_vla_actions.tokenizers import ActionVocabulary

DEAD = (
    "no action token is left in some row: the scores of all that may stand here are -inf, or one is NaN or +inf (a broken "
    "model, another logits processor)"
)


class RangesLogitsProcessor(LogitsProcessor):
    """Lets `generate` emit one token for each place of a chunk, then the closing token: for `VQActionTokenizer`.

    A pure function of the ids it is given.

    Args:
        ranges: (n, 2) first code of each place and the one behind its last.
        vocabulary: codes to ids.
        prompt_length: length of the prompt in tokens, padding included.

    Raises:
        ConstraintError: from a call, on ids shorter than the prompt and on scores among which nothing can be chosen.
    """

    supports_continuous_batching = RefusedByContinuousBatching()  # type: ignore[assignment]

    def __init__(self, ranges: np.ndarray, vocabulary: ActionVocabulary, prompt_length: int):
        self.places = [vocabulary.token_ids[low:high] for low, high in np.asarray(ranges).tolist()]
        self.end, self.prompt_length = vocabulary.end_token_id, prompt_length
        self._highest = int(max(vocabulary.token_ids.max(), self.end))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of the next token: new tensor, -inf wherever nothing may be emitted."""
        check_scores(input_ids, scores, self._highest)
        position = input_ids.shape[1] - self.prompt_length
        if position < 0:
            raise ConstraintError(f"prompt_length is {self.prompt_length}, but there are {input_ids.shape[1]} ids")
        ids = self.places[position] if position < len(self.places) else np.array([self.end])
        chosen = torch.as_tensor(ids.copy(), device=scores.device)
        allowed = scores.index_select(1, chosen)
        require((allowed.amax(dim=1).abs() < torch.inf).all(), DEAD)  # False for NaN too
        return torch.full_like(scores, -torch.inf).index_copy_(1, chosen, allowed)  # type: ignore[return-value]
