"""What a chunk costs with each head on the same backbone, what it is worth, and the control period that follows.

    python benchmarks/heads.py --policies outputs/multimodal --multimodal multimodal.json --output heads.json
    python benchmarks/heads.py --output quick.json --quick

1. The policies that `multimodal.py` kept (run it first; with `--quick` it is done here, hardly trained): milliseconds of
   `predict_action` for one observation, the policies taking turns, so that the machine is the same for all; medians, and
   ratios to autoregressive bins. It is the processor's time, one thread, which on an idle core is the time that passes, and
   elsewhere does not count what other programs do. Beside them the clean success in closed loop over all walls and seeds,
   for flow matching with 1, 2, 4 and 10 steps and diffusion with 5 and 20 (those that were trained three times longer): what
   speed costs. With an `--output` that is there already only the times are measured again.
2. The same on a larger backbone with random weights, a prompt of 64 words and 7 numbers an action, where the model and not
   Python is what takes time. How many tokens FAST takes there says nothing about a trained policy, so it is left out.

Control periods: a robot that asks within a period needs one as long as the inference. Beside execution (`AsyncPolicy`,
real-time chunking) inference may take d periods, as long as d <= s <= horizon - d for s executed steps (arXiv 2506.07339): the
period is then the latency over min(s, horizon - s). `heads.json` beside this file was measured with it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import multimodal
import numpy as np
import torch
from multimodal_training import HEADS, LONGER, NAMES, backbone, predictor, tokenizer_of
from multimodal_world import HORIZON, KEY, Setting, demonstrate, judge, words
from tokens import commit
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from hf_vla_actions import (
    ActionConfig,
    ActionSpace,
    ActionStats,
    ActionVocabulary,
    AutoModelForActionPrediction,
    NormStats,
    UniformActionTokenizer,
    VQActionTokenizer,
    to_vla,
)

REFERENCE = "bins"
STEPS = {"flow, 3x longer": (1, 2, 4, 10), "diffusion, 3x longer": (5, 20)}
POLICIES = [next((longer for longer in STEPS if LONGER[longer] == name), name) for name in NAMES]
LARGER = {"width": 512, "layers": 8, "heads": 8}
DOF, PROMPT = 7, 64


def variants(names: Sequence[str] = POLICIES) -> list[tuple[str, str, dict[str, int]]]:
    """Each line of the table: its name, the policy, and options of `predict_action`."""
    out: list[tuple[str, str, dict[str, int]]] = []
    for name in names:
        short = LONGER.get(name, name)
        for n in STEPS.get(name, ()):
            out.append((f"{short}, {n} step{'s' * (n > 1)}", name, {"num_steps": n}))
        if name not in STEPS:
            out.append((name, name, {}))
    return out


def time_of(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, of the processor; all of them in turn, so that they share what it is doing."""
    took: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds + 1):
        for label, call in calls.items():
            begin = time.process_time()
            call()
            took[label].append(1000 * (time.process_time() - begin))
    return {label: float(np.median(times[1:])) for label, times in took.items()}


def load(folder: Path, name: str, seed: int) -> Any:
    """A policy that `multimodal.py` kept."""
    path = folder / multimodal.folder_name(name, seed)
    return AutoModelForActionPrediction.from_pretrained(path, self_test=False).eval()


def trained(folder: Path, setting: Setting, rounds: int) -> dict[str, float]:
    """Milliseconds of the trained policies of seed 0, for one observation at the beginning of an episode."""
    told = demonstrate(setting, 0, 1).sentences[0]
    calls: dict[str, Callable[[], Any]] = {}
    for label, name, options in variants():
        policy = load(folder, name, 0)
        inputs = policy.prepare(None, told)
        calls[label] = lambda policy=policy, inputs=inputs, options=options: policy.predict_action(**inputs, **options)
    return time_of(calls, rounds)


def larger(setting: Setting, rounds: int, sizes: dict[str, int]) -> dict[str, float]:
    """Milliseconds on a larger backbone that has learned nothing."""
    space = ActionSpace.unnamed(DOF)
    stats = NormStats({KEY: {"action": ActionStats.from_ranges([-1.0] * DOF, [1.0] * DOF), "proprio": None}})
    vq = VQActionTokenizer(DOF, HORIZON, n_codebooks=4, codebook_size=64)
    vq.fit(np.random.default_rng(0).uniform(-1, 1, (256, HORIZON, DOF)), steps=3, progress=False)
    coders = {"bins": UniformActionTokenizer(256), "VQ": vq}
    calls: dict[str, Callable[[], Any]] = {}
    made: dict[str, Any] = {}
    for label, name, options in variants([name for name in POLICIES if name not in ("FAST", "regression, MSE")]):
        if name not in made:
            tokenizer = tokenizer_of(words(setting))
            model = backbone(tokenizer, 0, **sizes)
            common: dict[str, Any] = {"horizon": HORIZON, "prompt": " {instruction}"}
            if (short := LONGER.get(name, name)) in HEADS:
                head = replace(HEADS[short], dof=DOF)
                config = ActionConfig(None, None, stats, {KEY: space}, head=head, **common)
            else:
                vocabulary = ActionVocabulary.append(tokenizer, coders[name].n_codes)
                config = ActionConfig(coders[name], vocabulary, stats, {KEY: space}, **common)
            made[name] = to_vla(model, tokenizer, config).eval()
        policy = made[name]
        inputs = policy.prepare(None, " ".join(["detour"] * PROMPT))
        calls[label] = lambda policy=policy, inputs=inputs, options=options: policy.predict_action(**inputs, **options)
    return time_of(calls, rounds)


