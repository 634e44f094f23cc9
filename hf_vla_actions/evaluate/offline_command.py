"""`hf-vla eval --offline`: how well a policy predicts what was demonstrated."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from hf_vla_actions.constraints.text import parse_constraints
from hf_vla_actions.data import ChunkDataset, EpisodeReader, open_dataset
from hf_vla_actions.data.split import split_episodes
from hf_vla_actions.errors import VLAActionsError, one_line_errors
from hf_vla_actions.evaluate.offline import evaluate_offline
from hf_vla_actions.evaluate.offline_report import OfflineReport
from hf_vla_actions.models.adapter import quantization_of_adapter
from hf_vla_actions.models.auto import AutoModelForActionPrediction
from hf_vla_actions.plots import plot_offline

EPILOG = """\
example:
  hf-vla eval --offline --policy ./policy --dataset ./my_robot --eval_fraction 0.1 --seed 42 \\
    --constraints "Speed([x, y, z], 0.03)" --output eval.json --figure eval.png

With the --eval_fraction and --seed of `hf-vla train` the held-out episodes are the same ones, and the others are the replay
test: can the policy repeat what it saw? What --policy recorded in training.json is taken where an option is left out, and
said. Keys of the JSON file begin with eval_ (held-out episodes) and train_ (frames of the training), as in
action_metrics.json. Closed loop is in Python: hf_vla_actions.evaluate.rollouts, for any Gymnasium environment.
"""
TRAINING_FILE = "training.json"
DTYPES = ("float32", "bfloat16", "float16")
PICTURES = (".png", ".pdf", ".svg")
AS_TRAINED: dict[str, Any] = {
    "eval_fraction": 0.0,
    "seed": 42,
    "skip_first": 0,
    "action_key": "action",
    "transform": None,
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla eval",
        description="How well a policy predicts what was demonstrated: on its own and told what came before, in bins and "
        "real units, its gripper, its drift along a chunk, its conflicts with limits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = options.add_argument
    add("--offline", action="store_true", help="on recorded demonstrations; the only way this command knows")
    add("--policy", required=True, help="folder or Hub repository of a policy or of an adapter")
    add("--dataset", required=True, help="demonstrations: LeRobot v2.0 to v3.0, or RLDS")
    add("--episodes", nargs="+", help="held-out episodes by their index, or 'all' of a dataset it never saw")
    add(
        "--eval_fraction",
        type=float,
        help="share of the episodes that training held out (default: as recorded, else 0)",
    )
    add("--seed", type=int, help="seed of the training, which chose them (default: as recorded, else 42)")
    add("--skip_first", type=int, help="steps left out at the start of every episode (default: as recorded, else 0)")
    add("--action_key", help="column of the actions (default: as recorded, else action)")
    add("--transform", help="what training did to the dataset's numbers first (default: as recorded, else nothing)")
    add("--cameras", nargs="+", help="cameras (default: those of the training, else all)")
    add("--unnorm_key", help="which statistics; may be left out if the policy has one")
    add("--constraints", help="judged beside the policy's permanent limits, such as 'Range(x, -0.005, 0.005)'")
    add("--max_items", type=int, default=256, help="chunks at most of either part (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="chunks predicted at once (default: %(default)s)")
    add("--output", help="also write the numbers to this JSON file")
    add("--figure", help="also draw them, to this .png, .pdf or .svg")
    add("--oft", help="preset of an OpenVLA-OFT checkpoint that does not say its own (libero, ...)")
    add("--no_self_test", action="store_true", help="do not check first that it sees its picture and reads its words")
    add("--dtype", choices=DTYPES, help="weights are loaded as this (default: as they are saved)")
    add(
        "--load_in_4bit",
        action="store_true",
        help="for an adapter of --load_in_4bit: on 4-bit weights, as it was trained",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where the model runs (default here: %(default)s)")
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Load, predict, print; what is wrong with the options ends in one line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and "--offline" not in argv and not {"-h", "--help"} & set(argv):
        raise VLAActionsError(
            "pass --offline (on recorded demonstrations); closed loop is in Python: hf_vla_actions.evaluate.rollouts"
        )
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for path in filter(None, (args.output, args.figure)):
        if not Path(path).absolute().parent.is_dir():
            raise VLAActionsError(f"there is no folder {Path(path).parent} to write {path} to: make it first")
    if args.figure and Path(args.figure).suffix not in PICTURES:
        raise VLAActionsError(f"a figure is one of {list(PICTURES)}, got {args.figure}")
    constraints = parse_constraints(args.constraints) if args.constraints else None
    said = _as_trained(args)
    if not 0 <= args.eval_fraction < 1:
        raise VLAActionsError(f"--eval_fraction is a share from 0 to below 1, got {args.eval_fraction}")
    policy = _load(args)
    if not args.no_self_test:
        policy.self_test()
    config = policy.action_config
    cameras = args.cameras or list(config.cameras) or None
    dataset = open_dataset(args.dataset, cameras=cameras, action_key=args.action_key, transform=args.transform)
    parts = _parts(args, dataset)
    history = 0 if config.head is None else policy.action_head.window - 1
    reports = {
        name: evaluate_offline(
            policy,
            ChunkDataset(dataset, config.horizon, episodes=episodes, skip_first=args.skip_first, history=history),
            unnorm_key=args.unnorm_key,
            constraints=constraints,
            batch_size=args.batch_size,
            max_items=args.max_items,
            seed=args.seed,
        )
        for name, episodes in parts.items()
    }
    sys.stdout.write(_text(reports, parts, said))
    if args.output:
        _write(Path(args.output), reports)
    if args.figure:
        _draw(Path(args.figure), reports)
    return 0


def _load(args: argparse.Namespace):
    """The policy, on the weights that were asked for."""
    options: dict[str, Any] = {"self_test": False, "oft": args.oft}
    if args.dtype is not None:
        options["dtype"] = args.dtype
    if not args.load_in_4bit:
        return AutoModelForActionPrediction.from_pretrained(args.policy, **options).to(args.device)
    trained_on = quantization_of_adapter(args.policy)
    if trained_on is None:
        raise VLAActionsError(
            f"{args.policy} is no adapter that was trained on 4-bit weights: leave --load_in_4bit out"
        )
    # 4-bit weights stay where they are loaded.
    options |= {"quantization_config": BitsAndBytesConfig(**trained_on), "device_map": {"": args.device}}
    return AutoModelForActionPrediction.from_pretrained(args.policy, **options)


def _as_trained(args: argparse.Namespace) -> str:
    """Fill what was not given from the policy's record of its training; returns what was taken, in words."""
    file = Path(args.policy) / TRAINING_FILE
    recorded: dict[str, Any] = {}
    if file.is_file():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            recorded = {"seed": content["seed"], **content["options"]}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise VLAActionsError(
                f"{file} is damaged ({type(error).__name__}: {error}): repair or remove it"
            ) from None
    taken = {}
    for name, default in AS_TRAINED.items():
        if getattr(args, name) is not None:
            continue
        if name in recorded:
            taken[name] = recorded[name]
        setattr(args, name, recorded.get(name, default))
    return f"from {file}: {', '.join(f'{name} {value}' for name, value in taken.items())}\n" if taken else ""


