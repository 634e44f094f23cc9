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

from hf_vla_actions.actions import ActionStats, NormStats
from hf_vla_actions.actions.compute import mixture_stats
from hf_vla_actions.actions.formats import FORMATS
from hf_vla_actions.actions.stats import MODES
from hf_vla_actions.data.dataset_stats import Measured, Request, measure, merge_shards
from hf_vla_actions.data.lerobot_folder import BOOKKEEPING
from hf_vla_actions.data.number_stream import open_numbers
from hf_vla_actions.data.stats_repair import Repair, missing_pictures, repair_stats
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
SHOWN = ("mean", "std", "min", "q01", "q50", "q99", "max")


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
    add("--overwrite", action="store_true", help="replace the output if it is there")
    add("--workers", type=int, default=1, help="processes that share the data files (default: %(default)s)")
    add("--shard", metavar="i/n", help="compute the i-th part of n only (every n-th episode)")
    add("--merge", nargs="+", type=Path, metavar="FILE", help="merge the parts that --shard wrote")
    add("--keys", nargs="+", metavar="KEY", help="unnorm_key of each dataset (default: names of the folders)")
    add("--weights", nargs="+", type=float, help=f"add the entry {MIXTURE!r}: rows drawn from the datasets with these")
    add("--action_key", help="feature that holds the actions (default: the usual one of the format)")
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
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _check(args)
    if args.write_lerobot:
        for path in args.datasets:
            sys.stdout.write(_repair_text(repair_stats(path), path))
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
    text = "".join(_text(part, entries[str(part.request.key)]) for part in measured)
    if args.weights:
        entries[MIXTURE] = _mixture(measured, args)
        text += f"{MIXTURE!r} of {dict(zip(entries, args.weights, strict=False))}:\n"
        text += _table(entries[MIXTURE]["action"], measured[0].names)
    if args.output is not None:
        plain = args.mode == "bounds_q99" and all(part.request.horizon is None for part in measured)
        form = args.format or ("openvla" if plain else "hf_vla")
        text += f"saved to {NormStats(entries).save(args.output, form)} (format {form})\n"
    sys.stdout.write(text)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other before anything is read."""
    if bool(args.datasets) == bool(args.merge):
        raise StatsError("give datasets, or the files to --merge, not both (hf-vla stats --help shows examples)")
    if args.write_lerobot and (args.merge or args.shard or args.horizon or args.output or args.weights):
        raise StatsError(
            "--write-lerobot writes meta/stats.json of the datasets from all their rows: it takes no --output, --merge, "
            "--shard, --horizon or --weights"
        )
    if args.merge and (args.shard or args.horizon or args.relative is not None or args.keys or args.action_key):
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
            stream = open_numbers(path, args.action_key)
            dof = stream.lengths[stream.action_key]
            relative = tuple(_dims(args.relative or range(dof), stream.names(stream.action_key), dof))
        request = Request(key, args.action_key, args.horizon, relative, _shard(args.shard), args.exact_rows)
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


def _text(part: Measured, entry: dict[str, Any]) -> str:
    """The table of one dataset with what one must know about it."""
    request, running = part.request, part.stats["action"]
    of = "actions" if request.horizon is None else f"chunks of {request.horizon} actions"
    if request.relative is not None:
        relative = [part.names[dim] if part.names else dim for dim in request.relative]
        of += f" relative to the state at their first step in {relative}"
    lines = [f"{request.key!r}: {running.count} {of}, {part.episodes} episodes, {part.rows} rows"]
    lines.append(
        "quantiles are exact"
        if running.exact
        else f"quantiles have the right rank within {running.rank_error:.1e} (sketch of {running.count} rows)"
    )
    if part.short:
        lines.append(f"{part.short} episodes are shorter than the horizon and gave no chunk")
    still = np.flatnonzero(entry["action"].constant.all(axis=0) if request.horizon else entry["action"].constant)
    if len(still):
        lines.append(f"constant dimensions: {[part.names[i] if part.names else int(i) for i in still]}")
    text = "\n".join(lines) + "\n" + _table(entry["action"], part.names)
    if entry["proprio"] is not None:
        text += "states\n" + _table(entry["proprio"], part.state_names)
    return text


def _table(stats: ActionStats, names: Sequence[str] | None) -> str:
    """One line a dimension; of chunks the first and the last step."""
    vectors = {name: getattr(stats, name) for name in SHOWN if name != "q50"}
    if stats.running is not None:
        vectors["q50"] = stats.running.quantile(0.5)
    shown = [name for name in SHOWN if name in vectors]
    labels = [str(name) for name in names or range(stats.dof)]
    steps = [None] if stats.horizon is None else sorted({0, stats.horizon - 1})
    lines = []
    for step in steps:
        if step is not None:
            lines.append(f"step {step} of 0 to {(stats.horizon or 0) - 1}")
        width = max(len(label) for label in [*labels, "dimension"])
        lines.append("dimension".ljust(width) + f"{'count':>11}" + "".join(f"{name:>12}" for name in shown))
        for dim, label in enumerate(labels):
            values = [vectors[name][dim] if step is None else vectors[name][step, dim] for name in shown]
            passes = "" if np.asarray(stats.mask)[dim] else "  not normalized"
            lines.append(
                label.ljust(width) + f"{stats.count:>11}" + "".join(f"{value:>12.5g}" for value in values) + passes
            )
    return "\n".join(lines) + "\n"


def _repair_text(repair: Repair, path: str) -> str:
    """What was changed, with the widths of [q01, q99] before and after."""
    lines = [f"{repair.path} written" + (f", the old one is {repair.backup.name}" if repair.backup else "")]
    names = {key: open_numbers(path).names(key) for key in repair.after}
    for key, bounds in repair.after.items():
        if key in BOOKKEEPING:
            continue
        widening = repair.widening(key)
        if widening is None:
            lines.append(f"{key}: had no q01 and q99")
            continue
        lines.append(f"{key}: width of [q01, q99]")
        lines.append(f"  {'dimension':<16}{'before':>12}{'after':>12}{'before/after':>14}")
        before = np.ptp(repair.before[key], axis=0)
        labels = names[key] or range(len(before))
        for label, old, new, factor in zip(labels, before, np.ptp(bounds, axis=0), widening, strict=True):
            share = "constant" if np.isnan(factor) else f"{factor:.3f}"
            lines.append(f"  {label!s:<16}{old:>12.5g}{new:>12.5g}{share:>14}")
    lines.append(f"also written: {[key for key in repair.after if key in BOOKKEEPING]}")
    if repair.added:
        lines.append(f"new entries: {list(repair.added)}")
    if repair.kept:
        lines.append(f"left as they were: {list(repair.kept)}")
    without = missing_pictures(path)
    if without:
        lines.append(f"cameras without statistics, which are not computed here: {without}")
    if (repair.path.parent / "episodes_stats.jsonl").is_file():
        lines.append(
            "lerobot reads episodes_stats.jsonl of a v2.1 dataset, not this file; convert it to v3.0 to use it"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
