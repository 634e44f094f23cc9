"""Ways to write a chunk in tokens, compared in the demo's world: uniform bins, FAST and VQ, how many bins, and in what order.

    python benchmarks/tokens.py --output tokens.json [--policies outputs/tokens] [--seeds 2] [--only "256 bins" FAST]
    python benchmarks/tokens.py --output quick.json --quick

Every row is one policy: the same backbone for a seed, the same demonstrations in the same order, the same number of
steps, judged on the same unseen episodes (8 actions predicted, 4 carried out). Rows that the file already holds are not
measured again. See `tokens_world.py` for the
task and `tokens_training.py` for what the backbone learns before. Tables:

1. success in closed loop, tokens and ms a chunk, and how many chunks are no chunks where the model says what it likes
   (greedy, and sampled at temperature 1), against none with its processor; what a repair or zeros do instead.
2. 64 to 512 bins: loss a token; loss a number as a density in mm, which does not depend on the width of the bins; success.
3. one number after the other, or all at once: loss a dimension, success, and how far one wrong first number moves the rest.
4. action tokens shared by all dimensions, or a block for each: loss at equal steps, and the cost of the larger softmax.

Standard errors and p are of the episodes. Trainings this short differ by more than that: with several seeds the success of
each stands beside the mean, and what one seed says of two rows another may deny. `tokens.json` beside this file was
measured with it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from tokens_tables import tables
from tokens_training import (
    Bench,
    close_the_loop,
    forced_first,
    free_tokens,
    learn,
    losses,
    parallel_chunks,
    representation_error,
    success_row,
)
from tokens_world import DOF, HORIZON, KEY, MOVING, Setting
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from hf_vla_actions import AutoModelForActionPrediction, FASTActionTokenizer, VLAActionsError

REFERENCE, PARALLEL, BLOCKS = "256 bins", "256 bins, parallel", "256 bins, per dimension"
NAMES = (REFERENCE, "FAST", "VQ", "64 bins", "512 bins", PARALLEL, BLOCKS, "128 bins")
QUICK = Setting(demonstrations=12, held_out=3, sight=2, steps=3, batch_size=4, judged=2, max_steps=4)


def read_chunks(config, rows: Sequence[np.ndarray], fallback: str = "") -> tuple[np.ndarray, np.ndarray, int]:
    """Chunks (n, HORIZON, DOF) of what a model said, which of them were none, and how many no repair could save.

    Args:
        config: ActionConfig of the policy.
        rows: token ids of each, up to the closing token.
        fallback: for what is no chunk: "repair" as `decode(strict=False)` does, "zeros" as the reference.
    """
    chunks, broken, lost = np.zeros((len(rows), HORIZON, DOF)), np.zeros(len(rows), bool), 0
    for i, ids in enumerate(rows):
        try:
            if isinstance(config.tokenizer, FASTActionTokenizer):
                chunks[i] = config.decode([ids], KEY)[0][0]
            else:
                chunks[i] = config.decode_codes([config.vocabulary.to_codes(ids)], KEY)[0]
        except VLAActionsError:
            broken[i] = True
            if fallback == "repair":
                try:
                    known = ids[config.vocabulary.find(ids)]
                    chunks[i] = config.tokenizer.repair([config.vocabulary.to_codes(known)], HORIZON, DOF)[0][0]
                except VLAActionsError:
                    lost += 1
    return config.space(KEY).settle(config.stats(KEY).unnormalize(chunks)), broken, lost


class Judge:
    """What is measured of a trained policy.

    Args:
        bench: the demonstrations.
        policy: trained.
        seed: of the training; sampling starts from it.
    """

    def __init__(self, bench: Bench, policy, seed: int):
        self.bench, self.policy, self.seed = bench, policy, seed

    def prepare(self, observations: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Inputs of a batch of observations."""
        return self.policy.prepare([o["images"] for o in observations], [o["instruction"] for o in observations])

    def closed_loop(self, name: str, parallel: bool) -> dict[str, Any]:
        """Success with the processor; tokens a chunk."""
        tokens: list[int] = []

        def predict(observations: list[dict[str, Any]]) -> np.ndarray:
            inputs = self.prepare(observations)
            if parallel:
                return parallel_chunks(self.policy, inputs)
            out = self.policy.predict_action(**inputs, return_dict=True)
            end = self.policy.action_config.vocabulary.end_token_id
            tokens.extend((out.token_ids != end).sum(axis=1).tolist())
            return out.actions

        row = success_row(close_the_loop(predict, self.bench.setting, name))
        return {**row, "tokens_per_chunk": float(np.mean(tokens)) if tokens else HORIZON * DOF}

    def without_processor(self, name: str, fallback: str) -> dict[str, Any]:
        """Success where the model says what it likes and a fallback takes what is no chunk."""
        count = {"chunks": 0, "malformed": 0, "lost": 0}

        def predict(observations: list[dict[str, Any]]) -> np.ndarray:
            rows = free_tokens(self.policy, self.prepare(observations))
            chunks, broken, lost = read_chunks(self.policy.action_config, rows, fallback)
            for key, value in zip(count, (len(rows), int(broken.sum()), lost), strict=True):
                count[key] += value
            return chunks

        return {**success_row(close_the_loop(predict, self.bench.setting, f"{name}, {fallback}")), **count}

    def malformed(self) -> dict[str, Any]:
        """What the model says by itself on held-out pictures, greedy and sampled, read strictly; mm against the data."""
        config, (prompts_of_all, actions) = self.policy.action_config, self.bench.some(256)
        found: dict[str, Any] = {"chunks": len(actions)}
        for how, options in {"greedy": {}, "sampled": {"do_sample": True}}.items():
            set_seed(self.seed)
            rows, kept = [], []
            for at in torch.arange(len(actions)).split(128):
                prompts = {name: value[at] for name, value in prompts_of_all.items()}
                rows += free_tokens(self.policy, prompts, **options)
                kept.append(self.policy.predict_action(**prompts, **options))  # raises if anything is no chunk
            broken = read_chunks(config, rows)[1]
            found[how] = {"malformed": int(broken.sum()), "with_processor": 0}
            if isinstance(config.tokenizer, FASTActionTokenizer) and broken.any():
                where = np.flatnonzero(broken)
                bad, true = [rows[i] for i in where], actions[where]
                repaired, _, lost = read_chunks(config, bad, "repair")
                zeros = read_chunks(config, bad)[0]
                ways = {"repaired_mm": repaired, "zeros_mm": zeros, "with_processor_mm": np.concatenate(kept)[where]}
                found[how] |= {key: float(1000 * np.abs(x - true)[..., MOVING].mean()) for key, x in ways.items()}
                found[how]["lost"] = lost
        return found