def _parts(args: argparse.Namespace, dataset: EpisodeReader) -> dict[str, list[int]]:
    """Episodes of each part that there is: "eval" held out, "train" seen."""
    if args.episodes is not None:
        if args.episodes == ["all"]:
            return {"eval": [episode.index for episode in dataset.episodes]}
        if not all(word.isdigit() for word in args.episodes):
            raise VLAActionsError(f"--episodes are indices, or 'all', got {args.episodes}")
        return {"eval": [int(word) for word in args.episodes]}
    train, held_out = split_episodes(dataset, args.eval_fraction, args.seed)
    return {"eval": held_out, "train": train} if held_out else {"train": train}


def _text(reports: dict[str, OfflineReport], parts: dict[str, list[int]], said: str) -> str:
    titles = {"eval": "held-out episodes", "train": "replay test: can it repeat what it saw?"}
    text = said
    if "eval" not in reports:
        text += (
            "no episodes were held out (--eval_fraction, --episodes): this says nothing about what it has not seen\n"
        )
    for i, (name, report) in enumerate(reports.items()):
        n = len(parts[name])
        text += f"\n== {titles[name]} ({n} episode{'s' * (n > 1)})\n{report.text(legend=i == len(reports) - 1)}"
    return text


def _write(path: Path, reports: dict[str, OfflineReport]) -> None:
    values: dict[str, Any] = {}
    for name, report in reports.items():
        values |= report.to_dict(f"{name}_")
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _draw(path: Path, reports: dict[str, OfflineReport]) -> None:
    labels = {"eval": "held out", "train": "training"}
    figure = plot_offline({labels[name]: report for name, report in reports.items()})
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
