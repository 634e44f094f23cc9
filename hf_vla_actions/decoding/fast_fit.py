"""`hf-vla fit-fast`: make a FAST tokenizer for a dataset, and say what it costs and how exact it is."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hf_vla_actions.actions import ActionSpace, ActionStats
from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.errors import DatasetError, VLAActionsError, one_line_errors
from hf_vla_actions.tokenizers import FASTActionTokenizer
from hf_vla_actions.tokenizers.fast_dct import check_scale, coefficient_limit
from hf_vla_actions.tokenizers.fast_fit import FASTReport, report, scale_for

REPORT_NAME = "fast_report.json"
UNITS = {"m": ("length", 1.0), "cm": ("length", 0.01), "mm": ("length", 0.001), "rad": ("angle", 1.0)}
UNITS["deg"] = ("angle", float(np.pi / 180))
EPILOG = """\
example, at most 2 mm and half a degree off at any step:
  hf-vla fit-fast --dataset ./my_robot --horizon 16 --action_units m m m rad rad rad none \\
    --max-error 2mm 0.5deg --output ./my_fast

example, the scale of the published tokenizers:
  hf-vla fit-fast --dataset ./my_robot --horizon 16 --scale 10 --vocab_size 2048 --output ./my_fast

Use it with FASTActionTokenizer.from_pretrained("./my_fast").
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla fit-fast",
        description="Fit a FAST action tokenizer to the actions of a dataset, and report its length and its errors.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--dataset", required=True, help="folder of a LeRobotDataset v3.0")
    options.add_argument("--horizon", type=int, required=True, help="actions in a chunk")
    options.add_argument("--output", required=True, help="folder for the tokenizer and its report")
    options.add_argument("--vocab_size", type=int, default=1024, help="codes at most (default: %(default)s)")
    precision = options.add_mutually_exclusive_group()
    precision.add_argument("--scale", type=float, help="steps in a coefficient of 1: finer and longer (default: 10)")
    precision.add_argument(
        "--max-error",
        "--max_error",
        nargs="+",
        metavar="ERROR",
        help="largest error of any value that normalization does not clip: 2mm, 0.5deg, ... one for each kind of unit, or a number without unit for the "
        "dimensions that have none; the scale follows",
    )
    options.add_argument("--action_key", default="action", help="column of the actions (default: %(default)s)")
    options.add_argument("--action_names", nargs="+", help="name of each dimension (default: those of the dataset)")
    options.add_argument("--action_units", nargs="+", help="unit of each dimension, such as m m m rad rad rad none")
    options.add_argument(
        "--norm_mode", choices=("bounds_q99", "bounds"), default="bounds_q99", help="what becomes [-1, 1]"
    )
    options.add_argument("--gripper", help="dimension that is not normalized if within [-1, 1] (default: 'gripper')")
    options.add_argument("--skip_first", type=int, default=0, help="steps left out at the start of every episode")
    options.add_argument(
        "--eval_fraction",
        type=float,
        default=0.1,
        help="share of the episodes that the report is of (default: %(default)s)",
    )
    options.add_argument(
        "--max_chunks", type=int, default=20000, help="chunks to fit on at most (default: %(default)s)"
    )
    options.add_argument("--seed", type=int, default=0, help="of the choice of episodes and chunks")
    options.add_argument("--export_reference", action="store_true", help="also write the reference processor's files")
    options.add_argument("--no_table", action="store_true", help="fit once, without other scales and sizes beside it")
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Read the dataset, fit, save, print the report."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    dataset = LeRobotDataset(args.dataset, action_key=args.action_key)
    space = _space(dataset, args)
    fitted, held_out = _split(dataset, args)
    stats = _stats(dataset, space, fitted, args)
    chunks = {name: _chunks(dataset, stats, part, args) for name, part in (("fit", fitted), ("report", held_out))}
    half_range = stats.unnormalize(np.ones(space.dof)) - stats.unnormalize(np.zeros(space.dof))
    scale = 10.0 if args.scale is None else args.scale
    check_scale(scale)
    if args.max_error:
        wanted = _wanted(args.max_error, space, half_range)
        scale = scale_for(np.concatenate(list(chunks.values())), wanted)
    least = 2 * coefficient_limit(args.horizon, scale) + 1
    if args.vocab_size < least:
        raise VLAActionsError(
            f"scale {scale:g} at horizon {args.horizon} takes {least} codes for the single coefficients alone: pass "
            f"--vocab_size {max(2 * least, 1024)}, or allow larger errors"
        )
    plan = [(scale, args.vocab_size)]
    if not args.no_table:
        others = [(scale / 2, args.vocab_size), (scale * 2, args.vocab_size)]
        others += [(scale, args.vocab_size // 2), (scale, args.vocab_size * 2)]
        plan += [(s, v) for s, v in others if v > 2 * coefficient_limit(args.horizon, s)]
    reports, chosen = [], None
    for s, size in tqdm(plan, desc="fitting", unit="tokenizer", file=sys.stderr):
        tokenizer = FASTActionTokenizer.fit(chunks["fit"], size, s)
        chosen = chosen or tokenizer
        reports.append(report(tokenizer, chunks["report"], half_range))
    if chosen is not None:
        chosen.save_pretrained(args.output)
        if args.export_reference:
            chosen.export_reference(args.output)
    _write(args, reports, space)
    sys.stdout.write(table(reports, space, len(held_out)) + f"\nsaved to {args.output}\n")
    return 0


def table(reports: list[FASTReport], space: ActionSpace, n_episodes: int) -> str:
    """The report in words; the first line is of the tokenizer that was saved."""
    first = reports[0]
    lines = [
        f"{first.n_chunks} chunks of {n_episodes} episodes not fitted on; one code a number would be {first.n_values} codes",
        f"{'scale':>8}{'codes':>8}{'mean length':>13}{'p99':>7}{'max':>6}   largest error in each dimension",
    ]
    for i, one in enumerate(reports):
        errors = "  ".join(_error(space, d, value) for d, value in enumerate(one.max))
        mark = "  <- saved" if i == 0 else ""
        lines.append(
            f"{one.scale:>8g}{one.n_codes:>8}{one.codes_mean:>13.1f}{one.codes_p99:>7.0f}{one.codes_max:>6}   {errors}{mark}"
        )
    errors = "  ".join(_error(space, d, value) for d, value in enumerate(first.rmse))
    lines.append(f"root mean square of the saved one: {errors}")
    return "\n".join(lines)


def _error(space: ActionSpace, dim: int, value: float) -> str:
    unit = space.units[dim]
    factor, shown = {"m": (1e3, "mm"), "rad": (180 / np.pi, "deg")}.get(unit or "", (1.0, unit or ""))
    name = space.names[dim] if space.named else str(dim)
    return f"{name} {value * factor:.3g}{shown}"


def _space(dataset: LeRobotDataset, args: argparse.Namespace) -> ActionSpace:
    names = args.action_names or dataset.action_names
    for option, values in (("--action_names", args.action_names), ("--action_units", args.action_units)):
        if values is not None and len(values) != dataset.dof:
            raise VLAActionsError(f"{option} has {len(values)} entries for actions of {dataset.dof} dimensions")
    if names is None:
        names = [str(i) for i in range(dataset.dof)]
    units = [None if unit.lower() == "none" else unit for unit in args.action_units or ["none"] * dataset.dof]
    return ActionSpace(names, units)


def _split(dataset: LeRobotDataset, args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Episodes to fit on and to report on; the same if there are too few to hold any out."""
    if not 0.0 <= args.eval_fraction < 1.0:
        raise VLAActionsError(f"--eval_fraction is a share from 0 to below 1, got {args.eval_fraction}")
    episodes = [episode.index for episode in dataset.episodes]
    shuffled = np.random.default_rng(args.seed).permutation(episodes).tolist()
    n = int(np.ceil(args.eval_fraction * len(episodes)))
    return (shuffled[n:], shuffled[:n]) if 0 < n < len(episodes) else (episodes, episodes)


def _stats(dataset: LeRobotDataset, space: ActionSpace, episodes: list[int], args: argparse.Namespace) -> ActionStats:
    chosen = set(episodes)
    rows = np.concatenate([np.arange(e.start, e.stop) for e in dataset.episodes if e.index in chosen])
    mask = np.ones(space.dof, dtype=bool)
    if args.gripper or "gripper" in space.names:
        dim = space.index(args.gripper or "gripper")
        mask[dim] = np.abs(dataset.actions[:, dim]).max() > 1
    return ActionStats.compute(dataset.actions[rows], mask=mask, mode=args.norm_mode)


def _chunks(dataset: LeRobotDataset, stats: ActionStats, episodes: list[int], args: argparse.Namespace) -> np.ndarray:
    actions, _ = ChunkDataset(dataset, args.horizon, episodes=episodes, skip_first=args.skip_first).actions_only()
    if args.max_chunks < 1:
        raise DatasetError(f"--max_chunks must be at least 1, got {args.max_chunks}")
    if len(actions) > args.max_chunks:
        actions = actions[
            np.sort(np.random.default_rng(args.seed).choice(len(actions), args.max_chunks, replace=False))
        ]
    return stats.normalize(actions)


def _wanted(texts: list[str], space: ActionSpace, half_range: np.ndarray) -> np.ndarray:
    """(dof,) largest error of each dimension, normalized; inf where none is asked for."""
    wanted = np.full(space.dof, np.inf)
    for text in texts:
        match = re.fullmatch(r"(\d+\.?\d*(?:e-?\d+)?|\.\d+)\s*([a-z]*)", text.strip())
        if match is None or (match[2] and match[2] not in UNITS) or float(match[1]) <= 0:
            raise VLAActionsError(
                f"an error is a positive number with one of {sorted(UNITS)} or without, got {text!r}"
            )
        kind, factor = UNITS[match[2]] if match[2] else (None, 1.0)
        dims = [d for d, unit in enumerate(space.units) if (UNITS[unit][0] if unit in UNITS else None) == kind]
        if not dims:
            raise VLAActionsError(
                f"no dimension is in units of {match[2] or 'nothing'} (units: {list(space.units)}): pass --action_units, "
                "such as m m m rad rad rad none"
            )
        for d in dims:
            real = float(match[1]) * factor / (UNITS[space.units[d]][1] if kind else 1.0)  # type: ignore[index]
            wanted[d] = real / abs(half_range[d]) if half_range[d] else np.inf
    return wanted


def _write(args: argparse.Namespace, reports: list[FASTReport], space: ActionSpace) -> None:
    values: dict[str, Any] = {
        "dataset": Path(args.dataset).name,
        "horizon": args.horizon,
        "max_error": args.max_error,
        "names": list(space.names),
        "units": list(space.units),
        "reports": [one.to_dict() for one in reports],
    }
    path = Path(args.output) / REPORT_NAME
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(temporary, path)
