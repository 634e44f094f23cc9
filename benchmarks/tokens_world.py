"""What the policies of `tokens.py` learn from: demonstrations of "reach" in the demo's world, kept in memory.

The demo's expert moves each axis by 30 mm or not at all, which three bins hold; the one here moves straight, and slower near
the block, so that how finely numbers are written matters. And it goes on after it has arrived, so that every chunk is
whole. Everything else is the demo's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_vla_actions.demo.demonstrations import SPACE
from hf_vla_actions.demo.world import TabletopEnv

KEY, HORIZON, DOF = "tabletop", 8, SPACE.dof
MOVING = [SPACE.index(name) for name in ("x", "y", "z")]  # the others are constant in "reach"
LONGEST, GAIN, ABOVE = 0.02, 0.35, 0.055  # meters of a step; share of the way left where that is less; meters


@dataclass(frozen=True)
class Setting:
    """How much of everything.

    Args:
        demonstrations: episodes to learn from.
        held_out: episodes that losses are measured on.
        sight: steps of the optimizer for the backbone, on prompts alone, twice as many of them a step.
        steps: of the optimizer for each policy.
        batch_size: chunks a step.
        learning_rate: at its peak.
        judged: closed-loop episodes.
        execute: actions of a chunk that are carried out.
        max_steps: of an episode.
    """

    demonstrations: int = 2000
    held_out: int = 100
    sight: int = 1500
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3
    judged: int = 200
    execute: int = 4
    max_steps: int = 24


@dataclass(frozen=True)
class Chunks:
    """Demonstrated chunks with what was seen before them, in the model's own tensors.

    Args:
        prompts: `input_ids`, `attention_mask` and `pixel_values` of all chunks.
        actions: (n, HORIZON, DOF) real units.
        ways: (n, 3) from the tool to the point above the named block, meters.
    """

    prompts: dict[str, torch.Tensor]
    actions: np.ndarray
    ways: np.ndarray

    def __len__(self) -> int:
        return len(self.actions)


def way_to_go(env: TabletopEnv) -> np.ndarray:
    """(3,) from the tool to the point above the named block, meters."""
    return np.append(env.blocks[env.target], ABOVE) - env.pose[:3]


def expert(env: TabletopEnv) -> np.ndarray:
    """(DOF,) straight along the way, at most `LONGEST` a step and `GAIN` of what is left."""
    away = way_to_go(env)
    step = away * min(GAIN, LONGEST / max(float(np.linalg.norm(away)), 1e-9))
    return np.array([*step, 0.0, 0.0, 0.0, 1.0])


def demonstrate(
    episodes: int, first_seed: int, noise: float = 0.002
) -> tuple[list, list[str], np.ndarray, np.ndarray]:
    """Pictures, sentences, chunks and ways of the expert; each episode begins with a move at random."""
    env, rng = TabletopEnv("reach"), np.random.default_rng(first_seed)
    pictures, sentences, chunks, ways = [], [], [], []
    for seed in tqdm(range(first_seed, first_seed + episodes), desc="demonstrations", leave=False):
        env.reset(seed=seed)
        obs = env.step(np.append(rng.uniform(-1, 1, 3) * (0.08, 0.08, 0.03), (0, 0, 0, 1)))[0]
        seen, actions = [], []
        while not env.success and len(seen) < 60:
            seen.append(obs["images"])
            ways.append(way_to_go(env))
            actions.append(expert(env))
            obs = env.step(actions[-1] + np.append(rng.normal(0, noise, 3), np.zeros(4)))[0]
        for _ in range(HORIZON if seen else 0):
            actions.append(expert(env))
            env.step(actions[-1])
        pictures += seen
        sentences += [obs["instruction"]] * len(seen)
        chunks += [actions[i : i + HORIZON] for i in range(len(seen))]
    return pictures, sentences, np.array(chunks), np.array(ways)
