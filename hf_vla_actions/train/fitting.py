"""What `hf-vla fit-fast`, `fit-vq` and `tokens-report` share: which chunks, in which space."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla_actions.actions import ActionSpace, ActionStats, NormStats
from hf_vla_actions.train.arguments import DataArguments
from hf_vla_actions.train.setup import open_dataset, space_of, split_episodes, stats_of
from hf_vla_actions.train.tokens import chunks_of


def add_data_options(options: argparse.ArgumentParser) -> None:
    """Add the options that say which chunks, and what becomes [-1, 1]: those of `hf-vla train`."""
    add = options.add_argument
    add("--dataset", required=True, help="folder of the dataset; its pictures are not read")
    add("--horizon", type=int, required=True, help="actions in one chunk")
    add("--output", required=True, help="folder for the tokenizer")
    add("--overwrite", action="store_true", help="replace a tokenizer that is there")
    add("--seed", type=int, default=42, help="of the split and the fit (default: %(default)s)")
    add("--eval_fraction", type=float, default=0.1, help="share of the episodes held out (default: %(default)s)")
    add_space_options(options)


SPACE_OPTIONS = [
    *(
        "dataset",
        "skip_first",
        "eval_fraction",
        "action_key",
        "transform",
        "action_names",
        "action_units",
        "norm_mode",
    ),
    *("gripper", "gripper_open", "gripper_closed"),
]


def add_space_options(options: argparse.ArgumentParser) -> None:
    """Add the options that say what the numbers of a dataset mean: those of `hf-vla train`."""
    add = options.add_argument
    add("--skip_first", type=int, default=0, help="steps left out at the start of every episode (bridge: 1)")
    add("--action_key", default="action", help="column of the actions (default: %(default)s)")
    add(
        "--transform",
        help="what to do with the dataset's numbers first, as in hf-vla train: bridge_orig, fractal, libero, ..., or your "
        "own as module:name; it says what the actions mean, so leave out --action_names, --action_units and --gripper*",
    )
    add("--action_names", nargs="+", help="name of each dimension; default: those of the dataset")
    add("--action_units", nargs="+", help="unit of each dimension, 'none' where there is none: m m m rad rad rad none")
    add("--norm_mode", choices=["bounds_q99", "bounds"], default="bounds_q99", help="what becomes [-1, 1]")
    add("--gripper", help="name or index of the gripper's dimension, 'none' if there is none")
    add("--gripper_open", type=float, default=1.0, help="value of the open gripper (default: %(default)s)")
    add("--gripper_closed", type=float, default=0.0, help="value of the closed gripper (default: %(default)s)")
    add("--no_gripper_binary", action="store_true", help="the gripper takes values between open and closed")


def data_arguments(args: argparse.Namespace) -> DataArguments:
    """The options as those of a training."""
    values = {name: getattr(args, name) for name in SPACE_OPTIONS}
    return DataArguments(**values, gripper_binary=not args.no_gripper_binary)


@dataclass(frozen=True)
class FitData:
    """A dataset as a tokenizer sees it.

    Args:
        dataset: the reader.
        space: meaning of its actions.
        entry: statistics of the training episodes, as an entry of NormStats.
        parts: numbers of the episodes: "training", and "held-out" if there are any.
        chunks: of each part, actions (n, horizon, dof) in real units and which steps are real, (n, horizon) bool.
    """

    dataset: Any
    space: ActionSpace
    entry: dict[str, Any]
    parts: dict[str, list[int]]
    chunks: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def read(cls, args: argparse.Namespace, most: int | None = None) -> FitData:
        """Read what the options name.

        Args:
            args: of `add_data_options`.
            most: chunks of each part; all if None.
        """
        data = data_arguments(args)
        dataset = open_dataset(data)
        space = space_of(dataset, data)
        train, held_out = split_episodes(dataset, args.eval_fraction, args.seed)
        parts = {"training": train, **({"held-out": held_out} if held_out else {})}
        entry = stats_of(dataset, space, train, args.norm_mode, args.skip_first)
        chunks = {
            name: chunks_of(dataset, args.horizon, episodes, args.skip_first, args.seed, most)
            for name, episodes in parts.items()
        }
        return cls(dataset, space, entry, parts, chunks)

    @property
    def stats(self) -> ActionStats:
        """Statistics of the actions."""
        return self.entry["action"]

    def normalized(self, part: str) -> np.ndarray:
        """(n, horizon, dof) chunks of a part, in [-1, 1]."""
        return self.stats.normalize(self.chunks[part][0])

    def save(self, folder: str | Path) -> None:
        """Write the statistics beside the tokenizer: they are the space that it was fitted in."""
        NormStats({self.dataset.name: self.entry}).save(folder)