def worth(content: dict[str, Any], folder: Path, setting: Setting) -> dict[str, dict[str, Any]]:
    """Clean successes at each wall of each variant, over the seeds that were trained; new ones are judged here."""
    found: dict[str, dict[str, Any]] = {}
    for label, name, options in variants():
        rows = [row for row in content["rows"] if row["name"] == name]
        default = HEADS[LONGER[name]].steps if name in STEPS else None  # type: ignore[attr-defined]
        clean = []
        for row in rows:
            walls = row["walls"]
            if options.get("num_steps") != default:
                set_seed(row["seed"])
                policy = load(folder, name, row["seed"])
                walls = [asdict(one) for one in judge(predictor(policy, **options), setting, label)]
            clean.append([len(wall["clean"]) for wall in walls])
        found[label] = {"clean": clean, "episodes_a_wall": rows[0]["walls"][0]["episodes"]}
    return found


def _worth_before(path: Path, content: dict[str, Any]) -> dict[str, Any] | None:
    """What the file holds already, if it is of the same setting: only times are measured again."""
    if not path.exists():
        return None
    before = json.loads(path.read_text(encoding="utf-8"))
    return before["worth"] if before["setting"] == json.loads(json.dumps(content["setting"])) else None


def period(ms: float, setting: Setting) -> float:
    """Milliseconds of the shortest control period beside execution."""
    return ms / min(setting.execute, HORIZON - setting.execute)


def table(content: dict[str, Any], setting: Setting) -> str:
    """Markdown for the README."""
    head = ["head", "ms a chunk", "against bins", "clean success", "period, waiting", "period, beside execution"]
    head += ["larger backbone, ms", "against bins"]
    lines = [head, ["---"] * len(head)]
    small, big = content["ms"], content["larger"]["ms"]
    for label, ms in small.items():
        clean = np.array(content["worth"][label]["clean"])
        share = clean.mean() / content["worth"][label]["episodes_a_wall"]
        cells = [label, f"{ms:.1f}", f"{ms / small[REFERENCE]:.2f}x", f"{share:.2f}"]
        cells += [f"{ms:.0f} ms", f"{period(ms, setting):.1f} ms"]
        cells += [f"{big[label]:.0f}", f"{big[label] / big[REFERENCE]:.3f}x"] if label in big else ["", ""]
        lines.append(cells)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the file and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", required=True, type=Path, help="JSON file; successes in it are kept")
    options.add_argument("--multimodal", type=Path, help="JSON file of multimodal.py")
    options.add_argument("--policies", type=Path, help="folder in which multimodal.py kept its policies")
    options.add_argument("--rounds", type=int, default=15, help="of timing (default: %(default)s)")
    options.add_argument("--quick", action="store_true", help="hardly trained policies, two episodes: a smoke test")
    args = options.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    setting, sizes, rounds = Setting(), LARGER, args.rounds
    if args.quick:
        setting, sizes, rounds = multimodal.QUICK, {"width": 64, "layers": 1, "heads": 4}, 1
        args.multimodal = args.output.with_name(f"{args.output.stem}_multimodal.json")
        args.policies = args.multimodal.with_suffix("")
        multimodal.main(["--quick", "--output", str(args.multimodal), "--seeds", "0", "--only", *POLICIES])
    if args.multimodal is None or args.policies is None:
        options.error("--multimodal and --policies say what multimodal.py has made; or use --quick")
    measured = json.loads(args.multimodal.read_text(encoding="utf-8"))
    content: dict[str, Any] = {"commit": commit(), "setting": asdict(setting), "rounds": rounds}
    content["ms"] = trained(args.policies, setting, rounds)
    content["larger"] = {**sizes, "prompt": PROMPT, "dof": DOF, "ms": larger(setting, rounds, sizes)}
    content["worth"] = _worth_before(args.output, content) or worth(measured, args.policies, setting)
    temporary = args.output.with_name(args.output.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, args.output)
    print(table(content, setting))


if __name__ == "__main__":
    main()
