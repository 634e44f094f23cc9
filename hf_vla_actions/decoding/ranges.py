"""Action tokens whose places in a chunk have codes of their own: nothing else may stand there."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LogitsProcessor

from hf_vla_actions.decoding.scores import RefusedByContinuousBatching
from hf_vla_actions.errors import ConstraintError
from hf_vla_actions.tokenizers import ActionVocabulary


class RangesLogitsProcessor(LogitsProcessor):
    """Lets `generate` emit one token for each place of a chunk, then the closing token: for `VQActionTokenizer`.

    A pure function of the ids it is given.

    Args:
        ranges: (n, 2) first code of each place and the one behind its last.
        vocabulary: codes to ids.
        prompt_length: length of the prompt in tokens, padding included.
    """

    supports_continuous_batching = RefusedByContinuousBatching()  # type: ignore[assignment]

    def __init__(self, ranges: np.ndarray, vocabulary: ActionVocabulary, prompt_length: int):
        self.places = [vocabulary.token_ids[low:high] for low, high in np.asarray(ranges).tolist()]
        self.end, self.prompt_length = vocabulary.end_token_id, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of the next token: new tensor, -inf wherever nothing may be emitted."""
        position = input_ids.shape[1] - self.prompt_length
        if position < 0:
            raise ConstraintError(f"prompt_length is {self.prompt_length}, but there are {input_ids.shape[1]} ids")
        ids = self.places[position] if position < len(self.places) else np.array([self.end])
        chosen = torch.as_tensor(ids.copy(), device=scores.device)
        out = torch.full_like(scores, -torch.inf)
        return out.index_copy_(1, chosen, scores.index_select(1, chosen))  # type: ignore[return-value]
