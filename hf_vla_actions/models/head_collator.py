"""From samples of a dataset to what a continuous head learns: the prompt exactly as in use, and normalized chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import DatasetError
from hf_vla_actions.models.collator import IGNORED, ActionCollator
from hf_vla_actions.models.prompts import PromptBuilder


class HeadCollator(ActionCollator):
    """Makes batches for a policy with a continuous head.

    Where the policy has action tokens too, they stand behind the prompt, and `labels` asks the model for them.

    Args:
        prompts: the policy's own PromptBuilder (`vla.prompts`).
        unnorm_key: as for `ActionCollator`.
        window: steps that the head sees at once, the present one among them; the samples then have a history of
            `window - 1` steps (`ChunkDataset(history=...)`).
    """

    def __init__(self, prompts: PromptBuilder, unnorm_key: str | Sequence[str] | None = None, *, window: int = 1):
        super().__init__(prompts, unnorm_key)
        self.window = window

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Build a batch from samples of a `ChunkDataset`.

        Returns:
            What `HeadPolicyMixin.learn` takes: `normalized` (batch, horizon, dof of the head) float32; `action_pad_mask` of
            the same shape, False past the episode's end and in dimensions that the robot does not have; where the head
            reads them `normalized_proprio` (batch, numbers) and, for a window, the prompts of all its steps (batch *
            window, ...) with `past_mask`; with action tokens `labels` (batch, length). Beside it `actions` (batch,
            horizon, dof) float64 in real units, `proprio` in real units or None, and `sample_ids` (batch, 2), episode
            and step of each row.
        """
        config: ActionConfig = self.prompts.config
        head: Any = config.head
        actions = np.stack([sample["actions"] for sample in samples])
        normalized = np.zeros((len(samples), config.horizon, head.dof))
        mask = np.zeros(normalized.shape, dtype=bool)
        states = np.zeros((len(samples), head.proprio_dim or 0))
        for key, where in self._by_key(samples):
            normalized[where] = config.normalize(actions[where], key)
            real = np.stack([samples[i]["action_pad_mask"] for i in where])
            mask[where, :, : config.space(key).dof] = real[..., None]
            if head.proprio_dim is not None:
                states[where] = config.normalize_proprio(_states(samples, where), key)
        batch: dict[str, Any] = {
            "normalized": torch.from_numpy(normalized).float(),  # first: its length is the number of samples
            "action_pad_mask": torch.from_numpy(mask),
        }
        if head.proprio_dim is not None:
            batch["normalized_proprio"] = torch.from_numpy(states).float()
        if self.window > 1:
            batch["past_mask"] = torch.from_numpy(np.stack([sample["past_pad_mask"] for sample in samples]))
        prompts = self._prompts(samples) if config.tokenizer is None else self._with_tokens(samples)
        ids = torch.tensor([[sample["episode"], sample["step"]] for sample in samples])
        return {**batch, **prompts, "actions": torch.from_numpy(actions), "sample_ids": ids}

    def _by_key(self, samples: Sequence[dict[str, Any]]) -> list[tuple[str, list[int]]]:
        """Which samples belong to which statistics."""
        if len(self.unnorm_keys) == 1:
            return [(self.unnorm_keys[0], list(range(len(samples))))]
        keys = [sample["unnorm_key"] for sample in samples]
        strangers = sorted(set(keys) - set(self.unnorm_keys))
        if strangers:
            raise DatasetError(f"samples of {strangers} in a mixture of {list(self.unnorm_keys)}")
        return [(key, [i for i, other in enumerate(keys) if other == key]) for key in dict.fromkeys(keys)]

    def _prompts(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Prompts of every step that the head sees, the steps of each sample together, the oldest first."""
        steps = [[sample["images"]] for sample in samples]
        if self.window > 1:
            steps = [[*sample["past_images"], sample["images"]] for sample in samples]
            if any(len(looks) != self.window for looks in steps):
                raise DatasetError(
                    f"the head sees {self.window} steps: make the ChunkDataset with history={self.window - 1}, got samples "
                    f"with {len(steps[0]) - 1} past steps"
                )
        images = [look for looks in steps for look in looks] if self.prompts.family.takes_images else None
        sentences = [sample["instruction"] for sample in samples for _ in range(self.window)]
        return dict(self.prompts.build(images, sentences))

    def _with_tokens(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Prompts with the tokens of the chunk behind them, and labels over all of it."""
        batch = super().__call__(samples)
        labels = batch.pop("labels")
        for name in ("use_cache", "logits_to_keep", "position_ids", "sample_ids"):
            batch.pop(name, None)
        n = labels.shape[1]
        # Tokens that nobody is asked for (past the episode's end) tell what comes: nothing may see them.
        batch["attention_mask"][:, -n:] *= (labels != IGNORED).to(batch["attention_mask"].dtype)
        before = torch.full((len(labels), batch["input_ids"].shape[1] - n), IGNORED)
        return {**batch, "labels": torch.cat([before, labels], dim=1)}


def _states(samples: Sequence[dict[str, Any]], where: list[int]) -> np.ndarray:
    """(n, numbers) states of some samples, real units."""
    states = [samples[i]["proprio"] for i in where]
    if any(state is None for state in states):
        raise DatasetError("the head reads the robot's state, and the dataset has none")
    return np.stack(states)
