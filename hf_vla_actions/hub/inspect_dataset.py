"""`hf-vla inspect DATASET`: what its numbers are, and what is odd about them. No picture is opened."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np

from hf_vla_actions.actions import ActionStats
from hf_vla_actions.actions.formats import read_stats
from hf_vla_actions.actions.stats import MODES
from hf_vla_actions.data import EpisodeReader, open_dataset
from hf_vla_actions.data.declare import add_space_options, space_from
from hf_vla_actions.data.sanity import check_numbers
from hf_vla_actions.plots import plot_action_histograms

MARKS = ("meta/info.json", "features.json", "*/features.json")  # of LeRobot's and of TensorFlow's datasets
logger = logging.getLogger(__name__)
EPILOG = """\
example:
  hf-vla inspect ./my_robot --action_units m m m rad rad rad none --action_kind delta --figure numbers.png
  hf-vla inspect ./my_robot --stats ./policy/dataset_statistics.json --unnorm_key my_robot

exit status: 0 if nothing speaks against training on it, 1 if something does, 2 if it cannot be read
"""


def is_dataset(path: str) -> bool:
    """Whether a folder is one of a dataset, not of a checkpoint."""
    return any(file.is_file() for mark in MARKS for file in Path(path).expanduser().glob(mark))


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla inspect",
        description="Say what the numbers of a dataset are: ranges, what normalization clips, constants, values that are "
        "not finite, deltas or targets, the gripper's sign, the control rate, idle and doubled frames.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("dataset", help="folder of the dataset")
    options.add_argument("--action_key", help="feature that holds the actions; default: the usual one of its format")
    options.add_argument("--transform", help="what to do with its numbers first, such as bridge_orig")
    add_space_options(options)
    options.add_argument(
        "--stats", help="statistics file that will normalize it; default: its own 1st and 99th percentile"
    )
    options.add_argument("--unnorm_key", help="which of the statistics in --stats")
    options.add_argument("--mode", choices=MODES, help="how --stats are used (default: what the file says)")
    options.add_argument("--bins", type=int, default=64, help="bin edges drawn into the figure (default: %(default)s)")
    options.add_argument("--figure", help="draw a histogram of every dimension to this .png or .pdf")
    options.add_argument("--json", action="store_true", help="print the report as JSON")
    return options


def main(argv: list[str]) -> int:
    """Inspect, print; returns 0 if nothing speaks against training on it, 1 if something does."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    dataset = open_dataset(args.dataset, action_key=args.action_key, transform=args.transform)
    stats = None if args.stats is None else _stats(args, dataset)
    report = check_numbers(
        dataset.actions,
        dataset.episodes,
        space_from(dataset, args),
        rate_hz=dataset.fps,
        source=str(args.dataset),
        states=dataset.states,
        timestamps=dataset.timestamps,
        stats=stats,
    )
    sys.stdout.write(json.dumps(report.to_dict(), indent=1) + "\n" if args.json else report.text())
    if args.figure:
        _draw(Path(args.figure), dataset.actions, report.dimensions, args.bins)
    return 1 if report.problems else 0


def _stats(args: argparse.Namespace, dataset: EpisodeReader) -> ActionStats:
    """The statistics that are to normalize the dataset; a file of one dataset needs no name."""
    file = read_stats(args.stats, mode=args.mode, dof=dataset.dof, unnamed=args.unnorm_key or dataset.name)
    for text in file.warnings:
        logger.warning("%s: %s", args.stats, text)
    return file.stats[args.unnorm_key]["action"]


def _draw(path: Path, actions: np.ndarray, dimensions, bins: int) -> None:
    figure = plot_action_histograms(actions, dimensions, n_bins=bins)[0].figure
    temporary = path.with_name(f".tmp-{path.name}")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
