"""Which episodes are trained on and which are held out: the same ones wherever the same seed is named."""

from __future__ import annotations

import numpy as np

from hf_vla_actions.data.reader import EpisodeReader
from hf_vla_actions.errors import TrainingError


def split_episodes(dataset: EpisodeReader, eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Episodes to train on and to hold out; whole episodes, chosen by the seed."""
    if not 0.0 <= eval_fraction < 1.0:
        raise TrainingError(f"eval_fraction is a share from 0 to below 1, got {eval_fraction}")
    indices = np.array([episode.index for episode in dataset.episodes])
    n_held_out = int(np.ceil(eval_fraction * len(indices)))
    if n_held_out >= len(indices):
        raise TrainingError(
            f"eval_fraction={eval_fraction} holds out all {len(indices)} episodes; nothing is left to train on"
        )
    shuffled = np.random.default_rng(seed).permutation(indices)
    return sorted(shuffled[n_held_out:].tolist()), sorted(shuffled[:n_held_out].tolist())
