"""A small tabletop world with Gymnasium's interface: picture and sentence in, seven numbers out.

It exists so that the whole path (demonstrations, training, decoding under constraints, closed loop) can be
learned and judged in minutes on any machine. It is not a robot benchmark: there are no dynamics, no joints, no
camera noise, and a success rate here says nothing about a robot.

Notable decisions:

- The tool goes exactly where the delta says. Only the edges of the table and the wall stop it; there is no step
  limit and no speed limit. Keeping commands small is the task of the policy and its constraints, not of the world.
- The tool pushes blocks when it is low (below `PUSH_HEIGHT`) and passes over them when it is high. Blocks do not
  touch each other, and do not stop at the wall.
- The wall is taller than the table's free space: it can be passed only on the left or the right.
- Colors make seeing easy on purpose: on a white table, red and green blocks and a blue tool are linearly independent.
- Wrist angles are followed and drawn (yaw), but no success depends on them. Roll and pitch stay zero in every
  scripted demonstration: real datasets have constant dimensions too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from ..errors import VLAActionsError

ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
ACTION_UNITS = ("m", "m", "m", "rad", "rad", "rad", None)
"""Deltas in the world frame, except the gripper, which is absolute: open = 1, closed = 0."""
ACTION_FRAME = "world"
RATE_HZ = 5.0

TASKS = ("reach", "detour", "push")
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0)}
INSTRUCTIONS = {
    "reach": "move to the {color} block",
    "detour": "go around the wall to the {color} block",
    "push": "push the {color} block onto the plate",
}

TABLE = 0.15  # half the edge of the square table, meters; x to the right and y up in the picture
FLOOR, CEILING = 0.01, 0.20  # meters above the table that the tool can reach
BLOCK_RADIUS = 0.025  # half the edge in the picture, radius in contact
TOOL_RADIUS = 0.008
CONTACT = BLOCK_RADIUS + TOOL_RADIUS
PUSH_HEIGHT = 0.035  # below this the tool touches blocks
REACH_HEIGHT = 0.08  # below this a block counts as reached
PLATE_RADIUS = 0.04
_SUBSTEP = 0.004  # meters between two looks at contacts
_BACKGROUND, _WALL_COLOR, _PLATE_COLOR, _TOOL_COLOR = (255, 255, 255), (60, 60, 60), (200, 200, 200), (0, 0, 255)


class WorldError(VLAActionsError):
    """A task, seed or action that the tabletop world does not take; nothing has moved."""


@dataclass(frozen=True)
class Wall:
    """An upright wall along x.

    Attributes:
        center: (x, y) meters.
        half_length: meters along x.
        half_thickness: meters along y.
    """

    center: tuple[float, float]
    half_length: float = 0.05
    half_thickness: float = 0.008

    def hits(self, xy: np.ndarray, clearance: float = TOOL_RADIUS) -> bool:
        """Whether a point (2,) in meters lies within `clearance` of the wall (corners counted square)."""
        return bool(
            abs(xy[0] - self.center[0]) < self.half_length + clearance
            and abs(xy[1] - self.center[1]) < self.half_thickness + clearance
        )


class TabletopEnv(gymnasium.Env):
    """Colored blocks on a table, a camera above, and a tool that follows delta actions.

    Observations are `{"images": (image_size, image_size, 3) uint8, "instruction": str, "proprio": (7,) float64}`;
    proprio is x y z roll pitch yaw gripper (meters, radians, open = 1). Actions are (7,) float64 deltas in the same
    order, the gripper absolute. The reward is 1.0 on the step that succeeds, which also ends the episode.

    Args:
        task: "reach" (tool above the named block), "detour" (the same behind a wall, with two equally long ways
            round) or "push" (named block onto the plate).
        image_size: Edge of the square picture, pixels.
        num_blocks: Blocks on the table, 1 or 2, all of different colors.
        tolerance: Horizontal distance that counts as reached, meters.
        max_episode_steps: Steps until `truncated`; 24 for reach, 48 otherwise, unless given.
        render_mode: None or "rgb_array".
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": RATE_HZ}  # noqa: RUF012 (Gymnasium's own convention)

    def __init__(
        self,
        task: str = "reach",
        *,
        image_size: int = 48,
        num_blocks: int = 2,
        tolerance: float = 0.025,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ):
        if task not in TASKS:
            raise WorldError(f"task {task!r} is not one of {TASKS}.")
        if not 1 <= num_blocks <= len(COLORS):
            raise WorldError(f"num_blocks must be 1 to {len(COLORS)} (one per color), got {num_blocks}.")
        if image_size < 16:
            raise WorldError(f"image_size must be at least 16 pixels, got {image_size}.")
        self.task, self.image_size, self.num_blocks, self.tolerance = task, image_size, num_blocks, tolerance
        self.max_episode_steps = max_episode_steps or (24 if task == "reach" else 48)
        self.render_mode = render_mode
        self.episode = 0  # number of resets; tells an expert that a new episode began
        self._started = False

        reach = np.array([0.1, 0.1, 0.1, np.pi, np.pi, np.pi])
        self.action_space = spaces.Box(np.append(-reach, 0.0), np.append(reach, 1.0), dtype=np.float64)
        low = np.array([-TABLE, -TABLE, FLOOR, -np.pi, -np.pi, -np.pi, 0.0])
        high = np.array([TABLE, TABLE, CEILING, np.pi, np.pi, np.pi, 1.0])
        self.observation_space = spaces.Dict(
            {
                "images": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "instruction": spaces.Text(64, charset="abcdefghijklmnopqrstuvwxyz "),
                "proprio": spaces.Box(low, high, dtype=np.float64),
            }
        )
        center = (np.arange(image_size) + 0.5) / image_size * 2 * TABLE - TABLE
        self._pixel_x, self._pixel_y = center[None, :], -center[:, None]

    # State, read by experts and tests.

    @property
    def pose(self) -> np.ndarray:
        """(6,) x y z roll pitch yaw of the tool, meters and radians, world frame."""
        return self._pose.copy()

    @property
    def instruction(self) -> str:
        """The sentence of this episode."""
        return INSTRUCTIONS[self.task].format(color=self.target)

    def swapped_instruction(self) -> str:
        """The same sentence with the color of another block on the table: what a policy must not follow to succeed."""
        others = [color for color in self.blocks if color != self.target]
        if not others:
            raise WorldError("swapping the instruction needs a second block; set num_blocks to 2 or more.")
        return INSTRUCTIONS[self.task].format(color=others[0])

    @property
    def success(self) -> bool:
        """Whether the task is done in the present state."""
        block = self.blocks[self.target]
        if self.plate is not None:
            return bool(np.linalg.norm(block - self.plate) <= PLATE_RADIUS)
        return bool(np.linalg.norm(self._pose[:2] - block) <= self.tolerance and self._pose[2] <= REACH_HEIGHT)

    # Gymnasium's interface.

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Lay out a new episode.

        Args:
            seed: The same seed gives the same episode; None goes on with the generator.
            options: Unused; part of Gymnasium's interface.

        Returns:
            The observation and an info dictionary with "success" and "pose".
        """
        super().reset(seed=seed)
        rng = self.np_random
        colors = [str(color) for color in rng.permutation(list(COLORS))[: self.num_blocks]]
        self.target = colors[0]
        self.wall: Wall | None = None
        self.plate: np.ndarray | None = None
        self._pose = np.zeros(6)
        self._pose[2] = rng.uniform(0.07, 0.14)
        self.gripper = 1.0
        taken: list[np.ndarray] = []
        if self.task == "detour":
            x = rng.uniform(-0.04, 0.04)
            self.wall = Wall((x, rng.uniform(-0.015, 0.015)))
            taken.append(np.array([x, rng.uniform(0.07, 0.10)]))
            self._pose[:2] = x, rng.uniform(-0.13, -0.09)
        elif self.task == "push":
            taken.append(rng.uniform(-0.08, 0.08, 2))
            self.plate = self._place(taken, 0.09, 0.10)
        else:
            taken.append(rng.uniform(-0.12, 0.12, 2))
        target = taken[0]
        if self.plate is not None:
            taken.append(self.plate)
        self.blocks = {self.target: target}
        for color in colors[1:]:
            taken.append(self._place(taken, 0.12, 0.11 if self.task == "reach" else 0.07))
            self.blocks[color] = taken[-1]
        if self.task != "detour":
            self._pose[:2] = self._place([target], 0.05 if self.task == "reach" else 0.13, 0.06)
        self.episode += 1
        self._steps, self._started = 0, True
        return self._observation(), self._info()

    def step(self, action: np.ndarray):
        """Move the tool by one delta action.

        Args:
            action: (7,) x y z roll pitch yaw deltas in meters and radians, world frame, and the gripper (open = 1).

        Returns:
            Observation, reward, terminated (success), truncated (out of steps), info.

        Raises:
            WorldError: Not started, not seven numbers, or not all finite; nothing has moved.
        """
        if not self._started:
            raise WorldError("step before reset: call reset(seed=...) first.")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,):
            raise WorldError(f"an action is 7 numbers {ACTION_NAMES}, got shape {action.shape}.")
        if not np.isfinite(action).all():
            raise WorldError(f"an action must be finite, got {action.tolist()}.")
        self._pose[2] = np.clip(self._pose[2] + action[2], FLOOR, CEILING)
        self._pose[3:] = (self._pose[3:] + action[3:6] + np.pi) % (2 * np.pi) - np.pi
        self.gripper = float(np.clip(action[6], 0.0, 1.0))
        # The table's edge first: a huge delta costs no more substeps than the table is wide.
        goal = np.clip(self._pose[:2] + action[:2], -TABLE, TABLE)
        num_substeps = max(1, math.ceil(np.abs(goal - self._pose[:2]).max() / _SUBSTEP))
        for delta in np.repeat((goal - self._pose[:2])[None] / num_substeps, num_substeps, axis=0):
            self._move(delta)
        self._steps += 1
        terminated = self.success
        truncated = not terminated and self._steps >= self.max_episode_steps
        return self._observation(), float(terminated), terminated, truncated, self._info()

    def render(self) -> np.ndarray | None:
        """The camera's picture, (image_size, image_size, 3) uint8, if `render_mode` is "rgb_array"."""
        return self._draw() if self.render_mode == "rgb_array" else None

    # Physics.

    def _place(self, taken: list[np.ndarray], half_width: float, distance: float) -> np.ndarray:
        """Draw a point (2,) at least `distance` meters from all of `taken` and clear of the wall."""
        while True:
            for _ in range(100):
                point = self.np_random.uniform(-half_width, half_width, 2)
                if self.wall is not None and self.wall.hits(point, BLOCK_RADIUS):
                    continue
                if all(np.linalg.norm(point - other) >= distance for other in taken):
                    return point
            distance *= 0.9  # a crowded table: come a little closer rather than never end

    def _move(self, delta: np.ndarray) -> None:
        """One small horizontal move (2,), stopped by the wall axis by axis, pushing what it touches."""
        for axis in (0, 1):
            moved = self._pose[:2].copy()
            moved[axis] += delta[axis]
            if self.wall is None or not self.wall.hits(moved):
                self._pose[:2] = moved
        if self._pose[2] >= PUSH_HEIGHT:
            return
        for color, block in self.blocks.items():
            offset = block - self._pose[:2]
            distance = np.linalg.norm(offset)
            if distance < CONTACT:
                normal = offset / distance if distance > 1e-9 else np.array([1.0, 0.0])
                self.blocks[color] = np.clip(self._pose[:2] + normal * CONTACT, -TABLE, TABLE)

    # Observation.

    def _observation(self) -> dict[str, Any]:
        proprio = np.append(self._pose, self.gripper)
        return {"images": self._draw(), "instruction": self.instruction, "proprio": proprio}

    def _info(self) -> dict[str, Any]:
        return {"success": self.success, "pose": self.pose}

    def _draw(self) -> np.ndarray:
        """Paint plate, wall, blocks and tool with smooth edges; the tool is an open ring, wider when it is higher."""
        picture = np.empty((self.image_size, self.image_size, 3), np.float32)
        picture[:] = _BACKGROUND
        if self.plate is not None:
            self._paint(picture, self._radius(self.plate) - PLATE_RADIUS, _PLATE_COLOR)
        if self.wall is not None:
            half = (self.wall.half_length, self.wall.half_thickness)
            self._paint(picture, self._box(self.wall.center, half), _WALL_COLOR)
        for color, block in self.blocks.items():
            self._paint(picture, self._box(block, (BLOCK_RADIUS, BLOCK_RADIUS)), COLORS[color])
        x, y, z, _, _, yaw = self._pose
        ring = 0.010 + 0.15 * z
        line = 0.010
        from_center = self._radius((x, y))
        along = (self._pixel_x - x) * math.cos(yaw) + (self._pixel_y - y) * math.sin(yaw)
        across = (self._pixel_y - y) * math.cos(yaw) - (self._pixel_x - x) * math.sin(yaw)
        tick = np.maximum(np.abs(along - ring - 0.005) - 0.005, np.abs(across) - line / 2)
        shape = np.minimum(np.abs(from_center - ring) - line / 2, tick)
        if self.gripper < 0.5:
            shape = np.minimum(shape, from_center - line)
        self._paint(picture, shape, _TOOL_COLOR)
        return (picture + 0.5).astype(np.uint8)

    def _radius(self, center) -> np.ndarray:
        return np.hypot(self._pixel_x - center[0], self._pixel_y - center[1])

    def _box(self, center, half) -> np.ndarray:
        return np.maximum(np.abs(self._pixel_x - center[0]) - half[0], np.abs(self._pixel_y - center[1]) - half[1])

    def _paint(self, picture: np.ndarray, distance: np.ndarray, color: tuple[int, int, int]) -> None:
        """Blend `color` where `distance` (H, W), meters outside the shape's edge, is negative; soft over one pixel."""
        cover = np.clip(0.5 - distance * (self.image_size / (2 * TABLE)), 0.0, 1.0).astype(np.float32)[..., None]
        picture += cover * (np.asarray(color, np.float32) - picture)
