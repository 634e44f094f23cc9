"""What `predict_action` costs on top of a hand-written greedy loop on the same model: ratios of one run, batch 1 to 32.

    python benchmarks/overhead.py [--batches 1 8 32] [--horizon 1] [--layers 2] [--repeats 20] [--device cuda]

The hand-written loop is the least that anything can do: prefill, argmax, one forward pass a token with a cache, no
processors, no checks, and it knows its length. A tiny random LLaVA takes little itself, so overheads show at their
largest; --layers makes the text model deeper.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import time

import numpy as np
import torch
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from hf_vla_actions import ActionConfig, ActionStats, ActionVocabulary, NormStats, UniformActionTokenizer, to_vla
from hf_vla_actions.constraints import Range
from hf_vla_actions.demo.tiny_vlm import TinyVLMSize, build_tokenizer, build_vlm

SENTENCE = "move to the red block"


def make_policy(horizon: int, layers: int):
    """A LLaVA policy with random weights."""
    size = dataclasses.replace(TinyVLMSize(), text_layers=layers)
    model, processor = build_vlm(build_tokenizer([SENTENCE]), size=size)
    config = ActionConfig(
        UniformActionTokenizer(),
        ActionVocabulary.append(processor.tokenizer),
        NormStats({"robot": {"action": ActionStats.from_ranges([-0.03] * 7, [0.03] * 7)}}),
        horizon=horizon,
    )
    return to_vla(model, processor, config).eval()


@torch.no_grad()
def hand_written(policy, inputs, n_tokens: int) -> torch.Tensor:
    """(batch, n_tokens) greedy tokens; nothing but the model and an argmax."""
    cache = DynamicCache(config=policy.config.get_text_config())
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = policy(**inputs, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    position = positions[:, -1:]
    tokens = [logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(n_tokens - 1):
        mask, position = torch.nn.functional.pad(mask, (0, 1), value=1), position + 1
        options = {"attention_mask": mask, "position_ids": position, "past_key_values": cache, "use_cache": True}
        tokens.append(policy(input_ids=tokens[-1], **options).logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)


def medians_ms(functions: dict, repeats: int) -> dict[str, float]:
    """Median wall time of each function in milliseconds; they take turns, so that a busy machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1000 for name, values in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--horizon", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2, help="depth of the text model")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    policy = make_policy(args.horizon, args.layers).to(args.device)
    limits = [Range("dim_0", -0.01, 0.01)]
    n_tokens = policy.action_config.n_tokens()
    print(f"{n_tokens} tokens, {args.layers} layers, {torch.get_num_threads()} threads, {args.device}: ms per action")
    ratios = ("generate", "free", "project", "transport", "mask")
    print(f"{'batch':>6}{'by hand':>10}" + "".join(f"{name:>18}" for name in (*ratios, "one by one", "prepare")))
    for batch in args.batches:
        pictures = list(np.random.default_rng(0).integers(0, 256, (batch, 48, 48, 3), dtype=np.uint8))
        sentences = ([SENTENCE, "push the green one"] * batch)[:batch]
        inputs = policy.prepare(pictures, sentences)
        singles = [policy.prepare(picture, text) for picture, text in zip(pictures, sentences, strict=True)]
        functions = {
            "by hand": lambda inputs=inputs: hand_written(policy, inputs, n_tokens),
            "generate": lambda inputs=inputs: policy.generate(
                **inputs, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False
            ),
            "free": lambda inputs=inputs: policy.predict_action(**inputs),
            **{
                mode: lambda inputs=inputs, mode=mode: policy.predict_action(**inputs, constraints=limits, mode=mode)
                for mode in ("project", "transport", "mask")
            },
            "prepare": lambda pictures=pictures, sentences=sentences: policy.prepare(pictures, sentences),
        }
        length = inputs["input_ids"].shape[1]
        if not torch.equal(functions["by hand"](), functions["generate"]()[:, length:]):
            raise SystemExit("the hand-written loop and generate disagree: one of them is wrong")
        times = medians_ms(functions, args.repeats)
        loop = medians_ms(
            {"loop": lambda singles=singles: [policy.predict_action(**one) for one in singles]},
            max(3, args.repeats // 4),
        )["loop"]
        times["one by one"] = loop
        floor = times["by hand"]
        cells = "".join(
            f"{times[name] / batch:>10.2f} ({times[name] / floor:4.2f}x)"
            for name in (*ratios, "one by one", "prepare")
        )
        print(f"{batch:>6}{floor / batch:>10.2f}{cells}")


if __name__ == "__main__":
    main()
