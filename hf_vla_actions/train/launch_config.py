"""`hf-vla launch-config`: ready configurations for `accelerate launch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hf_vla_actions.errors import one_line_errors

FOLDER = Path(__file__).with_name("configs")
EPILOG = """\
example, full fine-tuning spread over the eight GPUs of a machine:
  accelerate launch --config_file $(hf-vla launch-config fsdp2) -m hf_vla_actions.train \\
    --model_name_or_path M --dataset ./my_robot --output_dir ./policy --bf16

example, on four of them (options of accelerate launch win over the file):
  accelerate launch --config_file $(hf-vla launch-config multi_gpu) --num_processes 4 -m hf_vla_actions.train ...

The learning rates of the recipes are those of their published batch. With another batch (batch a device x accumulation
x processes) scale the rate with it, and warm up over the first few hundred steps (Goyal et al. 2017, arXiv 1706.02677).
"""


def launch_configs() -> dict[str, Path]:
    """Name to path of every configuration."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def parser() -> argparse.ArgumentParser:
    """The options."""
    names = launch_configs()
    options = argparse.ArgumentParser(
        prog="hf-vla launch-config",
        description="Print the path of a ready configuration for `accelerate launch --config_file`, or its content.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("name", choices=sorted(names), help="which one")
    options.add_argument("--show", action="store_true", help="print the content, to be changed and kept as your own")
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Print a path or a file."""
    args = parser().parse_args(argv)
    path = launch_configs()[args.name]
    sys.stdout.write(path.read_text(encoding="utf-8") if args.show else f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
