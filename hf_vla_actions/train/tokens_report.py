"""`hf-vla tokens-report`: see `main`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hf_vla_actions.actions import ActionSpace, ActionStats
from hf_vla_actions.data import ChunkDataset
from hf_vla_actions.errors import TrainingError, one_line_errors
from hf_vla_actions.plots import new_figure, plot_energy, plot_token_costs
from hf_vla_actions.tokenizers import FASTActionTokenizer, UniformActionTokenizer, VQActionTokenizer
from hf_vla_actions.tokenizers.compare import Coder, TokenizerCost, cost_of, energy_shares, text_of
from hf_vla_actions.tokenizers.fast_dct import coefficient_limit
from hf_vla_actions.tokenizers.quantile import QuantileBins
from hf_vla_actions.train.fitting import add_space_options, data_arguments
from hf_vla_actions.train.setup import open_dataset, space_of, split_episodes, stats_of

EPILOG = """\
example:
  hf-vla tokens-report --dataset ./my_robot --horizons 5 10 20 --action_units m m m rad rad rad none \\
    --figure tokens.png --output tokens.json

Tokenizers that learn (quantile bins, FAST, VQ) are fitted to the training episodes of `hf-vla train` with the same
--eval_fraction and --seed; every number of the table is of held-out episodes. Errors are what coding adds, beside the
clipping of normalization, whose share the first lines say. FAST's length depends on the scale, and so does its error.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla tokens-report",
        description="Compare action tokenizers on a dataset: tokens a chunk and a second, use of the codes, errors in "
        "millimeters and degrees.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = options.add_argument
    add("--dataset", required=True, help="the dataset; its pictures are not read")
    add("--horizons", type=int, nargs="+", default=[5, 10, 20], help="actions in a chunk (default: 5 10 20)")
    add("--bins", type=int, nargs="*", default=[16, 64, 256, 1024], help="uniform and quantile bins")
    add("--scales", type=float, nargs="*", default=[10.0, 25.0, 50.0], help="of FAST (default: 10 25 50)")
    add("--vocab_size", type=int, default=1024, help="codes of FAST; more where a scale needs them (default: 1024)")
    add("--codebooks", type=int, nargs="*", default=[2, 4], help="of VQ, 256 entries each (default: 2 4)")
    add("--vq_steps", type=int, default=1000, help="batches that each VQ learns from (default: %(default)s)")
    add("--output", help="also write the numbers to this JSON file")
    add("--figure", help="also draw them, to this .png or .pdf")
    add("--seed", type=int, default=42, help="of the split and the fits (default: %(default)s)")
    add("--eval_fraction", type=float, default=0.2, help="share of the episodes held out (default: %(default)s)")
    add_space_options(options)
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Fit, measure, print; what is wrong with the options ends in one line and exit status 2."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not 0 < args.eval_fraction < 1:
        raise TrainingError(f"--eval_fraction must be above 0 and below 1, got {args.eval_fraction}")
    for path in filter(None, (args.output, args.figure)):
        if not Path(path).absolute().parent.is_dir():
            raise TrainingError(f"there is no folder {Path(path).parent} to write {path} to: make it first")
    data = data_arguments(args)
    dataset = open_dataset(data)
    space = space_of(dataset, data)
    parts = split_episodes(dataset, args.eval_fraction, args.seed)
    stats: ActionStats = stats_of(dataset, space, parts[0], args.norm_mode, args.skip_first)["action"]
    costs, clipped, energy = [], np.zeros(space.dof), {}
    with tqdm(total=len(args.horizons), desc="tokenizers", unit="horizon", file=sys.stderr) as bar:
        for horizon in args.horizons:
            fitted, (held_out, mask) = (
                ChunkDataset(dataset, horizon, episodes=part, skip_first=args.skip_first).actions_only()
                for part in parts
            )
            x = stats.normalize(held_out)
            clipped = np.mean(np.abs(stats.unnormalize(x) - held_out)[mask] > 1e-9 * _width(stats), axis=0)
            energy[horizon] = energy_shares(x)
            for name, coder in coders(stats.normalize(fitted[0]), args):
                costs.append(cost_of(name, coder, x, stats, space, dataset.fps))
            bar.update()
    sys.stdout.write(f"{_facts(space, clipped, parts, energy)}\n\n{text_of(costs)}")
    if args.output:
        _write(Path(args.output), args, costs, energy)
    if args.figure:
        draw(costs, energy, space).savefig(args.figure, dpi=120)
    return 0


def coders(fitted: np.ndarray, args: argparse.Namespace) -> Iterator[tuple[str, Coder]]:
    """The tokenizers to compare, those that learn fitted to normalized chunks (n, horizon, dof)."""
    horizon, dof = fitted.shape[1:]
    for n in args.bins:
        yield f"uniform {n}", UniformActionTokenizer(n)
    for n in args.bins:
        yield f"quantile {n}", QuantileBins.fit(fitted, n)
    for scale in args.scales:
        least = 2 * coefficient_limit(horizon, scale) + 1
        yield f"FAST x{scale:g}", FASTActionTokenizer.fit(fitted, max(args.vocab_size, 2 * least), scale)
    for n in args.codebooks:
        tokenizer = VQActionTokenizer(dof, horizon, n_codebooks=n)
        # Its best weights are chosen on chunks of its own: the held-out episodes are for the table alone.
        tokenizer.fit(fitted, steps=args.vq_steps, seed=args.seed, progress=False)
        yield f"VQ {n} x 256", tokenizer


def draw(costs: list[TokenizerCost], energy: dict[int, np.ndarray], space: ActionSpace) -> Any:
    """The figure: error against length, and the energy of each frequency of the longest chunks."""
    figure, axes = new_figure(1, 2, figsize=(11.5, 4.4))
    horizon = max(energy)
    plot_token_costs([cost for cost in costs if cost.horizon == horizon], axes[0])
    plot_energy(energy[horizon], space.names, axes[1])
    return figure


def _facts(space: ActionSpace, clipped: np.ndarray, parts, energy: dict[int, np.ndarray]) -> str:
    outside = "  ".join(f"{name} {share:.1%}" for name, share in zip(space.names, clipped, strict=True))
    lines = [
        f"fitted to {len(parts[0])} episodes, measured on {len(parts[1])} others; errors: root mean square / largest",
        f"outside the statistics' range, clipped before coding: {outside}",
    ]
    for horizon, shares in energy.items():
        moving = shares[:, shares.sum(axis=0) > 0]
        low = moving[: max(1, -(-horizon // 4))].sum(axis=0).mean() if moving.size else 0.0
        lines.append(
            f"horizon {horizon}: the mean holds {moving[0].mean() if moving.size else 0.0:.0%} of the energy, the lowest "
            f"quarter of the frequencies {low:.0%} (mean over dimensions)"
        )
    return "\n".join(lines)


def _width(stats: ActionStats) -> np.ndarray:
    """(dof,) real width of the normalized range, above 0."""
    ones = np.ones(stats.dof)
    return np.maximum(np.abs(stats.unnormalize(ones) - stats.unnormalize(-ones)), np.finfo(float).tiny)


def _write(path: Path, args: argparse.Namespace, costs: list[TokenizerCost], energy: dict[int, np.ndarray]) -> None:
    values = {
        "dataset": Path(args.dataset).name,
        "seed": args.seed,
        "tokenizers": [cost.to_dict() for cost in costs],
        "energy": {str(horizon): shares.tolist() for horizon, shares in energy.items()},
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
