"""The task of `multimodal.py`: two equally long ways round a wall, and how long the wall is.

The world is `TabletopEnv("detour")`. Tool, wall and block stand on one line, and the expert of the demo goes left or right of
the wall, each in half of the episodes. The average of its ways is the straight one. How infeasible that is, the wall says: a
tool in the middle of it has `blocked` meters to either side until it is free, which is half the wall's length and the tool's
radius. Less than that radius (8 mm) is blocked by a post that the tool may overlap, and 0 by nothing: the expert goes round
all the same, 14 mm beside what is blocked.

Two things are easier than in the demo, so that eight policies with three seeds each are learned on a CPU: the tool comes down
by itself, so an action is a move in the plane; and what is to be seen stands in the sentence, rounded to 4 mm (as the state
of pi0-FAST stands in its prompt, arXiv 2501.09747), so no network has to learn to see first. `push` and pictures are in
`tokens.py` and `hf-vla demo`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import gymnasium
import numpy as np
from tqdm.auto import tqdm

from hf_vla_actions import ActionSpace
from hf_vla_actions.demo.expert import Expert
from hf_vla_actions.demo.world import ACTION_FRAME, RATE_HZ, TABLE, TOOL_RADIUS, TabletopEnv
from hf_vla_actions.evaluate import Rollout, rollouts

KEY, HORIZON, DOF = "tabletop", 8, 2
SPACE = ActionSpace(("x", "y"), units=("m", "m"), delta=(True, True), frame=ACTION_FRAME, rate_hz=RATE_HZ)
HEIGHT, DESCENT = 0.055, 0.03  # meters; of travel, and at most a step on the way there
GRAIN = 0.004  # meters; of the positions in the sentence
UNSEEN = 1_000_000  # first seed of the episodes that policies are judged on


@dataclass(frozen=True)
class Setting:
    """How much of everything.

    Args:
        blocked: to each side by the walls, meters; every policy learns all of them.
        demonstrations: episodes of each wall.
        noise: standard deviation in meters of what is added to the x of a move that is carried out (DART).
        steps: of the optimizer for each policy.
        batch_size: chunks a step.
        learning_rate: at its peak.
        judged: closed-loop episodes of each wall.
        execute: actions of a chunk that are carried out.
        max_steps: of an episode.
    """

    blocked: tuple[float, ...] = (0.0, 0.004, 0.012, 0.03, 0.07)
    demonstrations: int = 320
    noise: float = 0.002
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    judged: int = 50
    execute: int = 4
    max_steps: int = 32


class Plane(gymnasium.Wrapper):
    """The world with moves (x, y) in meters, a wall of any length, and what there is to see in the sentence.

    Args:
        env: with the task "detour".
        blocked: to each side of the middle of the wall, meters.
    """

    def __init__(self, env: TabletopEnv, blocked: float):
        super().__init__(env)
        self.blocked = blocked

    def reset(self, **options):
        """A new episode."""
        obs, info = self.env.reset(**options)
        self._world.wall = replace(self._world.wall, half_length=self.blocked - TOOL_RADIUS)  # type: ignore[type-var]
        return self._told(obs), info

    def step(self, action: np.ndarray):
        """One move (2,); the tool goes on coming down until it travels."""
        down = np.clip(HEIGHT - self._world.pose[2], -DESCENT, DESCENT)
        obs, *rest = self.env.step(np.array([*action, down, 0.0, 0.0, 0.0, 1.0]))
        return self._told(obs), *rest

    @property
    def _world(self) -> TabletopEnv:
        return cast(TabletopEnv, self.unwrapped)

    def _told(self, obs: dict[str, Any]) -> dict[str, Any]:
        return {**obs, "instruction": sentence(self._world, self.blocked)}


def make_env(blocked: float, max_steps: int) -> Plane:
    """The world with a wall that blocks so much."""
    return Plane(TabletopEnv("detour", image_size=16, num_blocks=1, max_episode_steps=max_steps), blocked)


def sentence(env: TabletopEnv, blocked: float) -> str:
    """x and y of the tool and y of the block from the middle of the wall in grains, and what it blocks in mm."""
    middle = np.array(env.wall.center)  # type: ignore[union-attr]
    x, y = np.round((env.pose[:2] - middle) / GRAIN).astype(int)
    block = round((env.blocks[env.target][1] - middle[1]) / GRAIN)
    return f"detour x{x} y{y} b{block} w{1000 * blocked:.0f}"


def words(setting: Setting) -> list[str]:
    """Every word that a sentence may have."""
    far = int(2 * TABLE / GRAIN) + 1
    places = [f"{axis}{n}" for axis in "xyb" for n in range(-far, far + 1)]
    return ["detour", *places, *(f"w{1000 * blocked:.0f}" for blocked in setting.blocked)]


@dataclass(frozen=True)
class Demonstrations:
    """Chunks (n, HORIZON, DOF) in meters, the sentence before each, and whether it is the first of its episode."""

    sentences: list[str]
    actions: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.actions)


def demonstrate(setting: Setting, first_seed: int, episodes: int | None = None) -> Demonstrations:
    """What the expert does; after it has arrived it stays, so that every chunk is whole."""
    rng, told, chunks, first = np.random.default_rng(first_seed), [], [], []
    episodes = setting.demonstrations if episodes is None else episodes
    for blocked in setting.blocked:
        env = make_env(blocked, 60)
        expert = Expert(env, rng)
        for seed in tqdm(range(first_seed, first_seed + episodes), desc=f"{blocked} m blocked", leave=False):
            obs, _ = env.reset(seed=seed)
            actions, seen, done = [], [], False
            while not done:
                seen.append(obs["instruction"])
                actions.append(expert()[:DOF])
                obs, _, terminated, truncated, _ = env.step(actions[-1] + (rng.normal(0, setting.noise), 0.0))
                done = terminated or truncated
            actions += [np.zeros(DOF)] * HORIZON
            told += seen
            chunks += [actions[i : i + HORIZON] for i in range(len(seen))]
            first += [i == 0 for i in range(len(seen))]
    return Demonstrations(told, np.array(chunks), np.array(first))


@dataclass
class Judged:
    """What one policy did at one wall.

    Attributes:
        blocked: to each side of the middle of the wall, meters.
        episodes: how many.
        clean: seeds that arrived and never touched the wall.
        arrived: seeds that arrived, touching it or not.
        touched: seeds in which the wall stopped a move at least once.
        left: seeds that passed on the left.
        right: on the right; the others never passed.
        steps: mean of those that arrived; None if there are none.
    """

    blocked: float
    episodes: int
    clean: list[int] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    steps: float | None = None


def stopped(episode: Rollout) -> int:
    """Steps in which the wall stopped the tool: it is not where the table alone would have let it go."""
    places = np.array(episode.poses)[:, :2]
    meant = np.clip(places[:-1] + np.array(episode.actions), -TABLE, TABLE)
    return int((np.abs(places[1:] - meant) > 1e-9).any(axis=1).sum())


def judge(predict: Callable, setting: Setting, name: str) -> list[Judged]:
    """Closed-loop episodes at every wall, on the same seeds for every policy."""
    seeds, out = range(UNSEEN, UNSEEN + setting.judged), []
    for blocked in setting.blocked:
        episodes = rollouts(
            lambda blocked=blocked: make_env(blocked, setting.max_steps),  # type: ignore[misc]
            predict,
            seeds,
            max_steps=setting.max_steps,
            execute_steps=setting.execute,
            description=f"{name}, {blocked} m blocked",
        )
        out.append(_judged(episodes, blocked))
    return out


def _judged(episodes: Sequence[Rollout], blocked: float) -> Judged:
    judged, env = Judged(blocked, len(episodes)), make_env(blocked, 1)
    for episode in episodes:
        number = episode.seed - UNSEEN
        env.reset(seed=episode.seed)
        wall = cast(TabletopEnv, env.unwrapped).wall
        path = np.array(episode.poses)[:, :2] - np.array(wall.center)  # type: ignore[union-attr]
        beyond = np.flatnonzero(path[:, 1] >= 0)
        touches = stopped(episode) > 0
        judged.touched += [number] * touches
        judged.arrived += [number] * episode.success
        judged.clean += [number] * (episode.success and not touches)
        if len(beyond):
            (judged.left if path[beyond[0], 0] < 0 else judged.right).append(number)
    steps = [len(episode.actions) for episode in episodes if episode.success]
    judged.steps = float(np.mean(steps)) if steps else None
    return judged
