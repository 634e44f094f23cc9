"""Statistics of long streams: rows a second, peak memory and the error of the quantiles, against two peers.

- `ours`: `RunningStats`, one pass, exact sums, a KLL sketch beyond a million rows.
- `numpy`: every row in memory, then `numpy.quantile`.
- `histogram`: the running histogram of the field, written for this comparison from its description: 5000 bins from the
  smallest to the largest number so far; where a batch goes beyond, the bins are spread anew and each old count moves to the
  bin of its left edge (as openpi's `shared/normalize.py` and lerobot's `datasets/compute_stats.py` do it).

Each method runs in a process of its own on the same generated stream; times are those of the CPU. Rank error: how far the share of rows below the
value that is called q01, q50 or q99 is from 0.01, 0.5 and 0.99, the largest of all dimensions. Width: the width of
[q01, q99] over the true one, in the dimension where it is most wrong.

    python benchmarks/stats.py --quick
    python benchmarks/stats.py --rows 100000000 --methods ours --streams iid
    python benchmarks/stats.py --envelope ./my_robot
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

from hf_vla_actions.actions import RunningStats
from hf_vla_actions.data.number_stream import open_numbers
from hf_vla_actions.data.stats_repair import envelope

BLOCK = 65_536
QUANTILES = (0.01, 0.5, 0.99)
STREAMS = ("iid", "drifting", "heavy", "sorted")
METHODS = ("ours", "numpy", "histogram")


def blocks(stream: str, rows: int, dims: int):
    """Generated rows in blocks (n, dims) float64; the same whenever they are asked for."""
    rng = np.random.default_rng(0)
    for start in range(0, rows, BLOCK):
        n = min(BLOCK, rows - start)
        x = rng.normal(size=(n, dims))
        if stream == "drifting":
            x += 20.0 * start / rows
        elif stream == "heavy":
            x = x / np.abs(rng.normal(size=(n, dims))) ** 0.5  # a tail like 1 / x**2
        elif stream == "sorted":
            x = (start + np.arange(n)[:, None]) / rows * np.arange(1, dims + 1)
        yield x


class Numpy:
    """All rows in memory."""

    def __init__(self, rows: int, dims: int):
        self.parts: list[np.ndarray] = []

    def update(self, x: np.ndarray) -> None:
        """Take in one block."""
        self.parts.append(x)

    def result(self) -> np.ndarray:
        """Quantiles of every dimension, (3, dims)."""
        rows = np.concatenate(self.parts)
        rows.mean(0), rows.std(0), rows.min(0), rows.max(0)
        return np.quantile(rows, QUANTILES, axis=0)


class Histogram:
    """Bins that stretch with the range seen so far."""

    def __init__(self, rows: int, dims: int, bins: int = 5000):
        self.bins, self.count = bins, 0
        self.sum = self.square = np.zeros(dims)
        self.low = self.high = np.zeros(0)
        self.edges: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []

    def update(self, x: np.ndarray) -> None:
        """Take in one block."""
        self.count += len(x)
        self.sum, self.square = self.sum + x.sum(0), self.square + (x * x).sum(0)
        low, high = x.min(0), x.max(0)
        if not self.edges:
            self.low, self.high = low, high
            self.edges = [np.linspace(a - 1e-10, b + 1e-10, self.bins + 1) for a, b in zip(low, high, strict=True)]
            self.counts = [np.zeros(self.bins) for _ in low]
        elif (low < self.low).any() or (high > self.high).any():
            self.low, self.high = np.minimum(low, self.low), np.maximum(high, self.high)
            for i, (a, b) in enumerate(zip(self.low, self.high, strict=True)):
                edges = np.linspace(a, b, self.bins + 1)
                self.counts[i] = np.histogram(self.edges[i][:-1], bins=edges, weights=self.counts[i])[0]
                self.edges[i] = edges
        for i, column in enumerate(x.T):
            self.counts[i] += np.histogram(column, bins=self.edges[i])[0]

    def result(self) -> np.ndarray:
        """Quantiles of every dimension, (3, dims)."""
        found = [
            [edges[np.searchsorted(np.cumsum(counts), q * self.count)] for q in QUANTILES]
            for edges, counts in zip(self.edges, self.counts, strict=True)
        ]
        return np.array(found).T


class Ours:
    """One pass."""

    def __init__(self, rows: int, dims: int):
        self.stats = RunningStats(dims)

    def update(self, x: np.ndarray) -> None:
        """Take in one block."""
        self.stats.update(x)

    def result(self) -> np.ndarray:
        """Quantiles of every dimension, (3, dims)."""
        return np.asarray((self.stats.quantile(QUANTILES), self.stats.mean, self.stats.std)[0])


def run_one(method: str, stream: str, rows: int, dims: int) -> dict:
    """What one process measures: seconds of CPU in the method, peak memory, quantiles, errors of rank."""
    make = {"ours": Ours, "numpy": Numpy, "histogram": Histogram}[method]
    warm = make(10, dims)
    warm.update(np.random.default_rng(1).normal(size=(1000, dims)))
    warm.result()
    start_mb = peak_mb()
    method_of = make(rows, dims)
    seconds = 0.0
    for x in blocks(stream, rows, dims):
        begin = time.process_time()
        method_of.update(x)
        seconds += time.process_time() - begin
    begin = time.process_time()
    values = method_of.result()
    seconds += time.process_time() - begin
    facts = {"seconds": seconds, "peak_mb": peak_mb(), "start_mb": start_mb, "values": values.tolist()}
    below, upto = (np.zeros(values.shape, dtype=np.int64) for _ in range(2))
    for x in blocks(stream, rows, dims):
        below += (x < values[:, None]).sum(axis=1)
        upto += (x <= values[:, None]).sum(axis=1)
    q = np.array(QUANTILES)[:, None]
    error = np.maximum(0, np.maximum(below / rows - q, q - upto / rows))
    return {**facts, "rank_error": error.max(axis=1).tolist()}


def peak_mb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(args: argparse.Namespace) -> None:
    """Run every method on every stream and print the table."""
    print(f"{args.rows} rows of {args.dims} numbers, blocks of {BLOCK}; peak memory of the whole process")
    print(
        f"{'stream':<10}{'method':<11}{'Mrows/s':>9}{'peak MB':>9}{'rank error q01':>16}{'q50':>10}{'q99':>10}{'width':>9}"
    )
    for stream in args.streams:
        found = {}
        for method in args.methods:
            command = [sys.executable, __file__, "--one", method, stream, str(args.rows), str(args.dims)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[method] = json.loads(done.stdout.splitlines()[-1])
        widths = {name: np.subtract(facts["values"][2], facts["values"][0]) for name, facts in found.items()}
        for name, facts in found.items():
            ratio = widths[name] / widths["numpy"] if "numpy" in widths else np.full(args.dims, np.nan)
            worst = ratio[np.argmax(np.abs(ratio - 1))]
            errors = facts["rank_error"]
            print(
                f"{stream:<10}{name:<11}{args.rows / facts['seconds'] / 1e6:>9.2f}{facts['peak_mb']:>9.0f}"
                f"{errors[0]:>16.1e}{errors[1]:>10.1e}{errors[2]:>10.1e}{worst:>9.4f}",
                flush=True,
            )
        if "numpy" in found and "ours" in found:
            time_ratio = found["ours"]["seconds"] / found["numpy"]["seconds"]
            print(
                f"{'':<10}ours / numpy: {time_ratio:.2f} x time, {found['ours']['peak_mb'] / found['numpy']['peak_mb']:.2f} x memory"
            )


def show_envelope(path: str) -> None:
    """LeRobot's rule for q01 and q99 against the true quantiles of all rows."""
    stream = open_numbers(path)
    episodes = [
        vectors[stream.action_key] for _, vectors in stream.episodes(stream.files, [stream.action_key], (1, 1))
    ]
    rule, true = envelope(episodes), np.quantile(np.concatenate(episodes), [0.01, 0.99], axis=0)
    old, new = np.ptp(rule, axis=0), np.ptp(true, axis=0)
    moving = new > 0
    names = stream.names(stream.action_key) or list(range(len(new)))
    print(f"{path}: {len(episodes)} episodes; width of [q01, q99] by LeRobot's rule over the true width")
    for i in np.flatnonzero(moving):
        print(f"  {names[i]!s:<16}{old[i]:>10.5g}{new[i]:>10.5g}{old[i] / new[i]:>8.3f}")
    factors = old[moving] / new[moving]
    print(
        f"  median {np.median(factors):.3f}, largest {factors.max():.3f}; {int((~moving).sum())} constant dimensions left out"
    )


def main() -> int:
    """Options to runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dims", type=int, default=7)
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="200,000 rows")
    parser.add_argument("--envelope", nargs="+", metavar="DATASET", help="LeRobot's rule on real data instead")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        method, stream, rows, dims = args.one
        print(json.dumps(run_one(method, stream, int(rows), int(dims))))
        return 0
    if args.envelope:
        for path in args.envelope:
            show_envelope(path)
        return 0
    if args.quick:
        args.rows = 200_000
    compare(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
