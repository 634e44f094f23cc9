"""Demonstrations of the scripted expert, written as a LeRobotDataset v3.0."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from hf_vla_actions.actions import ActionSpace, Gripper
from hf_vla_actions.data import LeRobotWriter
from hf_vla_actions.demo.expert import MAX_STEP, Expert
from hf_vla_actions.demo.world import ACTION_FRAME, ACTION_NAMES, ACTION_UNITS, RATE_HZ, TabletopEnv, WorldError

CAMERA = "top"
SLOWEST = 0.2
"""Tightest step limit of `augment_limits`, over the expert's longest step."""

SPACE = ActionSpace(
    ACTION_NAMES,
    units=ACTION_UNITS,
    delta=(True,) * 6 + (False,),
    frame=ACTION_FRAME,
    gripper=Gripper("gripper", open=1.0, closed=0.0),
    rate_hz=RATE_HZ,
)
"""What the numbers of the tabletop world mean."""


def write_lerobot_dataset(
    path: str | Path,
    *,
    episodes: int,
    tasks: tuple[str, ...] = ("reach",),
    seed: int = 0,
    noise: float = 0.0,
    augment_limits: float = 0.0,
    progress: bool = True,
) -> Path:
    """Record the expert and write what it did.

    Args:
        path: new folder.
        episodes: how many, the tasks in turn.
        tasks: of the world.
        seed: of the first episode; the others follow.
        noise: standard deviation in meters of a disturbance of the carried-out step along x and y, a third of it along z. The recorded
            action is the expert's own, so the data shows how to recover (DART, Laskey et al. 2017,
            arXiv 1703.09327).
        augment_limits: share of the episodes in which the expert obeys a step limit, drawn anew for each from
            `SLOWEST` to 1 times its own longest step. Its moves are shortened in their direction and recorded as they
            were carried out (the noise shrinks with them), so the data shows the states of a slowed robot, and what
            an expert under a limit does there.
        progress: show a bar.

    Returns:
        The folder. Unsuccessful episodes are left out, so that every demonstration shows how it is done.
    """
    if episodes < 1 or not tasks:
        raise WorldError(f"a dataset needs at least one episode and one task, got {episodes} and {list(tasks)}")
    if not 0.0 <= augment_limits <= 1.0:
        raise WorldError(f"augment_limits is a share of the episodes from 0 to 1, got {augment_limits}")
    envs = {task: TabletopEnv(task) for task in tasks}
    size = next(iter(envs.values())).image_size
    rng = np.random.default_rng(seed)
    with (
        LeRobotWriter(
            path,
            fps=RATE_HZ,
            robot_type="tabletop",
            action_names=ACTION_NAMES,
            state_names=ACTION_NAMES,
            image_shapes={CAMERA: (size, size, 3)},
        ) as writer,
        tqdm(total=episodes, desc="demonstrations", unit="episode", disable=not progress) as bar,
    ):
        attempt = 0
        while writer.n_episodes < episodes:
            env = envs[tasks[writer.n_episodes % len(tasks)]]
            if attempt > 10 * episodes:
                raise WorldError(f"the expert succeeds too rarely with noise={noise} m; use less")
            # No draw where nothing is slowed: such a dataset is the same, number by number, as without the option.
            slowed = augment_limits > 0 and rng.random() < augment_limits
            share = rng.uniform(SLOWEST, 1.0) if slowed else 1.0
            if _record(env, writer, seed + attempt, rng, noise, share):
                bar.update()
            attempt += 1
    return Path(path)


def _record(
    env: TabletopEnv, writer: LeRobotWriter, seed: int, rng: np.random.Generator, noise: float, share: float
) -> bool:
    """Run and write one episode whose steps are at most `share` of the expert's longest; say whether it succeeded."""
    obs, info = env.reset(seed=seed)
    expert = Expert(env, rng)
    frames, states, actions = [], [], []
    patience = math.ceil(env.max_episode_steps / share)
    done = False
    while not done:
        action = expert()
        action[:3] *= min(1.0, share * MAX_STEP / max(float(np.abs(action[:3]).max()), 1e-9))
        frames.append(obs["images"])
        states.append(obs["proprio"])
        actions.append(action)
        disturbed = action.copy()
        disturbed[:3] += rng.normal(0.0, share * noise, 3) * (1.0, 1.0, 1 / 3)
        obs, _, terminated, _, info = env.step(disturbed)
        done = terminated or len(actions) >= patience
    if info["success"]:
        writer.add_episode(env.instruction, np.array(actions), {CAMERA: frames}, np.array(states))
    return bool(info["success"])
