"""`hf-vla merge`: see `main`."""

from __future__ import annotations

import argparse
import logging
import sys

from hf_vla_actions.errors import one_line_errors
from hf_vla_actions.hub.merge import QLORA_WEIGHTS, TOLERANCES, merge_adapter
from hf_vla_actions.hub.probe import Probe
from hf_vla_actions.models.auto import load_action_config

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}
EPILOG = """\
example:
  hf-vla merge ./policy_lora --output ./policy
  hf-vla merge ./policy_lora --output ./policy --dtype bfloat16 --dataset ./my_robot

The merged folder is a whole policy: AutoModelForActionPrediction loads it, and plain Transformers too. It is compared
with the adapter after it was read back from disk, and removed again if it is another policy. All is computed in
float32: a model of 7B parameters takes 28 GB while it is merged.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla merge",
        description="Merge a LoRA adapter into its base model, and keep the result only if it says what the adapter says.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = options.add_argument
    add("adapter", help="folder of an adapter, or its repository on the Hub")
    add("--output", required=True, metavar="DIR", help="folder of the merged policy")
    add("--dtype", choices=list(DTYPES), help="of the merged weights (default: that of the base)")
    add("--base", help="where the base model is now, if not where the adapter says")
    add("--dataset", help="compare on frames of this robot dataset, instead of made-up pictures and sentences")
    add("--rows", type=int, default=8, help="with --dataset: frames, spread over it (default: %(default)s)")
    add(
        "--tolerance",
        type=float,
        help="largest difference of a logit, as a share of the largest one (default: "
        + ", ".join(f"{TOLERANCES[dtype]:g} for {name}" for name, dtype in DTYPES.items())
        + ")",
    )
    add(
        "--qlora",
        choices=QLORA_WEIGHTS,
        help="for an adapter of --load_in_4bit: merge into what the 4-bit weights stand for (the policy that was "
        "trained), or into the base's own weights (another policy; it is said by how much)",
    )
    add("--device", default="cpu", help="where both policies run (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace DIR if it is there")
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Merge, compare, report; a merge that is refused ends in one line and exit status 2, with nothing left behind."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    probe = None
    if args.dataset is not None:
        probe = Probe.from_dataset(args.dataset, load_action_config(args.adapter), args.rows)
    report = merge_adapter(
        args.adapter,
        args.output,
        probe=probe,
        dtype=None if args.dtype is None else DTYPES[args.dtype],
        base=args.base,
        tolerance=args.tolerance,
        qlora=args.qlora,
        device=args.device,
        overwrite=args.overwrite,
    )
    sys.stdout.write(f"{report.text()}saved to {args.output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
