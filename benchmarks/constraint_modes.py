"""What a limit costs: the ways to keep it, compared in closed loop on the same episodes.

python benchmarks/constraint_modes.py --policies outputs/modes [--output outputs/modes.json] [--episodes 200] [--quick]
python benchmarks/constraint_modes.py --policies outputs/modes --metaworld     (pip install metaworld==3.1.1 packaging)

Policies that are not in the folder are trained first (4 to 9 minutes each on one core): the demo's, the same with chunks
of 4, and both from demonstrations of which half obey a random step limit (`augment_limits`). The limits come from the
first policy's free episodes: a step limit per axis and one on the length of a step, each broken by about half of the
steps if that can be (the demo's expert moves each axis by 30 mm or not at all: any limit below breaks every step that
moves), and in the embedded world a box that mostly agrees with the data. Limited rows have more steps than free ones.

Success says nothing about violations and they say nothing about success, so both are in every row. p is a paired sign
test on the episodes that two rows solve differently, not corrected for the number of rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from hf_vla_actions import AutoModelForActionPrediction
from hf_vla_actions.constraints import Constraint, Context, Speed, Workspace
from hf_vla_actions.constraints.slower import retime_within
from hf_vla_actions.demo.demonstrations import write_lerobot_dataset
from hf_vla_actions.demo.judge import AXES, ROUNDING
from hf_vla_actions.demo.run import FULL, UNSEEN, DemoSettings, train
from hf_vla_actions.demo.world import TabletopEnv
from hf_vla_actions.evaluate import Rollout, rollouts

XYZ = slice(0, 3)
REFERENCE = "project, axis"
MODES: dict[str, dict[str, Any]] = {
    "mask": {"mode": "mask"},
    "transport": {"mode": "transport"},
    "mixture": {"mode": "mixture", "style": "axis"},
    "mixture, direction": {"mode": "mixture", "style": "direction"},
    REFERENCE: {"mode": "project", "style": "axis"},
    "project, direction": {"mode": "project", "style": "direction"},
    "retime": {},
}
"""Options of `predict_action`; "retime" is done by `retime_within`, as `policy(style="retime")` does."""


@dataclass(frozen=True)
class Limit:
    """A limit on single steps, or a box, or both.

    Args:
        name: for the table.
        step: longest step in meters, along each axis or as a length; None for none.
        length: whether `step` is a length (Euclidean norm of x, y, z).
        box: corners (x, y, z) of the workspace, meters; None for none.
    """

    name: str
    step: float | None = None
    length: bool = False
    box: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None

    def constraints(self) -> list[Constraint]:
        """The limit in the constraint language; a box needs the pose."""
        found: list[Constraint] = []
        if self.step is not None:
            found.append(Speed(AXES, self.step, ord=2 if self.length else "inf"))
        if self.box is not None:
            found.append(Workspace(AXES, *self.box, on_outside="recover"))  # a pose may be out by a rounding
        return found

    def broken(self, episode: Rollout) -> np.ndarray:
        """(steps,) bool: steps that were too long or ended outside of the box."""
        broken = sizes(episode.actions, self.length) > (math.inf if self.step is None else self.step)
        if self.box is not None:
            ends, (low, high) = np.array(episode.poses)[1:, XYZ], self.box
            broken |= ((ends < np.array(low) - ROUNDING) | (ends > np.array(high) + ROUNDING)).any(axis=1)
        return broken


def sizes(actions, length: bool) -> np.ndarray:
    """(n, dof) to (n,): length of each move, or its largest component; meters."""
    moves = np.asarray(actions)[:, XYZ]
    return np.linalg.norm(moves, axis=1) if length else np.abs(moves).max(axis=1)


def half_limit(moves: np.ndarray) -> float:
    """A step limit that about half of the steps break.

    Args:
        moves: (n,) sizes of the steps.

    Returns:
        The median of the moves; where they come in a few sizes only, the middle between two neighboring ones, and a third
        of the size if there is one only.
    """
    moves = np.sort(moves[moves > 1e-4])
    gaps = np.flatnonzero(np.diff(moves) > 0.1 * np.median(moves))
    steady = np.diff(np.quantile(moves, [0.4, 0.6]))[0] < 0.01 * np.median(moves)
    if not steady:
        return float(np.median(moves))
    if not len(gaps):
        return float(np.median(moves)) / 3
    middle = gaps[np.abs((gaps + 1) / len(moves) - 0.5).argmin()]
    return float(moves[middle] + moves[middle + 1]) / 2


@dataclass(frozen=True)
class World:
    """Where policies are compared.

    Args:
        make_env: of `rollouts`, from the most steps of an episode.
        inputs: (policy, observations) to the tensors for `predict_action`.
        load: (folder, settings, seed) to a policy, trained if need be.
        policies: settings of each, and after how many decoded steps it looks again.
        first_seed: of the episodes.
        max_steps: of a free episode, of a limited one.
        box: that mostly agrees with the data; None for no comparison in a box.
    """

    make_env: Callable[[int], Any]
    inputs: Callable[[Any, list[dict[str, Any]]], dict[str, Any]]
    load: Callable[[Path, Any, int], Any]
    policies: dict[str, tuple[Any, tuple[int, ...]]]
    first_seed: int
    max_steps: tuple[int, int]
    box: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None

    def limits(self, free: Sequence[Rollout]) -> list[Limit]:
        """The limits of the comparison, from what a free policy does in the episodes that it solves."""
        moves = np.concatenate([np.array(e.actions) for e in free if e.success] or [np.array(free[0].actions)])
        axis, length = half_limit(sizes(moves, False)), half_limit(sizes(moves, True))
        found = [
            Limit(f"{axis * 1000:.1f} mm per axis", step=axis),
            Limit(f"{length * 1000:.1f} mm per step", step=length, length=True),
        ]
        if self.box is not None:
            found += [
                Limit("box", box=self.box),
                Limit(f"box, {axis * 1000:.1f} mm per axis", step=axis, box=self.box),
            ]
        return found

    def run(self, policy, mode: str, limit: Limit, seeds: Sequence[int], execute: int) -> list[Rollout]:
        """Episodes of a policy under a limit ("free": without it), one a seed."""
        steps = self.max_steps[mode != "free"]
        return rollouts(
            lambda: self.make_env(steps),
            self.predictor(policy, mode, limit),
            seeds,
            max_steps=steps,
            execute_steps=execute,
            description=f"{limit.name}, {mode}",
        )

    def predictor(self, policy, mode: str, limit: Limit) -> Callable[[list[dict[str, Any]]], Any]:
        """The batched predict function that `rollouts` takes."""

        def predict(observations: list[dict[str, Any]]):
            inputs = self.inputs(policy, observations)
            if mode == "free":
                return policy.predict_action(**inputs)
            poses = [Context(pose=o["proprio"][XYZ]) for o in observations]
            context = Context(pose=np.array([o["proprio"][XYZ] for o in observations]))
            if mode == "retime":
                space = policy.action_config.space()
                chunks = policy.predict_action(**inputs)
                return [
                    retime_within(chunk, limit.constraints(), space, context=pose)
                    for chunk, pose in zip(chunks, poses, strict=True)
                ]
            return policy.predict_action(**inputs, constraints=limit.constraints(), context=context, **MODES[mode])

        return predict


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        policy: its name.
        limit: its name.
        mode: how the limit was kept.
        success: share of the episodes.
        error: standard error of it.
        broken: share of the steps that broke the limit.
        steps: mean of the successful episodes; None if there are none.
        seconds: all episodes of the row took.
        against_clip: episodes that only this row solves, that only "project, axis" solves, and p of the sign test.
        against_free: the same against "free".
        seeds: of the episodes it solved.
    """

    policy: str
    limit: str
    mode: str
    success: float
    error: float
    broken: float
    steps: float | None
    seconds: float = 0.0
    against_clip: tuple[int, int, float] | None = None
    against_free: tuple[int, int, float] | None = None
    seeds: tuple[int, ...] = ()


