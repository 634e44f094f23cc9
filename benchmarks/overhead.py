"""What `predict_action` costs on top of bare `generate`, and what a batch saves over a loop: ratios of one run.

    python benchmarks/predict_action.py [--batch 8] [--horizon 1] [--repeats 20]

A tiny random LLaVA: the model itself takes little, so overheads show at their largest.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from hf_vla_actions import ActionConfig, ActionStats, ActionVocabulary, NormStats, UniformActionTokenizer, to_vla
from hf_vla_actions.constraints import Range
from hf_vla_actions.demo.tiny_vlm import build_tokenizer, build_vlm

SENTENCE = "move to the red block"


def make_policy(horizon: int):
    """A LLaVA policy with random weights."""
    model, processor = build_vlm(build_tokenizer([SENTENCE]))
    config = ActionConfig(
        UniformActionTokenizer(),
        ActionVocabulary.append(processor.tokenizer),
        NormStats({"robot": {"action": ActionStats.from_ranges([-0.03] * 7, [0.03] * 7)}}),
        horizon=horizon,
    )
    return to_vla(model, processor, config).eval()


def median_ms(function, repeats: int) -> float:
    """Median wall time of a call in milliseconds, after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--horizon", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    policy = make_policy(args.horizon)
    pictures = list(np.random.default_rng(0).integers(0, 256, (args.batch, 48, 48, 3), dtype=np.uint8))
    batch = policy.prepare(pictures, [SENTENCE] * args.batch)
    singles = [policy.prepare(picture, SENTENCE) for picture in pictures]
    limits = [Range("dim_0", -0.01, 0.01)]
    n_tokens = policy.action_config.n_tokens()

    @torch.no_grad()
    def bare():
        policy.generate(**batch, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False)

    bare_ms = median_ms(bare, args.repeats)
    rows = {"bare generate": bare_ms, "free": median_ms(lambda: policy.predict_action(**batch), args.repeats)}
    for mode in ("project", "transport", "mask"):
        rows[mode] = median_ms(
            lambda mode=mode: policy.predict_action(**batch, constraints=limits, mode=mode), args.repeats
        )
    loop = median_ms(lambda: [policy.predict_action(**inputs) for inputs in singles], max(3, args.repeats // 4))
    rows["free, one by one"] = loop
    rows["prepare"] = median_ms(lambda: policy.prepare(pictures, [SENTENCE] * args.batch), args.repeats)
    print(f"batch {args.batch}, horizon {args.horizon}, {n_tokens} tokens, {torch.get_num_threads()} threads")
    for name, milliseconds in rows.items():
        print(f"{name:<20}{milliseconds:>9.1f} ms{milliseconds / bare_ms:>8.2f} x bare generate")
    print(f"a batch of {args.batch} is {loop / rows['free']:.1f} times as fast as the loop")


if __name__ == "__main__":
    main()
