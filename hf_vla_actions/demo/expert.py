"""A scripted expert for the tabletop world. It reads the world's state, not the picture.

Round the wall it has two equally good ways and takes one at random, once an episode: the demonstrations are
multimodal on purpose, and their average runs into the wall.
"""

from __future__ import annotations

from typing import cast

import gymnasium
import numpy as np

from .world import CONTACT, PUSH_HEIGHT, TABLE, TOOL_RADIUS, TabletopEnv, WorldError

MAX_STEP = 0.03
"""Longest move of the expert along each axis in one step, meters."""
MAX_TURN = 0.3
"""Largest turn of the expert in one step, radians."""
JOG = 0.03
"""The expert moves in whole jogs, like a hand on a teach pendant: fewer different actions, quicker learned; meters."""
_TRAVEL_HEIGHT = 0.055  # above the blocks, low enough to count as reached
_PUSHING_HEIGHT = 0.02
_CLEARANCE = TOOL_RADIUS + 0.014  # from the wall's surface to the way round it


class Expert:
    """Call it for the next action of the environment it was made for.

    ```python
    env = TabletopEnv("detour")
    expert = Expert(env, seed=0)
    env.reset(seed=7)
    while not env.success:
        env.step(expert())
    ```

    Args:
        env: The world; wrapped environments are unwrapped.
        seed: Seed or generator for the side taken round the wall.
        max_step: Longest move along each of x, y and z in one action, meters. A smaller one takes more steps, and may
            need a longer `max_episode_steps`.
    """

    def __init__(
        self, env: gymnasium.Env, seed: int | np.random.Generator | None = None, *, max_step: float = MAX_STEP
    ):
        if not max_step > 0:
            raise WorldError(f"max_step must be above 0 m, got {max_step}.")
        self.env = cast(TabletopEnv, env.unwrapped)
        self.max_step = max_step
        self.side = "left"
        self._rng = np.random.default_rng(seed)
        self._episode: int | None = None

    def __call__(self) -> np.ndarray:
        """The next action, (7,) float64: x y z roll pitch yaw deltas (meters, radians), gripper (open = 1)."""
        env = self.env
        if self._episode != env.episode:
            self._episode = env.episode
            self.side = ("left", "right")[self._rng.integers(2)]
        if env.task == "push":
            delta, gripper = self._push(), 0.0
        else:
            delta, gripper = self._travel(self._next_waypoint(), _TRAVEL_HEIGHT), 1.0
        turn = np.clip(-env.pose[5], -MAX_TURN, MAX_TURN)
        return np.array([*delta, 0.0, 0.0, turn, gripper])

    def _travel(self, xy: np.ndarray, z: float) -> np.ndarray:
        """Delta (3,) towards a point, each axis at full speed until it is there (within half a jog when reaching)."""
        away = np.append(xy, z) - self.env.pose[:3]
        if self.env.task == "reach":
            away = np.round(away / JOG) * JOG
        return np.clip(away, -self.max_step, self.max_step)

    def _next_waypoint(self) -> np.ndarray:
        """The block itself, or the next corner (2,) of the way round the wall."""
        env = self.env
        block = env.blocks[env.target]
        wall = env.wall
        if wall is None:
            return block
        x, y = env.pose[:2]
        away = wall.half_thickness + _CLEARANCE
        near, far = wall.center[1] - away, wall.center[1] + away
        if y >= far - 1e-6:
            return block
        sign = -1.0 if self.side == "left" else 1.0
        side_x = wall.center[0] + sign * (wall.half_length + _CLEARANCE)
        beside = sign * (x - side_x) >= -0.006
        return np.array([side_x, far if beside else min(y, near)])

    def _push(self) -> np.ndarray:
        """Delta (3,): over the block to its far side, down, and straight to the plate; up again when it slips off."""
        env = self.env
        tool, z = env.pose[:2], env.pose[2]
        block = env.blocks[env.target]
        way = env.plate - block
        direction = way / max(float(np.linalg.norm(way)), 1e-9)
        from_block = tool - block
        along = float(from_block @ direction)
        aside = from_block - along * direction
        behind = np.clip(block - direction * (CONTACT + 0.012), -TABLE, TABLE)
        if z < PUSH_HEIGHT:
            if along < 0 and np.linalg.norm(aside) < 0.015:
                push = direction * self.max_step - aside
                return np.append(push * min(1.0, self.max_step / np.abs(push).max()), _PUSHING_HEIGHT - z).clip(
                    -self.max_step, self.max_step
                )
            return np.array([0.0, 0.0, min(self.max_step, _TRAVEL_HEIGHT - z)])
        if np.linalg.norm(tool - behind) < 0.006:
            return np.append(behind - tool, _PUSHING_HEIGHT - z).clip(-self.max_step, self.max_step)
        return self._travel(behind, _TRAVEL_HEIGHT)
