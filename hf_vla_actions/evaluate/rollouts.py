"""Closed-loop episodes of a policy, all in lockstep, so that a model predicts for all of them in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_vla_actions.constraints.retime import RetimedChunk
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.runtime.chunks import first_steps

Predict = Callable[[list[dict[str, Any]]], "np.ndarray | Sequence[np.ndarray | RetimedChunk]"]


@dataclass
class Rollout:
    """One episode.

    Attributes:
        seed: what the environment was reset with.
        success: whether the environment reported `info["success"]` at any step.
        actions: (steps, dof) actions carried out, real units.
        poses: (steps + 1, n) proprio of every observation, the first one before any action.
        frames: pictures, if they were asked for.
    """

    seed: int
    success: bool = False
    actions: list[np.ndarray] = field(default_factory=list)
    poses: list[np.ndarray] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)


def rollouts(
    make_env: Callable[[], Any],
    predict: Predict,
    seeds: Sequence[int],
    *,
    max_steps: int,
    execute_steps: int = 1,
    keep_frames: bool = False,
    description: str | None = None,
) -> list[Rollout]:
    """Run one episode a seed.

    Args:
        make_env: makes one Gymnasium environment; its observations are dicts with "images", "instruction", "proprio".
        predict: observations of the episodes that still run, to chunks in real units: (n, horizon, dof), or a list of n
            of any length (horizon, dof), retimed ones among them.
        seeds: of `env.reset`; equal seeds give the same episode, so runs of several policies can be compared in pairs.
        max_steps: steps after which an episode ends without success.
        execute_steps: decoded steps of a chunk that are carried out before the next look: one action each, more where a
            chunk was retimed.
        keep_frames: keep every picture.
        description: name on the progress bar; no bar if None.
    """
    if not len(seeds):
        raise VLAActionsError("rollouts need at least one seed")
    envs = [make_env() for _ in seeds]
    observations = [env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds, strict=True)]
    episodes = [Rollout(int(seed)) for seed in seeds]
    for episode, obs in zip(episodes, observations, strict=True):
        _note(episode, obs, keep_frames)
    running = list(range(len(seeds)))
    with tqdm(total=len(seeds), desc=description, unit="episode", disable=description is None, leave=False) as bar:
        while running:
            chunks = predict([observations[i] for i in running])
            still = []
            for i, chunk in zip(running, chunks, strict=True):
                done = _carry_out(
                    envs[i], episodes[i], first_steps(chunk, execute_steps), observations, i, max_steps, keep_frames
                )
                still += [] if done else [i]
            if len(still) < len(running):
                bar.update(len(running) - len(still))
            running = still
    return episodes


def _carry_out(env, episode: Rollout, actions, observations, i: int, max_steps: int, keep_frames: bool) -> bool:
    for action in actions:
        observations[i], _, terminated, truncated, info = env.step(np.asarray(action, dtype=np.float64))
        episode.actions.append(np.array(action))
        _note(episode, observations[i], keep_frames)
        episode.success = episode.success or bool(info.get("success", False))
        if terminated or truncated or len(episode.actions) >= max_steps:
            return True
    return False


def _note(episode: Rollout, obs: dict[str, Any], keep_frames: bool) -> None:
    episode.poses.append(np.array(obs["proprio"]))
    if keep_frames:
        episode.frames.append(np.array(obs["images"]))
