"""`hf-vla fit-vq`: see `main`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from hf_vla_actions.errors import TrainingError, one_line_errors
from hf_vla_actions.tokenizers import VQActionTokenizer
from hf_vla_actions.train.fitting import FitData, add_data_options

EPILOG = """\
example:
  hf-vla fit-vq --dataset ./my_robot --horizon 8 --output ./vq --n_codebooks 4 --codebook_size 256

Statistics and held-out episodes are those of `hf-vla train` with the same --eval_fraction, --seed, --norm_mode and
gripper options; the statistics are written beside the tokenizer. Held-out episodes decide which step's weights are kept:
what the report says of them is close to what to expect of new ones, and a little better.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla fit-vq",
        description="Learn a VQ action tokenizer (a few codes a chunk) from robot data and report how well its "
        "codebooks are used and what error it makes in real units.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_data_options(options)
    add = options.add_argument
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
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Fit, save, report; what is wrong with the options ends in one line and exit status 2."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    output = Path(args.output)
    if (output / "vq_tokenizer.json").exists() and not args.overwrite:
        raise TrainingError(f"{output} holds a tokenizer already: choose another --output, or pass --overwrite")
    data = FitData.read(args)
    space, stats = data.space, data.stats
    tokenizer = VQActionTokenizer(
        space.dof,
        args.horizon,
        code_dim=args.code_dim,
        codebook_size=args.codebook_size,
        n_codebooks=args.n_codebooks,
        hidden=args.hidden,
    )
    others = data.normalized("held-out") if "held-out" in data.parts else 0.0
    history = tokenizer.fit(
        data.normalized("training"),
        held_out=others,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        update=args.update,
    )
    data.save(output)
    tokenizer.save_pretrained(output)
    for name, (actions, pad_mask) in data.chunks.items():
        report = tokenizer.report(actions, stats, space=space, pad_mask=pad_mask)
        sys.stdout.write(f"{name} episodes ({len(data.parts[name])}): {report.text()}\n")
    sys.stdout.write(
        f"saved to {output}: {tokenizer.n_tokens} codes a chunk of {args.horizon} x {space.dof}, vocabulary of "
        f"{tokenizer.n_codes}, weights of step {history.best.step} of {args.steps}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
