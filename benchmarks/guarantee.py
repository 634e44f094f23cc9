"""Try to break the promise of constrained decoding: random specifications against an adversarial sampler.

    python benchmarks/guarantee.py --rows 100000      dead ends, violations (masks, transport, projection)
    python benchmarks/guarantee.py --enumerate 150    every chunk of small grids: unsound tokens, completeness

Uses the generator and the oracle of `tests/`, which share nothing with the package. Exit code 1 if anything is found.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from random_specs import KINDS
from survey import Tally, attack, enumerate_case

SIZES = ((6, 2, 3), (6, 2, 2), (4, 3, 2), (4, 2, 3))


def one_attack(rows, project, job):
    """One specification; `job` is its kind and seed."""
    torch.set_num_threads(1)
    name, seed = job
    return name, attack(name, seed, rows, ("mask", "transport")[seed % 2], project)


def one_enumeration(job):
    """One small grid; `job` is the kind of specification and its seed."""
    torch.set_num_threads(1)
    name, seed = job
    return name, enumerate_case(name, seed, SIZES[seed % len(SIZES)])


def run(work, jobs, processes):
    """Tallies by kind."""
    tallies = {}
    if processes == 1:
        results = map(work, jobs)
        for name, tally in results:
            tallies[name] = tallies.get(name, Tally()) + tally
        return tallies
    with ProcessPoolExecutor(processes) as pool:
        for name, tally in pool.map(work, jobs, chunksize=8):
            tallies[name] = tallies.get(name, Tally()) + tally
    return tallies


def show(tallies, columns):
    """A table of counts, one kind a row, and what was found."""
    tallies = {**tallies, "TOTAL": sum(tallies.values(), Tally())}
    print("| kind | " + " | ".join(columns) + " |")
    print("|" + "---|" * (len(columns) + 1))
    for name, tally in tallies.items():
        cells = [f"{tally.completeness:.4f}" if c == "completeness" else str(tally.counts[c]) for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")
    for failure in tallies["TOTAL"].failures:
        print(failure)
    return tallies["TOTAL"].bad()


def main():
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows to decode, over all kinds")
    parser.add_argument("--batch", type=int, default=64, help="rows of one specification")
    parser.add_argument("--project", type=int, default=32, help="chunks to project for each specification")
    parser.add_argument("--enumerate", type=int, default=0, metavar="N", help="enumerate N instances of each kind")
    parser.add_argument("--kinds", nargs="*", default=None, choices=sorted(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    kinds = options.kinds or list(KINDS)
    if options.enumerate:
        seeds = range(options.seed, options.seed + options.enumerate)
        tallies = run(one_enumeration, [(name, seed) for name in kinds for seed in seeds], options.processes)
        columns = ["specs", "truly feasible", "feasible", "wrongly refused", "unsound", "dead end", "error"]
        found = show(tallies, [*columns, "feasible tokens", "completeness"])
        raise SystemExit(found > 0)
    tallies, seed = {}, options.seed
    while sum(tally.counts["rows"] for tally in tallies.values()) < options.rows:
        jobs = [(name, s) for s in range(seed, seed + 8) for name in kinds]
        for name, tally in run(partial(one_attack, options.batch, options.project), jobs, options.processes).items():
            tallies[name] = tallies.get(name, Tally()) + tally
        seed += 8
        if all(tally.counts["rows"] == 0 for tally in tallies.values()) and seed - options.seed > 64:
            break
    columns = ["specs", "feasible", "refused", "rows", "dead end", "violation", "projected rows"]
    raise SystemExit(show(tallies, [*columns, "projection", "projection refused", "error"]) > 0)


if __name__ == "__main__":
    main()
