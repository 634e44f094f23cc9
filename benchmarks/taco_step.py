"""What TACO costs in one decoding step, against a flat "allow these ids" processor and against none.

Run it: `python benchmarks/taco_step.py`. Every number of a row is measured in the same run, the contestants taking
turns, so that their ratios mean something on a busy machine.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_vla_actions.actions import ActionSpace, ActionStats, Gripper
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.constraints import Fix, Forbid, Range, Target
from hf_vla_actions.decoding import TACOLogitsProcessor
from hf_vla_actions.tokenizers import ActionVocabulary, UniformActionTokenizer

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
UNITS = ("m", "m", "m", "rad", "rad", "rad", None)
SPEC = [Range("x", -0.01, 0.01), Forbid("y", 0.0, 0.01), Range("z", -0.005, None), Fix("gripper", "open")]


class FlatMask(LogitsProcessor):
    """The usual processor of vision-language-action code: allow all action ids at every step, nothing else."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __call__(self, input_ids, scores):
        """Copy the scores of the action ids into a tensor of -inf."""
        out = torch.full_like(scores, -torch.inf)
        out[:, self.ids] = scores[:, self.ids]
        return out


def make_config(vocabulary_size: int, horizon: int) -> ActionConfig:
    """A robot with seven dimensions and 256 bins, action ids at the end of the vocabulary."""
    ids = np.arange(vocabulary_size - 256, vocabulary_size)
    return ActionConfig(
        tokenizer=UniformActionTokenizer(256),
        vocabulary=ActionVocabulary(ids, 2, "append", tuple(f"<act_{i:03d}>" for i in range(256))),
        norm_stats={"robot": {"action": ActionStats.from_ranges([-0.03] * 6 + [0], [0.03] * 6 + [1])}},
        spaces={"robot": ActionSpace(NAMES, UNITS, (True,) * 6 + (False,), gripper=Gripper("gripper"))},
        horizon=horizon,
    )


def microseconds(contestants: dict, input_ids: list, scores: torch.Tensor, rounds: int) -> dict:
    """Median time of one call of each, the contestants taking turns."""
    times: dict = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        ids = input_ids[turn % len(input_ids)]
        for name, processor in contestants.items():
            start = time.perf_counter()
            processor(ids, scores)
            if scores.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * float(np.median(values[2:])) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--horizon", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    names = ["none", "flat", "mask", "transport", "project", "transport, soft", "mask, per sample", "mask, no length"]
    print(f"one call in microseconds (median of {options.rounds}), and in units of the flat mask; {options.device}")
    print(f"{'vocabulary':>10} {'batch':>5}  " + "  ".join(f"{name:>16}" for name in names))
    for size in options.vocabulary:
        config = make_config(size, options.horizon)
        known = {"prompt_length": 16}
        start = time.perf_counter()
        processors = {
            "mask": TACOLogitsProcessor(SPEC, config, mode="mask", **known),
            "transport": TACOLogitsProcessor(SPEC, config, mode="transport", **known),
            "project": TACOLogitsProcessor(SPEC, config, mode="project", **known),
            "transport, soft": TACOLogitsProcessor([*SPEC, Target("x", 0.005, sigma=0.002)], config, **known),
            "mask, no length": TACOLogitsProcessor(SPEC, config, mode="mask"),
        }
        built = (time.perf_counter() - start) / len(processors)
        for batch in options.batch:
            scores = torch.randn(batch, size, device=options.device)
            first = torch.ones(batch, 16, dtype=torch.long, device=options.device)
            token = torch.full((batch, 1), size - 100, device=options.device)
            # The x, y and gripper tokens of the second step: all of them constrained.
            input_ids = [torch.cat([first, token.expand(-1, n)], 1) for n in (7, 8, 13)]
            contestants = {
                "none": LogitsProcessorList(),
                "flat": FlatMask(torch.tensor(config.vocabulary.token_ids.copy(), device=options.device)),
                "mask, per sample": TACOLogitsProcessor([SPEC] * batch, config, mode="mask", **known),
                **processors,
            }
            result = microseconds(contestants, input_ids, scores, options.rounds)
            cells = [f"{result[name]:8.0f} {result[name] / result['flat']:6.2f}x" for name in names]
            print(f"{size:>10} {batch:>5}  " + "  ".join(f"{cell:>16}" for cell in cells))
        print(f"{'':>10} binding {len(SPEC)} constraints to {7 * options.horizon} tokens: {1e3 * built:.1f} ms")


if __name__ == "__main__":
    main()
