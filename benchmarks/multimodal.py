"""Two ways round a wall: what each head makes of demonstrations whose average runs into it, and from which wall on it matters.

    python benchmarks/multimodal.py --output multimodal.json [--policies outputs/multimodal] [--seeds 0 1 2] [--only bins flow]
    python benchmarks/multimodal.py --output quick.json --quick

Every row is one policy of one training seed, judged on the same unseen episodes at five walls: the same small Llama, the same
demonstrations of a seed in the same order, the same number of steps; 8 actions predicted, 4 carried out. Each seed has
demonstrations of its own. Three rows are there once more with three times the steps. `multimodal_world.py` says what the task
is, `multimodal_training.py` what the policies are.

Rows that the file already holds are not measured again, and several processes may add to one file, for example one a seed:

    for seed in 0 1 2; do nice python benchmarks/multimodal.py --output multimodal.json --seeds $seed & done

What is counted, of all episodes: clean (arrived, and the wall never stopped a move), touched (it stopped at least one,
whether or not the tool slid past it and arrived), left and right (where the tool passed the wall; the rest never did).
The interval beside a share is Wilson's 95 % over the episodes of all seeds; that trainings differ is seen in the seeds.
`multimodal.json` beside this file was measured with it.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from multimodal_training import LONGER, NAMES, TOKENS, Bench, learn, predictor
from multimodal_world import Setting, judge
from tokens import commit
from transformers import set_seed
from transformers.utils import logging as transformers_logging

ROWS = (*NAMES, *LONGER)
QUICK = Setting(blocked=(0.0, 0.07), demonstrations=4, steps=3, batch_size=4, judged=2, max_steps=6)


class Results:
    """The JSON file of the rows, to which several processes may add.

    Args:
        path: rows of another setting in it are refused.
        setting: how much of everything.
    """

    def __init__(self, path: Path, setting: Setting):
        self.path = path
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
        self.fresh = {"setting": json.loads(json.dumps(asdict(setting))), "commit": commit(), "machine": machine}
        if self.content["setting"] != self.fresh["setting"]:
            raise SystemExit(f"{path} holds rows of another setting, {self.content['setting']}: choose another file")

    @property
    def content(self) -> dict[str, Any]:
        """What the file holds now."""
        if self.path.exists():
            return json.loads(self.path.read_text(encoding="utf-8"))
        return {**self.fresh, "rows": []}

    def has(self, name: str, seed: int) -> bool:
        """Whether a row is there."""
        return any((row["name"], row["seed"]) == (name, seed) for row in self.content["rows"])

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write the file; one process at a time."""
        with open(self.path.with_name(self.path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.content
            content["rows"] = sorted([*content["rows"], row], key=lambda r: (ROWS.index(r["name"]), r["seed"]))
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_text(as_text(content), encoding="utf-8")
            os.replace(temporary, self.path)


def as_text(content: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    head = {name: value for name, value in content.items() if name != "rows"}
    rows = ",\n".join("  " + json.dumps(row) for row in content["rows"])
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n'


def measure(bench: Bench, name: str, folder: Path) -> dict[str, Any]:
    """Train the policy of that name and judge it; a policy of tokens greedy and, beside it, sampled."""
    begin = time.process_time()
    policy = bench.policy(name)
    row: dict[str, Any] = {"name": name, "seed": bench.seed, "loss": learn(policy, bench, name)}
    row["train_cpu_seconds"] = round(time.process_time() - begin, 1)
    set_seed(bench.seed)
    row["walls"] = [asdict(one) for one in judge(predictor(policy), bench.setting, name)]
    if name in TOKENS:
        sampled = judge(predictor(policy, do_sample=True), bench.setting, f"{name}, sampled")
        row["sampled"] = [asdict(one) for one in sampled]
    policy.save_pretrained(folder / folder_name(name, bench.seed))
    return row


def folder_name(name: str, seed: int) -> str:
    """Where a policy is kept."""
    return f"{name.replace(',', '').replace(' ', '_')}_{seed}"


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson 1927)."""
    z, share = 1.96, hits / n
    middle, half = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def policies(rows: Iterable[dict[str, Any]]) -> dict[str, list[list[dict[str, Any]]]]:
    """What was judged, by policy and training seed: its walls. What was sampled is a policy of its own."""
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(row["name"], []).append(row["walls"])
        if "sampled" in row:
            found.setdefault(f"{row['name']}, sampled", []).append(row["sampled"])
    return found


def count(seeds: Sequence[Sequence[dict[str, Any]]], wall: int, what: str) -> tuple[int, int]:
    """Episodes of all seeds at one wall: those that are counted, and all."""
    return sum(len(walls[wall][what]) for walls in seeds), sum(walls[wall]["episodes"] for walls in seeds)


def tables(content: dict[str, Any]) -> str:
    """Markdown: clean successes of each policy at each wall, then what happened at each."""
    blocked, found = content["setting"]["blocked"], policies(content["rows"])
    head = ["clean success", *(f"{1000 * b:.0f} mm blocked" for b in blocked), "seeds"]
    lines = [head, ["---"] * len(head)]
    for name, seeds in found.items():
        cells = []
        for wall in range(len(blocked)):
            hits, n = count(seeds, wall, "clean")
            low, high = wilson(hits, n)
            each = ", ".join(f"{len(walls[wall]['clean']) / walls[wall]['episodes']:.2f}" for walls in seeds)
            cells.append(f"{hits / n:.2f} ({low:.2f}..{high:.2f}; {each})")
        lines.append([name, *cells, str(len(seeds))])
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    for wall in range(len(blocked)):
        head = [
            f"{1000 * blocked[wall]:.0f} mm blocked",
            "clean",
            "touched",
            "arrived",
            "left",
            "right",
            "never passed",
        ]
        lines = [head, ["---"] * len(head)]
        for name, seeds in found.items():
            shares = {w: np.divide(*count(seeds, wall, w)) for w in ("clean", "touched", "arrived", "left", "right")}
            never = 1 - shares["left"] - shares["right"]
            lines.append([name, *(f"{share:.2f}" for share in (*shares.values(), abs(never)))])
        text += "\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", required=True, type=Path, help="JSON file of the rows; finished ones are kept")
    options.add_argument("--policies", type=Path, help="folder to keep the policies in (default: beside the output)")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training (default: %(default)s)")
    options.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, help="rows (default: all)")
    options.add_argument("--quick", action="store_true", help="hardly trained policies, two episodes: a smoke test")
    args = options.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    setting = QUICK if args.quick else Setting()
    results, folder = Results(args.output, setting), args.policies or args.output.with_suffix("")
    for seed in args.seeds:
        missing = [name for name in args.only if not results.has(name, seed)]
        bench = Bench(setting, seed) if missing else None
        for name in missing:
            row = measure(bench, name, folder)  # type: ignore[arg-type]
            results.add(row)
            clean = " ".join(f"{len(wall['clean']) / wall['episodes']:.2f}" for wall in row["walls"])
            print(f"{name}, seed {seed}: clean success {clean}, {row['train_cpu_seconds']} s", flush=True)
    print(tables(results.content))


if __name__ == "__main__":
    main()
