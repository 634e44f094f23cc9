"""`hf-vla demo`: see `main`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from hf_vla_actions.demo.run import FULL, QUICK, run_demo
from hf_vla_actions.errors import one_line_errors

EPILOG = """\
example:
  hf-vla demo --output_dir outputs/demo
  hf-vla demo --output_dir outputs/quick --quick

The world is a toy that everything can be learned and judged in within minutes; it is no robot benchmark.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="hf-vla demo",
        description="Make demonstrations, fine-tune a tiny vision-language model from scratch, judge it in closed loop "
        "free and under limits in meters, save it and load it back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "--output_dir", default="outputs/demo", help="new folder for everything (default: %(default)s)"
    )
    options.add_argument("--quick", action="store_true", help="a smaller run that only shows the path, under 90 s")
    options.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    options.add_argument(
        "--augment_limits",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the demonstrations whose expert obeys a random step limit (default: %(default)s)",
    )
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the demo and print its table."""
    args = parser().parse_args(argv)
    settings = replace(QUICK if args.quick else FULL, augment_limits=args.augment_limits)
    sys.stdout.write(run_demo(Path(args.output_dir), settings, seed=args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