def measure(bench: Bench, name: str, seed: int, folder: Path | None) -> dict[str, Any]:
    """Train the policy of that name and measure everything of it."""
    begin, parallel = time.monotonic(), name == PARALLEL
    tokenizer = bench.fit(name, seed)
    policy = bench.policy(tokenizer, seed, "per_dimension" if name == BLOCKS else "append")
    row: dict[str, Any] = {"name": name, "seed": seed, "action_tokens": policy.action_config.vocabulary.token_ids.size}
    row["representation_error_mm"] = representation_error(tokenizer, bench)
    row["curve"] = learn(policy, bench, seed, f"{name}, seed {seed}", parallel=parallel)
    row["train_seconds"] = time.monotonic() - begin
    row |= losses(policy, bench, parallel)
    judge = Judge(bench, policy, seed)
    row |= judge.closed_loop(name, parallel)
    if name in (REFERENCE, "FAST", "VQ"):
        row["free"] = judge.malformed()
    if name == "FAST":
        row["unmasked"] = {what: judge.without_processor(name, what) for what in ("repair", "zeros")}
    if name in (REFERENCE, "64 bins"):
        row["forced"] = forced_first(policy, bench.some(200)[0])
    if folder is not None:
        policy.save_pretrained(folder / f"{name.replace(',', '').replace(' ', '_')}_{seed}")
    row["seconds"] = time.monotonic() - begin
    return row


