"""`hf-vla fit-vq`: see `main`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from hf_vla_actions.actions import NormStats
from hf_vla_actions.data import ChunkDataset
from hf_vla_actions.errors import TrainingError, one_line_errors
from hf_vla_actions.tokenizers import VQActionTokenizer
from hf_vla_actions.train.arguments import DataArguments
from hf_vla_actions.train.setup import open_dataset, space_of, split_episodes, stats_of

EPILOG = """\
example:
  hf-vla fit-vq --dataset ./my_robot --horizon 8 --output ./vq --n_codebooks 4 --codebook_size 256

Statistics and held-out episodes are those of `hf-vla train` with the same --eval_fraction, --seed, --norm_mode and
gripper options; the statistics are written beside the tokenizer. What the report says of held-out episodes is what to
expect of new ones.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla fit-vq",
        description="Learn a VQ action tokenizer (a few codes a chunk) from a LeRobotDataset v3.0 and report how well its "
        "codebooks are used and what error it makes in real units.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = options.add_argument
    add("--dataset", required=True, help="folder of the dataset; its pictures are not read")
    add("--horizon", type=int, required=True, help="actions in one chunk")
    add("--output", required=True, help="folder for the tokenizer")
    add("--overwrite", action="store_true", help="replace a tokenizer that is there")
    add("--n_codebooks", type=int, default=4, help="codes of one chunk (default: %(default)s)")
    add("--codebook_size", type=int, default=256, help="entries of each codebook (default: %(default)s)")
    add("--code_dim", type=int, default=32, help="length of the quantized vector (default: %(default)s)")
    add(
        "--hidden",
        type=int,
        nargs="*",
        default=[256, 128],
        help="widths of the encoder (default: 256 128; none: linear)",
    )
    add("--steps", type=int, default=3000, help="batches to train on (default: %(default)s)")
    add("--batch_size", type=int, default=256, help="chunks of a batch (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="learning rate at the start (default: %(default)s)")
    add("--update", choices=["ema", "gradient"], default="ema", help="how codebooks learn (default: %(default)s)")
    add("--seed", type=int, default=42, help="of the split and the fit (default: %(default)s)")
    add("--eval_fraction", type=float, default=0.1, help="share of the episodes held out (default: %(default)s)")
    add("--skip_first", type=int, default=0, help="steps left out at the start of every episode (bridge: 1)")
    add("--action_key", default="action", help="column of the actions (default: %(default)s)")
    add("--action_names", nargs="+", help="name of each dimension; default: those of the dataset")
    add("--action_units", nargs="+", help="unit of each dimension, 'none' where there is none: m m m rad rad rad none")
    add("--norm_mode", choices=["bounds_q99", "bounds"], default="bounds_q99", help="what becomes [-1, 1]")
    add("--gripper", help="name or index of the gripper's dimension, 'none' if there is none")
    add("--gripper_open", type=float, default=1.0, help="value of the open gripper (default: %(default)s)")
    add("--gripper_closed", type=float, default=0.0, help="value of the closed gripper (default: %(default)s)")
    add("--no_gripper_binary", action="store_true", help="the gripper takes values between open and closed")
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Fit, save, report; what is wrong with the options ends in one line and exit status 2."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    output = Path(args.output)
    if (output / "vq_tokenizer.json").exists() and not args.overwrite:
        raise TrainingError(f"{output} holds a tokenizer already: choose another --output, or pass --overwrite")
    same = ("dataset", "skip_first", "eval_fraction", "action_key", "action_names", "action_units", "norm_mode")
    values = {name: getattr(args, name) for name in (*same, "gripper", "gripper_open", "gripper_closed")}
    data = DataArguments(**values, gripper_binary=not args.no_gripper_binary)
    dataset = open_dataset(data)
    space = space_of(dataset, data)
    tokenizer = VQActionTokenizer(
        space.dof,
        args.horizon,
        code_dim=args.code_dim,
        codebook_size=args.codebook_size,
        n_codebooks=args.n_codebooks,
        hidden=args.hidden,
    )
    train, held_out = split_episodes(dataset, args.eval_fraction, args.seed)
    entry = stats_of(dataset, space, train, args.norm_mode)
    stats = entry["action"]
    parts = {"training": train, "held-out": held_out}
    chunks = {
        name: ChunkDataset(dataset, args.horizon, episodes=episodes, skip_first=args.skip_first).actions_only()
        for name, episodes in parts.items()
        if episodes
    }
    others = stats.normalize(chunks["held-out"][0]) if held_out else 0.0
    history = tokenizer.fit(
        stats.normalize(chunks["training"][0]),
        held_out=others,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        update=args.update,
    )
    NormStats({Path(args.dataset).resolve().name: entry}).save(output)
    tokenizer.save_pretrained(output)
    for name, (actions, pad_mask) in chunks.items():
        report = tokenizer.report(actions, stats, space=space, pad_mask=pad_mask)
        sys.stdout.write(f"{name} episodes ({len(parts[name])}): {report.text()}\n")
    sys.stdout.write(
        f"saved to {output}: {tokenizer.n_tokens} codes a chunk of {args.horizon} x {space.dof}, vocabulary of "
        f"{tokenizer.n_codes}, weights of step {history.best.step} of {args.steps}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
