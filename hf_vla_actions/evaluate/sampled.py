"""What chunks drawn from a continuous head say about a policy: how far off they are in real units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.evaluate.agreement import adds_up, agreement
from hf_vla_actions.metrics import action_metrics, drift_by_step
from hf_vla_actions.models.collator import IGNORED
from hf_vla_actions.models.head_collator import HeadCollator

NO_PROMPT = ("normalized", "action_pad_mask", "labels", "actions", "sample_ids")


def noise_of(sample_ids: torch.Tensor, horizon: int, dof: int, seed: int) -> torch.Tensor:
    """(batch, horizon, dof) float32 what each sample's chunk starts from: always the same, whatever else is in the batch.

    Args:
        sample_ids: (batch, 2) episode and step.
        horizon: actions in a chunk.
        dof: numbers in an action of the head.
        seed: of all of them.
    """
    rows = [np.random.default_rng([seed, *row]).standard_normal((horizon, dof)) for row in sample_ids.tolist()]
    return torch.from_numpy(np.stack(rows)).float()


@torch.no_grad()
def sample_chunks(policy: Any, batch: Mapping[str, Any], sample_ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """(batch, horizon, dof of the head) normalized chunks, as `predict_action` draws them, with noise of their own.

    Args:
        policy: in eval mode, with a head.
        batch: from `HeadCollator`, on the policy's device. Tokens of the chunk that stand behind the prompt are cut off.
        sample_ids: (batch, 2) episode and step, which the noise follows from.
        seed: of the noise.
    """
    head = policy.action_head
    inputs = prompts_of(batch)
    features = policy.features(**inputs)
    noise = None
    if head.takes_guidance:  # it starts from noise
        noise = noise_of(sample_ids, head.config.horizon, head.config.dof, seed).to(policy.device)
    generator = torch.Generator(policy.device).manual_seed(seed)  # of what is drawn on the way
    return head.sample(features, noise=noise, generator=generator)


def prompts_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Of a batch of `HeadCollator` what `HeadPolicyMixin.features` takes: nothing that is to be learned."""
    inputs = {name: value for name, value in batch.items() if name not in NO_PROMPT}
    labels = batch.get("labels")
    if labels is None:
        return inputs
    # The first action of a chunk is always real, so its tokens are asked for: they begin where the prompt ends.
    end = int((labels != IGNORED).any(dim=0).int().argmax())
    return {
        name: value[:, :end] if isinstance(value, torch.Tensor) and value.shape == labels.shape else value
        for name, value in inputs.items()
    }


def predict_samples(policy: Any, unnorm_key: str, samples: Sequence[dict[str, Any]], seed: int = 0) -> np.ndarray:
    """(n, horizon, dof) chunks in real units for samples of a `ChunkDataset`, free of any constraint.

    Args:
        policy: in eval mode, with a head.
        unnorm_key: which statistics and action space.
        samples: with a history, where the head has one.
        seed: of the noise.
    """
    batch = HeadCollator(policy.prompts, unnorm_key, window=policy.action_head.window)(samples)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            batch[name] = value.to(policy.device, policy.dtype if name == "pixel_values" else None)
    chunks = sample_chunks(policy, batch, batch["sample_ids"], seed)
    return policy.action_config.unnormalize(chunks.double().cpu().numpy(), unnorm_key)[1]


def head_metrics(
    config: ActionConfig, unnorm_key: str, normalized: np.ndarray, actions: np.ndarray, pad_mask: np.ndarray
) -> dict[str, float]:
    """Metrics of chunks that a head drew.

    Args:
        config: what the numbers mean.
        unnorm_key: which statistics and action space.
        normalized: (n, horizon, dof of the head).
        actions: (n, horizon, dof) demonstrated, real units.
        pad_mask: (n, horizon) bool, True = real.

    Returns:
        As of a policy with tokens, where it means the same: `l1_normalized` and `l1` with an entry for each dimension
        (`l1/x` in the unit of x), `within_1_bins` and so on (256 bins over the same range), scores of the gripper;
        and `drift/x`, how far the displacement since the chunk's beginning is off at its last step.
    """
    space = config.space(unnorm_key)
    own, found = config.unnormalize(normalized, unnorm_key)
    wanted = config.normalize(actions, unnorm_key)[..., : space.dof]
    dims = adds_up(space)
    drift = drift_by_step(found[..., dims], actions[..., dims], pad_mask)
    ends = {space.names[dim]: column[~np.isnan(column)] for dim, column in zip(dims, drift.T, strict=True)}
    return {
        **action_metrics(own, wanted, pad_mask, space.names, "l1_normalized"),
        **agreement(config, unnorm_key, found, actions, pad_mask),
        **{f"drift/{name}": float(column[-1]) for name, column in ends.items() if len(column)},
    }
