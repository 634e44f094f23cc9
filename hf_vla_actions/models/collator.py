"""From samples of a dataset to a batch: the prompt exactly as in use, then the tokens of the demonstrated chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_vla_actions.errors import DatasetError
from hf_vla_actions.models import PromptBuilder
from hf_vla_actions.models.families import OPENVLA
from hf_vla_actions.models.openvla.policy import close_prompt

IGNORED = -100


class ActionCollator:
    """Makes batches for teacher forcing.

    Prompts are padded on the left, as for `generate`, so the action tokens of all rows stand in the same last
    columns and only their logits need to be computed (`logits_to_keep`).

    Args:
        prompts: the policy's own PromptBuilder (`vla.prompts`).
        unnorm_key: which statistics and action space the actions belong to; several for a mixture, of which each sample
            names its own (`sample["unnorm_key"]`).
    """

    def __init__(self, prompts: PromptBuilder, unnorm_key: str | Sequence[str] | None = None):
        self.prompts = prompts
        keys = [unnorm_key] if unnorm_key is None or isinstance(unnorm_key, str) else unnorm_key
        self.unnorm_keys = tuple(prompts.config.resolve(key) for key in keys)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build a batch from samples of a `ChunkDataset`.

        Returns:
            The model's inputs with `labels` (batch, horizon * dof + 1): the ids of the action tokens and of the
            closing token, -100 on steps that are padding; and `sample_ids` (batch, 2): episode and step of each row.
        """
        config = self.prompts.config
        images = [sample["images"] for sample in samples] if self.prompts.family.takes_images else None
        batch = self.prompts.build(images, [sample["instruction"] for sample in samples])
        if self.prompts.family == OPENVLA:  # equal, not the same: a worker process has a copy
            # What its predict_action does first: the lone space between "Out:" and the action.
            pad = self.prompts.tokenizer.pad_token_id or 0
            batch["input_ids"], batch["attention_mask"] = close_prompt(
                batch["input_ids"], batch["attention_mask"], pad
            )
        try:
            rows = self._encode(samples)
        except ValueError as error:
            where = sorted({(s["episode"], s["step"]) for s in samples})
            raise DatasetError(f"actions of the batch (episode, step) {where} cannot be encoded: {error}") from error
        end = config.vocabulary.end_token_id
        if config.is_per_number:
            ids = torch.from_numpy(rows)
            ends = ids.new_full((len(samples), 1), end)
            action_tokens = torch.cat([ids, ends], dim=1)
            mask = torch.stack([torch.as_tensor(sample["action_pad_mask"]) for sample in samples])
            real = mask.repeat_interleave(ids.shape[1] // config.horizon, dim=1)
            labels = torch.cat([torch.where(real, ids, IGNORED), ends], dim=1)
            present = torch.ones_like(action_tokens)
        else:
            # Their tokens stand for the chunk as a whole, past the end of an episode too (its last action again).
            longest = max(map(len, rows))
            closed = [[*row, end] for row in rows]
            action_tokens = torch.tensor([row + [end] * (longest + 1 - len(row)) for row in closed])
            labels = torch.tensor([row + [IGNORED] * (longest + 1 - len(row)) for row in closed])
            present = (labels != IGNORED).long()

        family = self.prompts.family
        fill = {"input_ids": action_tokens, "attention_mask": present}
        fill["token_type_ids"] = torch.full_like(action_tokens, family.suffix_type)
        length = batch["input_ids"].shape
        for name, value in batch.items():
            if value.shape == length and not value.is_floating_point():
                more = fill.get(name, torch.zeros_like(action_tokens))
                batch[name] = torch.cat([value, more.to(value.dtype)], dim=1)
        if not family.own_positions:
            # As generate() counts them; the default would count the padding too.
            batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return {
            **batch,
            "labels": labels,
            "use_cache": False,
            "logits_to_keep": action_tokens.shape[1] + 1,
            "sample_ids": torch.tensor([[sample["episode"], sample["step"]] for sample in samples]),
        }

    def _encode(self, samples: Sequence[dict[str, Any]]):
        """Ids of each sample's chunk, by the statistics of its own dataset."""
        config = self.prompts.config
        if len(self.unnorm_keys) == 1:
            return config.encode(np.stack([s["actions"] for s in samples]), self.unnorm_keys[0])
        keys = [sample["unnorm_key"] for sample in samples]
        strangers = sorted(set(keys) - set(self.unnorm_keys))
        if strangers:
            raise DatasetError(f"samples of {strangers} in a mixture of {list(self.unnorm_keys)}")
        rows: list[Any] = [None] * len(samples)
        for key in dict.fromkeys(keys):
            where = [i for i, other in enumerate(keys) if other == key]
            for i, ids in zip(
                where, config.encode(np.stack([samples[i]["actions"] for i in where]), key), strict=True
            ):
                rows[i] = ids
        return np.stack(rows) if config.is_per_number else rows
