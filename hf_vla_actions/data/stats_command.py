"""`hf-vla stats`: see `main`."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla_actions.actions import NormStats
from hf_vla_actions.actions.compute import mixture_stats
from hf_vla_actions.actions.formats import FORMATS, write_stats
from hf_vla_actions.actions.stats import MODES
from hf_vla_actions.data.dataset_stats import Measured, Request, measure, merge_shards
from hf_vla_actions.data.number_stream import open_numbers
from hf_vla_actions.data.stats_repair import repair_stats
from hf_vla_actions.data.stats_text import measured_text, repair_text, table
from hf_vla_actions.errors import StatsError, one_line_errors

EPILOG = """\
examples:
  hf-vla stats ./my_robot --output dataset_statistics.json
  hf-vla stats ./my_robot --horizon 16 --relative --pass_through gripper --output relative.json
  hf-vla stats ./my_robot --shard 1/4 --output part1.json        (the other shards on other machines)
  hf-vla stats --merge part*.json --output dataset_statistics.json
  hf-vla stats ./bridge ./my_robot --weights 0.3 0.7 --output dataset_statistics.json
  hf-vla stats ./my_robot --write-lerobot

Only the columns of actions and states are read, never a picture or a video. Quantiles are exact up to --exact_rows rows;
beyond that their rank is within the error that is shown. Merged shards give the same as one pass.
"""
MIXTURE = "mixture"
NAMED = ("hf_vla", "groot", "groot_dataset", "groot_relative")  # formats with names of dimensions


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla stats",
        description="Statistics of the actions and states of robot data (LeRobotDataset v2.x and v3.0, RLDS): true "
        "quantiles in one pass, in parts if you like.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = options.add_argument
    add("datasets", nargs="*", metavar="DATASET", help="folders of datasets")
    add("--output", type=Path, help="file to write: statistics, or with --shard a part for --merge")
    add(
        "--format",
        choices=sorted(FORMATS),
        help="of the output (default: openvla, or hf_vla with --horizon or another --mode)",
    )
    add("--lossy", action="store_true", help="write what the format can hold, and warn of the rest")
    add("--overwrite", action="store_true", help="replace the output if it is there")
    add("--workers", type=int, default=1, help="processes that share the data files (default: %(default)s)")
    add("--shard", metavar="i/n", help="compute the i-th part of n only (every n-th episode)")
    add("--merge", nargs="+", type=Path, metavar="FILE", help="merge the parts that --shard wrote")
    add("--keys", nargs="+", metavar="KEY", help="unnorm_key of each dataset (default: names of the folders)")
    add("--weights", nargs="+", type=float, help=f"add the entry {MIXTURE!r}: rows drawn from the datasets with these")
    add("--action_key", help="feature that holds the actions (default: the usual one of the format)")
    add("--transform", help="what to do with the numbers first, such as bridge_orig, as in hf-vla train and inspect")
    add("--horizon", type=int, help="statistics of every step of a chunk of this many steps")
    add(
        "--relative",
        nargs="*",
        metavar="DIM",
        help="with --horizon: chunks minus the state at their first step, in these dimensions (names or numbers; all if "
        "none is given)",
    )
    add("--mode", choices=MODES, default="bounds_q99", help="how they will be used (default: %(default)s)")
    add("--pass_through", nargs="+", metavar="DIM", default=[], help="dimensions that are not to be normalized")
    add(
        "--exact_rows",
        type=int,
        default=1_000_000,
        help="rows kept for exact quantiles, 4 or 8 bytes a number (default: %(default)s)",
    )
    add(
        "--write-lerobot",
        action="store_true",
        help="write meta/stats.json of the LeRobotDatasets anew, with true quantiles; the old file is kept beside it",
    )
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Compute, merge or repair, and print a table; what is wrong ends in one line and exit status 2."""
    args = parser().parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _check(args)
    if args.write_lerobot:
        for path in args.datasets:
            sys.stdout.write(repair_text(repair_stats(path), path))
        return 0
    measured = merge_shards([Measured.load(path) for path in args.merge]) if args.merge else _measure_all(args)
    if args.shard:
        measured[0].save(args.output)
        i, n = measured[0].request.shard
        sys.stdout.write(
            f"shard {i} of {n} of {measured[0].request.key!r}: {measured[0].episodes} episodes, {measured[0].rows} rows, "
            f"saved to {args.output}; merge all {n} with `hf-vla stats --merge`\n"
        )
        return 0
    entries = {str(part.request.key): _entry(part, args) for part in measured}
    text = "".join(measured_text(part, entries[str(part.request.key)]) for part in measured)
    if args.weights:
        entries[MIXTURE] = _mixture(measured, args)
        text += f"{MIXTURE!r} of {dict(zip(entries, args.weights, strict=False))}:\n"
        text += table(entries[MIXTURE]["action"], measured[0].names)
    if args.output is not None:
        plain = args.mode == "bounds_q99" and all(part.request.horizon is None for part in measured)
        form = args.format or ("openvla" if plain else "hf_vla")
        names = {key: _names(part) for key, part in zip(entries, [*measured, measured[0]], strict=False)}
        written = write_stats(
            NormStats(entries), args.output, form, names=names if form in NAMED else None, lossy=args.lossy
        )
        text += f"saved to {written[0]} (format {form})\n"
    sys.stdout.write(text)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other before anything is read."""
    if not args.datasets and args.relative:
        raise StatsError(
            f"--relative takes all that follows for dimensions, here {args.relative}: put the dataset before it"
        )
    if bool(args.datasets) == bool(args.merge):
        raise StatsError("give datasets, or the files to --merge, not both (hf-vla stats --help shows examples)")
    if args.write_lerobot and (
        args.merge or args.shard or args.horizon or args.output or args.weights or args.transform
    ):
        raise StatsError(
            "--write-lerobot writes meta/stats.json of the datasets from all their rows: it takes no --output, --merge, "
            "--shard, --horizon, --weights or --transform"
        )
    taken = (args.shard, args.horizon, args.relative is not None, args.keys, args.action_key, args.transform)
    if args.merge and any(taken):
        raise StatsError("--merge takes horizon, keys and dimensions from the parts: leave those options out")
    if args.shard and (len(args.datasets) != 1 or args.output is None or args.weights):
        raise StatsError("--shard computes a part of one dataset for a later --merge, and needs --output")
    if args.workers < 1 or args.exact_rows < 1:
        raise StatsError(f"--workers and --exact_rows are at least 1, got {args.workers} and {args.exact_rows}")
    if args.output is not None and args.output.exists() and not args.overwrite:
        raise StatsError(f"{args.output} is there already: choose another --output, or pass --overwrite")
    if args.output is not None and args.output.suffix != ".json":
        raise StatsError(f"--output is a .json file, got {args.output}")
    keys = args.keys or [str(Path(path).resolve()) for path in args.datasets]
    wrong_number = bool(args.datasets) and len(keys) != len(args.datasets)
    if wrong_number or len(set(keys)) != len(keys) or MIXTURE in keys:
        raise StatsError(f"each dataset needs a key of its own, and not {MIXTURE!r}: got {keys}; pass --keys")
    if args.weights and args.datasets and len(args.weights) != len(args.datasets):
        raise StatsError(f"{len(args.weights)} weights for {len(args.datasets)} datasets")


def _measure_all(args: argparse.Namespace) -> list[Measured]:
    """Every dataset, one after the other."""
    keys = args.keys or [None] * len(args.datasets)
    found: list[Measured] = []
    for path, key in zip(args.datasets, keys, strict=True):
        relative = None
        if args.relative is not None:
            stream = open_numbers(path, args.action_key, args.transform)
            dof = stream.lengths[stream.action_key]
            relative = tuple(_dims(args.relative or range(dof), stream.names(stream.action_key), dof))
        shard = _shard(args.shard)
        request = Request(key, args.action_key, args.horizon, relative, shard, args.exact_rows, args.transform)
        found.append(measure(path, request, args.workers))
        if found[-1].request.key in {MIXTURE, *(part.request.key for part in found[:-1])}:
            raise StatsError(f"each dataset needs a key of its own, {found[-1].request.key!r} is taken: pass --keys")
    return found


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise StatsError(f"--shard is i/n, such as 1/4, got {text!r}")
    return int(match[1]), int(match[2])


def _dims(asked: Sequence[Any], names: Sequence[str] | None, dof: int) -> list[int]:
    """Numbers of dimensions given by name or number."""
    dims = []
    for dim in map(str, asked):
        if dim not in (names or ()) and not (dim.isdigit() and int(dim) < dof):
            raise StatsError(f"there is no dimension {dim!r}; there are {list(names) if names else f'0 to {dof - 1}'}")
        dims.append(list(names).index(dim) if names and dim in names else int(dim))
    return dims


def _mask(part: Measured, args: argparse.Namespace) -> np.ndarray:
    shape = part.stats["action"].shape
    if shape is None:
        raise StatsError(
            f"all {part.episodes} episodes of {part.request.key!r} are shorter than the horizon of {part.request.horizon}"
        )
    mask = np.ones(shape[-1], dtype=bool)
    mask[_dims(args.pass_through, part.names, shape[-1])] = False
    return mask


def _entry(part: Measured, args: argparse.Namespace) -> dict[str, Any]:
    """What NormStats holds of one dataset."""
    action = part.stats["action"].to_stats(mask=_mask(part, args), mode=args.mode)
    proprio = part.stats["proprio"].to_stats(mode=args.mode) if "proprio" in part.stats else None
    return {"action": action, "proprio": proprio, "num_trajectories": part.episodes}


def _names(part: Measured) -> dict[str, tuple[str, ...]]:
    """Names of the dimensions, as far as the dataset has some."""
    given = {"action": part.names, "proprio": part.state_names if "proprio" in part.stats else None}
    return {vector: names for vector, names in given.items() if names is not None}


def _mixture(measured: Sequence[Measured], args: argparse.Namespace) -> dict[str, Any]:
    if len(args.weights) != len(measured):
        raise StatsError(f"{len(args.weights)} weights for {len(measured)} datasets")
    parts = {
        name: [part.stats[name] for part in measured] if all(name in part.stats for part in measured) else None
        for name in ("action", "proprio")
    }
    actions, states = parts["action"] or [], parts["proprio"]
    alike = states is not None and len({state.shape for state in states}) == 1
    return {
        "action": mixture_stats(actions, args.weights, mask=_mask(measured[0], args), mode=args.mode),
        "proprio": mixture_stats(states, args.weights, mode=args.mode) if states is not None and alike else None,
        "num_trajectories": sum(part.episodes for part in measured),
    }


if __name__ == "__main__":
    sys.exit(main())