def summarize(policy: str, limit: Limit, mode: str, episodes: Sequence[Rollout], seconds: float = 0.0) -> Row:
    """Count successes and violations."""
    share = float(np.mean([e.success for e in episodes]))
    steps = [len(e.actions) for e in episodes if e.success]
    return Row(
        policy=policy,
        limit=limit.name,
        mode=mode,
        success=share,
        error=math.sqrt(share * (1 - share) / len(episodes)),
        broken=float(np.concatenate([limit.broken(e) for e in episodes]).mean()),
        steps=float(np.mean(steps)) if steps else None,
        seconds=seconds,
        seeds=tuple(e.seed for e in episodes if e.success),
    )


def sign_test(ours: Sequence[int], theirs: Sequence[int]) -> tuple[int, int, float]:
    """Paired sign test of two sets of solved seeds: (only ours, only theirs, two-sided exact p)."""
    wins, losses = len(set(ours) - set(theirs)), len(set(theirs) - set(ours))
    n, k = wins + losses, min(wins, losses)
    return wins, losses, min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def compare(rows: Sequence[Row]) -> list[Row]:
    """The rows of one policy and limit with their sign tests."""
    by_mode = {row.mode: row.seeds for row in rows}
    return [
        replace(
            row,
            against_clip=sign_test(row.seeds, by_mode[REFERENCE]),
            against_free=sign_test(row.seeds, by_mode["free"]),
        )
        for row in rows
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        f"| policy | limit | mode | success | s.e. | violating steps | mean steps | against {REFERENCE} | against free |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = "–" if row.steps is None else f"{row.steps:.1f}"
        tests = [
            "" if t is None or not t[0] + t[1] else f"+{t[0]} −{t[1]}, p {t[2]:.2g}"
            for t in (row.against_clip, row.against_free)
        ]
        lines.append(
            f"| {row.policy} | {row.limit} | {row.mode} | {row.success:.3f} | {row.error:.3f} | {row.broken:.1%} | {steps} | "
            f"{tests[0]} | {tests[1]} |"
        )
    return "\n".join(lines) + "\n"


def load_or_train(folder: Path, settings: DemoSettings, seed: int):
    """The demo's policy in a folder, trained there first if it is not."""
    if not (folder / "policy").exists():
        set_seed(seed)
        folder.mkdir(parents=True, exist_ok=True)
        data = write_lerobot_dataset(
            folder / "data",
            episodes=settings.training.num_episodes,
            seed=100_000 * seed,
            noise=settings.training.noise,
            augment_limits=settings.augment_limits,
        )
        train(folder, data, settings, seed)
    return AutoModelForActionPrediction.from_pretrained(folder / "policy").eval()


TABLETOP = World(
    make_env=lambda steps: TabletopEnv("reach", max_episode_steps=steps),
    inputs=lambda policy, obs: policy.prepare([o["images"] for o in obs], [o["instruction"] for o in obs]),
    load=load_or_train,
    policies={
        "demo": (FULL, (1,)),
        "demo, slow data": (replace(FULL, augment_limits=0.5), (1,)),
        "chunks of 4": (replace(FULL, horizon=4), (2, 4)),
        "chunks of 4, slow data": (replace(FULL, horizon=4, augment_limits=0.5), (2, 4)),
    },
    first_seed=UNSEEN,
    max_steps=(24, 72),
    box=((-0.105, -0.105, 0.05), (0.105, 0.105, 0.16)),  # from everywhere in it every block can be reached
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, compare, print and write the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--policies", required=True, type=Path, help="folder of the trained policies")
    options.add_argument("--output", type=Path, help="JSON file for settings, rows and solved seeds")
    options.add_argument("--episodes", type=int, default=200)
    options.add_argument("--metaworld", action="store_true", help="on Meta-World's reach and push instead")
    options.add_argument("--only", nargs="+", help="policies (default: all)")
    options.add_argument("--limits", nargs="+", type=int, help="indices of the limits (default: all)")
    options.add_argument("--seed", type=int, default=0, help="of the training")
    options.add_argument("--quick", action="store_true", help="two episodes of hardly trained policies: a smoke test")
    args = options.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    world = TABLETOP
    if args.metaworld:
        from metaworld_policy import METAWORLD

        world = METAWORLD
    if args.quick:
        world = replace(world, max_steps=(4, 4))
    seeds = range(world.first_seed, world.first_seed + (2 if args.quick else args.episodes))
    rows: list[Row] = []
    limits: list[Limit] = []
    for name in args.only or world.policies:
        settings, looks = world.policies[name]
        settings = (
            replace(settings, training=replace(settings.training, num_episodes=20, max_steps=4))
            if args.quick
            else settings
        )
        folder = args.policies / name.replace(",", "").replace(" ", "_")
        policy = world.load(folder, settings, args.seed)
        for execute in looks:
            shown = name if policy.action_config.horizon == 1 else f"{name}, {execute} at a time"
            begin = time.monotonic()
            free = world.run(policy, "free", Limit("none"), seeds, execute)
            done = {"free": (free, time.monotonic() - begin)}
            limits = limits or [x for i, x in enumerate(world.limits(free)) if args.limits is None or i in args.limits]
            for limit in limits:
                for mode in MODES:
                    begin = time.monotonic()
                    done[mode] = world.run(policy, mode, limit, seeds, execute), time.monotonic() - begin
                new = compare([summarize(shown, limit, m, *result) for m, result in done.items()])
                sys.stdout.write(table(new))
                sys.stdout.flush()
                rows += new
                if args.output:
                    setting = {"episodes": len(seeds), "first_seed": world.first_seed, "training_seed": args.seed}
                    setting |= {"world": "Meta-World" if args.metaworld else "tabletop", "max_steps": world.max_steps}
                    result = {
                        "settings": setting,
                        "limits": [asdict(x) for x in limits],
                        "rows": [asdict(r) for r in rows],
                    }
                    args.output.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
