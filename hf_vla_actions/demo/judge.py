"""Closed loop in the tabletop world: how often a policy succeeds, and whether it kept its limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import gymnasium
import numpy as np

from hf_vla_actions.constraints import Range
from hf_vla_actions.demo.world import TabletopEnv
from hf_vla_actions.evaluate import Rollout, rollouts

AXES = ("x", "y", "z")
ROUNDING = 1e-12  # meters; pose + (limit - pose) need not be the limit to the last bit


@dataclass(frozen=True)
class Limits:
    """What the demo forbids: longer steps than `step`, and leaving a box.

    Args:
        step: longest move along each axis in one action, meters.
        low: (x, y, z) of the box, meters.
        high: (x, y, z) of the box, meters.
    """

    step: float = 0.01
    low: tuple[float, float, float] = (-0.135, -0.135, 0.045)
    high: tuple[float, float, float] = (0.135, 0.135, 0.16)

    def constraints(self, obs: dict[str, Any]) -> list[Range]:
        """The limits of the next action, in meters, where the tool is now."""
        ranges = zip(AXES, obs["proprio"][:3], self.low, self.high, strict=True)
        return [
            Range(axis, float(max(-self.step, low - at)), float(min(self.step, high - at)))
            for axis, at, low, high in ranges
        ]

    def violations(self, episode: Rollout) -> int:
        """Steps whose action was too long or that ended outside the box."""
        moves = np.array(episode.actions)[:, :3]
        ends = np.array(episode.poses)[1:, :3]
        too_long = (np.abs(moves) > self.step).any(axis=1)
        outside = ((ends < np.array(self.low) - ROUNDING) | (ends > np.array(self.high) + ROUNDING)).any(axis=1)
        return int((too_long | outside).sum())


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what was run.
        success: share of the episodes.
        episodes: how many.
        mean_steps: steps of the successful ones; None if there are none.
        violations: share of the steps that broke the limits, whether or not the policy was bound by them.
    """

    name: str
    success: float
    episodes: int
    mean_steps: float | None
    violations: float


def summarize(name: str, episodes: Sequence[Rollout], limits: Limits) -> Row:
    """Count successes and violations."""
    steps = [len(e.actions) for e in episodes if e.success]
    total = sum(len(e.actions) for e in episodes)
    return Row(
        name=name,
        success=len(steps) / len(episodes),
        episodes=len(episodes),
        mean_steps=float(np.mean(steps)) if steps else None,
        violations=sum(map(limits.violations, episodes)) / total,
    )


def text_table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [f"{'':<34}{'success':>9}{'steps':>8}{'violating steps':>18}"]
    for row in rows:
        steps = "-" if row.mean_steps is None else f"{row.mean_steps:.1f}"
        lines.append(f"{row.name:<34}{row.success:>8.0%} {steps:>8}{row.violations:>17.1%}")
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON-ready values."""
    return [asdict(row) for row in rows]


class Blanked(gymnasium.ObservationWrapper):
    """The same world for a policy that sees nothing."""

    def observation(self, observation):
        """Replace the picture by a gray one."""
        return {**observation, "images": np.full_like(observation["images"], 127)}


class Swapped(gymnasium.ObservationWrapper):
    """The same world for a policy that is told to go to another block."""

    def observation(self, observation):
        """Replace the sentence by that of another block."""
        return {**observation, "instruction": cast(TabletopEnv, self.unwrapped).swapped_instruction()}


def predictor(policy, limits: Limits | None = None, mode: str = "project") -> Callable:
    """Make the batched predict function that `rollouts` takes.

    Args:
        policy: made by `to_vla`.
        limits: hold in every step if given.
        mode: of `predict_action`.
    """

    def predict(observations: list[dict[str, Any]]) -> np.ndarray:
        inputs = policy.prepare([o["images"] for o in observations], [o["instruction"] for o in observations])
        constraints = None if limits is None else [limits.constraints(o) for o in observations]
        return policy.predict_action(**inputs, constraints=constraints, mode=mode)

    return predict


def random_actions(policy, seed: int = 0) -> Callable:
    """A predict function that knows nothing: every action token is as likely as any other."""
    rng = np.random.default_rng(seed)
    config = policy.action_config

    def predict(observations: list[dict[str, Any]]) -> np.ndarray:
        codes = rng.integers(0, config.tokenizer.n_codes, (len(observations), config.n_tokens()))
        return config.decode(config.vocabulary.to_ids(codes))[1]

    return predict


def run(
    policy,
    name: str,
    seeds: Sequence[int],
    *,
    task: str = "reach",
    max_steps: int,
    wrapper: Callable | None = None,
    bound: Limits | None = None,
    mode: str = "project",
    predict: Callable | None = None,
    keep_frames: bool = False,
) -> list[Rollout]:
    """Episodes of a policy (or of another predict function), one a seed, with a progress bar."""

    def make_env():
        env = TabletopEnv(task, max_episode_steps=max_steps)
        return wrapper(env) if wrapper else env

    return rollouts(
        make_env,
        predict or predictor(policy, bound, mode),
        seeds,
        max_steps=max_steps,
        keep_frames=keep_frames,
        description=name,
    )
