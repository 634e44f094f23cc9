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

from hf_vla_actions.actions import ActionSpace
from hf_vla_actions.errors import TrainingError, VLAActionsError, one_line_errors
from hf_vla_actions.tokenizers import FASTActionTokenizer
from hf_vla_actions.tokenizers.fast_dct import check_scale, coefficient_limit
from hf_vla_actions.tokenizers.fast_files import FILE_NAME as TOKENIZER_FILE
from hf_vla_actions.tokenizers.fast_fit import FASTReport, report, scale_for
from hf_vla_actions.train.fitting import FitData, add_data_options
from hf_vla_actions.train.tokens import MAX_CHUNKS, check_size

REPORT_NAME = "fast_report.json"
UNITS = {"m": ("length", 1.0), "cm": ("length", 0.01), "mm": ("length", 0.001), "rad": ("angle", 1.0)}
UNITS["deg"] = ("angle", float(np.pi / 180))
EPILOG = """\
example, at most 2 mm and half a degree off at any step:
  hf-vla fit-fast --dataset ./my_robot --horizon 16 --action_units m m m rad rad rad none \\
    --max-error 2mm 0.5deg --output ./my_fast

example, the scale of the published tokenizers:
  hf-vla fit-fast --dataset ./my_robot --horizon 16 --scale 10 --vocab_size 2048 --output ./my_fast

Statistics and held-out episodes are those of `hf-vla train` with the same --eval_fraction, --seed, --norm_mode and
gripper options; the statistics are written beside the tokenizer, and a training on other ones refuses it. Use it with
`hf-vla train --action_tokenizer ./my_fast` or FASTActionTokenizer.from_pretrained("./my_fast").
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla fit-fast",
        description="Fit a FAST action tokenizer to the actions of a dataset, and report its length and its errors.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_data_options(options)
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
    options.add_argument(
        "--max_chunks", type=int, default=MAX_CHUNKS, help="chunks to fit on at most (default: %(default)s)"
    )
    options.add_argument("--export_reference", action="store_true", help="also write the reference processor's files")
    options.add_argument("--no_table", action="store_true", help="fit once, without other scales and sizes beside it")
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Read the dataset, fit, save, print the report."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if (Path(args.output) / TOKENIZER_FILE).exists() and not args.overwrite:
        raise TrainingError(f"{args.output} holds a tokenizer already: choose another --output, or pass --overwrite")
    data = FitData.read(args, args.max_chunks)
    space, stats = data.space, data.stats
    chunks = {name: data.normalized(name) for name in data.parts}
    fitted, judged = chunks["training"], chunks[list(chunks)[-1]]
    half_range = stats.unnormalize(np.ones(space.dof)) - stats.unnormalize(np.zeros(space.dof))
    scale = 10.0 if args.scale is None else args.scale
    check_scale(scale)
    if args.max_error:
        wanted = _wanted(args.max_error, space, half_range)
        scale = scale_for(np.concatenate(list(chunks.values())), wanted)
    check_size(args.vocab_size, args.horizon, scale, "--vocab_size")
    plan = [(scale, args.vocab_size)]
    if not args.no_table:
        others = [(scale / 2, args.vocab_size), (scale * 2, args.vocab_size)]
        others += [(scale, args.vocab_size // 2), (scale, args.vocab_size * 2)]
        plan += [(s, v) for s, v in others if v > 2 * coefficient_limit(args.horizon, s)]
    reports, chosen = [], None
    for s, size in tqdm(plan, desc="fitting", unit="tokenizer", file=sys.stderr):
        tokenizer = FASTActionTokenizer.fit(fitted, size, s)
        chosen = chosen or tokenizer
        reports.append(report(tokenizer, judged, half_range))
    if chosen is not None:
        data.save(args.output)
        chosen.save_pretrained(args.output)
        if args.export_reference:
            chosen.export_reference(args.output)
    _write(args, reports, space)
    part = list(data.parts)[-1]
    sys.stdout.write(table(reports, space, f"{len(data.parts[part])} {part} episodes") + f"\nsaved to {args.output}\n")
    return 0


def table(reports: list[FASTReport], space: ActionSpace, episodes: str) -> str:
    """The report in words; the first line is of the tokenizer that was saved."""
    first = reports[0]
    lines = [
        f"{first.n_chunks} chunks of {episodes}; one code a number would be {first.n_values} codes",
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