def timing(bench: Bench, folder: Path, seed: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of `predict_action` for one picture, the policies taking turns; medians, and ratios to bins."""
    took: dict[str, list[float]] = {}
    policies = {}
    for name in (REFERENCE, "FAST", "VQ"):
        path = folder / f"{name.replace(' ', '_')}_{seed}"
        policies[name] = AutoModelForActionPrediction.from_pretrained(path, self_test=False).eval()
    for i in range(rounds + 2):
        at = torch.tensor([i % len(bench.held_out)])
        prompts = {name: value[at] for name, value in bench.held_out.prompts.items()}
        for name, policy in policies.items():
            begin = time.perf_counter()
            policy.predict_action(**prompts)
            took.setdefault(name, []).append(1000 * (time.perf_counter() - begin))
    ms = {name: float(np.median(times[2:])) for name, times in took.items()}
    return {"name": "timing", "seed": seed, "ms": ms, "ratio": {name: ms[name] / ms[REFERENCE] for name in ms}}


def softmax_cost(rounds: int, words: int = 32_000, rows: int = 8 * 56, hidden: int = 512) -> dict[str, Any]:
    """Milliseconds of the last layer and its cross entropy, forward and backward, with 256 and with 7 x 256 more words."""
    more = {"256": 256, "1792": DOF * 256}
    layers = {name: torch.nn.Linear(hidden, words + n, bias=False) for name, n in more.items()}
    x = torch.randn(rows, hidden, requires_grad=True)
    best = {what: dict.fromkeys(more, float("inf")) for what in ("forward", "training")}
    for _ in range(rounds):
        for name, layer in layers.items():
            labels = torch.randint(words, words + more[name], (rows,))
            begin = time.perf_counter()
            loss = torch.nn.functional.cross_entropy(layer(x), labels)
            middle = time.perf_counter()
            loss.backward()
            best["forward"][name] = min(best["forward"][name], 1000 * (middle - begin))
            best["training"][name] = min(best["training"][name], 1000 * (time.perf_counter() - begin))
    ratios = {f"{what}_ratio": ms["1792"] / ms["256"] for what, ms in best.items()}
    return {"name": "softmax", "seed": 0, "words": words, "rows": rows, "hidden": hidden, "ms": best, **ratios}


def commit() -> str:
    """The commit of the repository this file lies in; "unknown" outside of one."""
    run = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


class Results:
    """The JSON file of the rows.

    Args:
        path: rows of another setting in it are refused.
        setting: how much of everything.
    """

    def __init__(self, path: Path, setting: Setting):
        self.path = path
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        machine["threads"] = torch.get_num_threads()
        self.content: dict[str, Any] = {"setting": asdict(setting), "commit": commit(), "machine": machine, "rows": []}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content["setting"] != asdict(setting):
                raise SystemExit(
                    f"{path} holds rows of another setting, {self.content['setting']}: choose another file"
                )

    def has(self, name: str, seed: int) -> bool:
        """Whether a row is there."""
        return any((row["name"], row["seed"]) == (name, seed) for row in self.content["rows"])

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write the file."""
        self.content["rows"].append(row)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        os.replace(temporary, self.path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", required=True, type=Path, help="JSON file of the rows; finished ones are kept")
    options.add_argument("--policies", type=Path, help="folder to keep the policies in (default: beside the output)")
    options.add_argument("--seeds", type=int, default=1, help="trainings of each row (default: %(default)s)")
    options.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="rows (default: all)")
    options.add_argument("--steps", type=int, default=Setting.steps, help="of each training (default: %(default)s)")
    options.add_argument("--quick", action="store_true", help="hardly trained policies, two episodes: a smoke test")
    args = options.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    setting = QUICK if args.quick else Setting(steps=args.steps)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = Results(args.output, setting)
    folder = args.policies or args.output.with_suffix("")
    bench = None
    for seed in range(args.seeds):
        missing = [name for name in args.only if not results.has(name, seed)]
        if missing:
            bench = bench or Bench(setting)
            error = bench.learn_to_see(seed, folder)
            if not results.has("sight", seed):
                results.add({"name": "sight", "seed": seed, "error_mm": error})
        for name in missing:
            row = measure(bench, name, seed, folder)  # type: ignore[arg-type]
            results.add(row)
            print(f"{name}, seed {seed}: success {row['success']:.2f}, {row['seconds']:.0f} s", flush=True)
    if not results.has("softmax", 0):
        results.add(softmax_cost(1, words=500) if args.quick else softmax_cost(15))
    if all(results.has(name, 0) for name in (REFERENCE, "FAST", "VQ")) and not results.has("timing", 0):
        results.add(timing(bench or Bench(setting), folder, 0, 2 if args.quick else 40))
    print(tables(results.content["rows"]))


if __name__ == "__main__":
    main()
