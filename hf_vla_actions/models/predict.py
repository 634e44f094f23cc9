"""`hf-vla predict`: the action of a policy for one frame, free and constrained."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.constraints import Context
from hf_vla_actions.constraints.projection import STYLES
from hf_vla_actions.constraints.text import parse_constraints
from hf_vla_actions.errors import VLAActionsError, one_line_errors
from hf_vla_actions.models.auto import AutoModelForActionPrediction, load_action_config
from hf_vla_actions.models.generation import MODES
from hf_vla_actions.models.output import ActionOutput

EPILOG = """\
example:
  hf-vla predict --policy ./policy --dataset ./my_robot --episode 0 --step 3 \\
    --constraints "Range(x, -0.005, 0.005); Fix(gripper, open)"
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla predict",
        description="Print the action of a policy for one frame of a dataset, or for a picture file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--policy", required=True, help="folder or Hub repository of a policy or of an adapter")
    options.add_argument("--dataset", help="dataset to take the frame from: LeRobot v2.0 to v3.0, or RLDS")
    options.add_argument("--episode", type=int, default=0, help="episode of the dataset (default: %(default)s)")
    options.add_argument("--step", type=int, default=0, help="step within the episode (default: %(default)s)")
    options.add_argument("--cameras", nargs="+", help="cameras (default: those of the training, else all)")
    options.add_argument("--action_key", default="action", help="column of the actions (default: %(default)s)")
    options.add_argument("--transform", help="what training did to the dataset's numbers first, such as bridge_orig")
    options.add_argument("--image", nargs="+", help="picture files instead of a dataset, one a camera")
    options.add_argument("--instruction", help="what to do; needed with --image (default: that of the episode)")
    options.add_argument("--proprio", type=float, nargs="+", help="the robot's state, if the policy reads it")
    options.add_argument(
        "--seed", type=int, default=0, help="of what a continuous head draws: the same for each column (default: 0)"
    )
    options.add_argument("--oft", help="preset of an OpenVLA-OFT checkpoint that does not say its own (libero, ...)")
    options.add_argument("--unnorm_key", help="which statistics; may be left out if the policy has one")
    options.add_argument("--constraints", help="in real units, such as 'Range(x, -0.005, 0.005); Fix(gripper, open)'")
    options.add_argument("--mode", choices=MODES, default="project", help="how they are kept (default: %(default)s)")
    options.add_argument(
        "--style", choices=STYLES, default="direction", help="of the projection (default: %(default)s)"
    )
    options.add_argument(
        "--pose", type=float, nargs="+", help="where the first dimensions are now, for Workspace, KeepOut"
    )
    options.add_argument(
        "--last_action", type=float, nargs="+", help="the action carried out last, for Rate and Sticky"
    )
    options.add_argument(
        "--report",
        action="store_true",
        help="also print what the constraints did to the policy's distributions; FAST, VQ: which were kept when, and what moved",
    )
    options.add_argument(
        "--no_self_test", action="store_true", help="do not check first that it sees its picture and reads its words"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", default=device, help="where the model runs (default here: %(default)s)")
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Load the policy, predict for one frame, print a table."""
    args = parser().parse_args(argv)
    constraints = parse_constraints(args.constraints) if args.constraints else None
    config = load_action_config(args.policy)
    images, instruction, demonstrated = _frame(args, config)
    key = config.resolve(args.unnorm_key)
    policy = AutoModelForActionPrediction.from_pretrained(args.policy, self_test=False, oft=args.oft)
    policy = policy.to(args.device)
    if not args.no_self_test:
        policy.self_test()  # where it will run: on a CPU a large model would take minutes
    config = policy.action_config  # parts of OpenVLA-OFT beside a checkpoint make its chunks longer
    inputs = policy.prepare(images if policy.prompts.family.takes_images else None, instruction, proprio=args.proprio)
    wanted: dict[str, dict[str, Any]] = {"free": {}}
    if constraints is not None:
        wanted[args.mode] = {"constraints": constraints, "mode": args.mode, "style": args.style}
    drawn = _drawn(policy, args.seed)
    context = Context(pose=args.pose, last_action=args.last_action)
    out = {
        name: policy.predict_action(**inputs, **drawn(), unnorm_key=key, return_dict=True, context=context, **options)
        for name, options in wanted.items()
    }
    columns = {name: one.actions[0] for name, one in out.items()}
    sys.stdout.write(f"instruction: {instruction}\nunnorm_key:  {key}\n")
    if constraints is not None:
        sys.stdout.write(f"constraints: {'; '.join(map(str, constraints))}\n")
    if demonstrated is not None:
        columns["demonstrated"] = demonstrated[: config.horizon]
    sys.stdout.write(table(config.space(key), columns))
    if args.report:
        sys.stdout.write(f"\n{report(out[list(wanted)[-1]], config.space(key))}\n")
    return 0


def _drawn(policy, seed: int) -> Callable[[], dict[str, Any]]:
    """Options with which a continuous head draws the same in every call; none for other policies."""
    if policy.action_config.head is None:
        return dict
    return lambda: {"generator": torch.Generator(policy.device).manual_seed(seed)}


def report(out: ActionOutput, space) -> str:
    """What constraints did, in words: to the distributions of single numbers, or to a whole chunk."""
    if not out.kept_while:
        return out.confidence.summary()
    lines = [out.kept_while[0].summary()]
    if out.candidate is not None:
        which = {0: "the first", -1: "the first, as none is allowed"}.get(int(out.candidate[0]), str(out.candidate[0]))
        lines.append(f"candidate:           {which}")
    most = np.abs(out.moved[0]).max(axis=0)
    moved = [f"{space.names[d]} {most[d]:.3g} {space.units[d] or ''}".strip() for d in np.flatnonzero(most)]
    lines.append(f"moved at most:       {', '.join(moved) or 'nothing, the chunk is what the tokens say'}")
    return "\n".join(lines)


def table(space, columns: dict[str, np.ndarray]) -> str:
    """Chunks (horizon, dof) side by side, a line for each step and dimension."""
    lines = [f"{'step':>4}  {'dimension':<12}{'unit':<6}" + "".join(f"{name:>14}" for name in columns)]
    for step in range(max(len(chunk) for chunk in columns.values())):
        for dim, name in enumerate(space.names):
            cells = (f"{chunk[step, dim]:>14.5f}" if step < len(chunk) else f"{'':>14}" for chunk in columns.values())
            lines.append(f"{step:>4}  {name:<12}{space.units[dim] or '-':<6}" + "".join(cells))
    return "\n".join(lines) + "\n"


def _frame(args: argparse.Namespace, config: ActionConfig) -> tuple[list[Any], str, np.ndarray | None]:
    if (args.dataset is None) == (args.image is None):
        raise VLAActionsError("pass either --dataset or --image")
    if args.image is not None:
        from PIL import Image, UnidentifiedImageError

        if args.instruction is None:
            raise VLAActionsError("--image needs --instruction")
        try:
            return [Image.open(file).convert("RGB") for file in args.image], args.instruction, None
        except (OSError, UnidentifiedImageError) as error:
            raise VLAActionsError(f"no picture can be read: {error}") from None
    from hf_vla_actions.data import open_dataset

    cameras = args.cameras or list(config.cameras) or None
    dataset = open_dataset(args.dataset, cameras=cameras, action_key=args.action_key, transform=args.transform)
    episodes = {episode.index: episode for episode in dataset.episodes}
    if args.episode not in episodes:
        raise VLAActionsError(f"episode {args.episode} is not among the {len(episodes)} episodes of {args.dataset}")
    episode = episodes[args.episode]
    if not 0 <= args.step < len(episode):
        raise VLAActionsError(f"step {args.step} is outside episode {args.episode}, which has {len(episode)} steps")
    row = episode.start + args.step
    images = [dataset.frame(row, camera) for camera in dataset.cameras]
    return images, args.instruction or dataset.instruction(row), dataset.actions[row : episode.stop]


if __name__ == "__main__":
    sys.exit(main())
