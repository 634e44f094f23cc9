"""What the demo's policy learns when each word is a token, instead of each sentence: the same run, the same judgement.

python benchmarks/demo_words.py --output_dir outputs/words [--quick] [--seed 0]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from hf_vla_actions.demo.run import FULL, QUICK, run_demo


def main() -> None:
    """Run the demo with one token a word and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = replace(QUICK if args.quick else FULL, split_words=True)
    print(run_demo(Path(args.output_dir), settings, seed=args.seed))


if __name__ == "__main__":
    main()
