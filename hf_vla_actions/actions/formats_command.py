"""`hf-vla convert-stats`: see `main`."""

from __future__ import annotations

import argparse
import logging
import sys

from hf_vla_actions.actions.formats import FORMATS, read_stats, write_stats
from hf_vla_actions.actions.stats import MODES
from hf_vla_actions.errors import one_line_errors

EPILOG = """\
example:
  hf-vla convert-stats ./my_robot dataset_statistics.json --to openvla

IN is a statistics file, or the folder of a dataset, checkpoint or policy; its format is found by its content. What the
other format cannot hold is an error, and with --lossy a warning. Formats:
"""
UNNAMED = "(a dataset without a name)"


def parser() -> argparse.ArgumentParser:
    """The options."""
    lines = "\n".join(f"  {name:<17}{kind.about}" for name, kind in FORMATS.items())
    options = argparse.ArgumentParser(
        prog="hf-vla convert-stats",
        description="Convert statistics from one format of the field to another, and say what they mean.",
        epilog=EPILOG + lines,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = options.add_argument
    writable = [name for name, kind in FORMATS.items() if kind.write or kind.write_files]
    add("input", metavar="IN", help="file or folder to read")
    add("output", metavar="OUT", nargs="?", help="file or folder to write; without it, IN is only described")
    add("--to", choices=writable, metavar="FORMAT", help="format of OUT (default: openvla)")
    add("--format", choices=list(FORMATS), metavar="FORMAT", help="format of IN (default: by its content)")
    add("--key", help="unnorm_key: names a dataset that the file does not name, or chooses one of several")
    add("--mode", choices=MODES, help="how the statistics are used (default: what IN says, else its users' default)")
    add("--dof", type=int, help="dimensions of the action, for RoboVLMs' scalars")
    add("--lossy", action="store_true", help="write what the format can hold, and warn of the rest")
    return options


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Read, describe, write; what cannot be done ends in one line and exit status 2."""
    args = parser().parse_intermixed_args(argv)  # OUT may stand behind options
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    unnamed = UNNAMED if args.output is None else None
    file = read_stats(args.input, key=args.key, format=args.format, mode=args.mode, dof=args.dof, unnamed=unnamed)
    sys.stdout.write(file.description + "\n")
    if args.output is not None:
        target = args.to or "openvla"
        written = write_stats(file.stats, args.output, target, names=file.names, lossy=args.lossy)
        sys.stdout.write(f"written as {target}: {', '.join(map(str, written))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
