"""Which start of the action tokens' rows learns faster on the demo: all at the mean, or neighboring bins as neighbors.

    python benchmarks/row_initialization.py [--pretrained] [--seeds 3] [--steps 900] [--starts mean distance normal]

A start is "mean", "distance", "distance:SCALE:LENGTH", or "normal" (Transformers' `mean_resizing=False`). Each one is
trained as `hf-vla demo --quick` trains, from the same weights on the same batches, and judged on held-out
demonstrations and in closed loop. In the demo every weight is random at first; with `--pretrained` the model first
learns the task, then its action tokens lose what they held and are learned again: everything but them is trained.

`--starts mean distance distance:1:0.001 normal --targets 0.3 0.25`, and `--pretrained --steps 300`, gave the table in
`hf_vla_actions/models/embeddings.py`; 12 and 7 minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from hf_vla_actions.demo.demonstrations import SPACE, write_lerobot_dataset
from hf_vla_actions.demo.judge import run
from hf_vla_actions.demo.run import QUICK, UNIT_OPTIONS, UNSEEN
from hf_vla_actions.demo.tiny_vlm import PROMPT, build_tokenizer, build_vlm
from hf_vla_actions.demo.world import COLORS, INSTRUCTIONS
from hf_vla_actions.models.embeddings import LENGTH, SCALE, initialize_rows
from hf_vla_actions.train import VLATrainer, VLATrainingArguments
from hf_vla_actions.train.arguments import DataArguments, ModelArguments
from hf_vla_actions.train.setup import chunk_datasets, load_policy, open_dataset

MOVING = ("x", "y", "z")  # the other dimensions of "reach" are constant


@dataclass
class Curve:
    """Held-out values at each evaluation, and the share of closed-loop episodes that succeed at the end."""

    steps: list[int]
    loss: list[float]
    accuracy: list[float]
    l1_mm: list[float]
    success: float

    def at(self, values: list[float], step: int) -> float:
        """The value at an evaluated step."""
        return values[self.steps.index(step)]

    def steps_to(self, loss: float) -> float:
        """Steps until the held-out loss is first at most `loss`, linear between evaluations; NaN if never."""
        reached = next((i for i, value in enumerate(self.loss) if value <= loss), None)
        if not reached:
            return float("nan") if reached is None else self.steps[0]
        before, after = self.loss[reached - 1], self.loss[reached]
        part = (before - loss) / (before - after)
        return self.steps[reached - 1] + part * (self.steps[reached] - self.steps[reached - 1])


def set_rows(policy, start: str, seed: int) -> None:
    """Give the action tokens of a policy the start of that name."""
    ids = policy.action_config.vocabulary.token_ids
    how, _, numbers = start.partition(":")
    if how == "normal":
        generator = torch.Generator().manual_seed(seed)
        std = policy.config.get_text_config().initializer_range
        with torch.no_grad():
            for layer in (policy.get_input_embeddings(), policy.get_output_embeddings()):
                rows = torch.from_numpy(np.array(ids))
                layer.weight[rows] = std * torch.randn((*rows.shape, layer.weight.shape[1]), generator=generator)
        return
    scale, length = map(float, numbers.split(":")) if numbers else (SCALE, LENGTH)
    initialize_rows(policy, ids, how, scale=scale, length=length, seed=seed)


class Bench:
    """The demonstrations, and a model for each seed."""

    def __init__(self, folder: Path):
        training = QUICK.training
        self.folder = folder
        options = {"episodes": training.num_episodes, "noise": training.noise, "progress": False}
        data = write_lerobot_dataset(folder / "data", **options)
        self.data_args = DataArguments(
            dataset=str(data),
            unnorm_key="tabletop",
            action_units=UNIT_OPTIONS,
            action_kind="delta",
            action_frame=SPACE.frame,
            norm_mode="bounds",
            eval_fraction=0.05,
        )
        self.dataset = open_dataset(self.data_args)
        # In memory: decoding the same pictures again for each run would take longer than training.
        self.train, self.held_out = (
            [chunks[i] for i in range(len(chunks))] for chunks in chunk_datasets(self.dataset, self.data_args, 1, 0)
        )

    def policy(self, seed: int):
        """A policy with random weights."""
        sentences = [text.format(color=color) for text in INSTRUCTIONS.values() for color in COLORS]
        model, processor = build_vlm(build_tokenizer(sentences), seed=seed)
        base = self.folder / f"base{seed}"
        model.save_pretrained(base)
        processor.save_pretrained(base)
        args = ModelArguments(model_name_or_path=str(base), prompt=PROMPT)
        return load_policy(args, self.data_args, self.dataset, 0)[0]

    def learn(self, policy, seed: int, steps: int, every: int, episodes: int) -> Curve:
        """Train a policy in place as the demo does, with an evaluation now and then."""
        set_seed(seed)
        training = QUICK.training
        args = VLATrainingArguments(
            output_dir=str(self.folder / "run"),
            max_steps=steps,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=128,
            learning_rate=training.learning_rate,
            warmup_steps=training.warmup_steps,
            weight_decay=training.weight_decay,
            adam_beta2=training.adam_beta2,
            max_grad_norm=training.max_grad_norm,
            eval_strategy="steps",
            eval_steps=every,
            eval_on_start=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        args.logging_strategy = "no"
        trainer = VLATrainer(policy, args, train_dataset=self.train, eval_dataset=self.held_out)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        log = [line for line in trainer.state.log_history if "eval_loss" in line]
        seeds = range(UNSEEN + 1000 * seed, UNSEEN + 1000 * seed + episodes)
        rollouts = run(policy.eval(), "free", seeds, max_steps=QUICK.max_steps) if episodes else []
        return Curve(
            [line["step"] for line in log],
            [line["eval_loss"] for line in log],
            [float(np.mean([line[f"eval_token_accuracy/{name}"] for name in MOVING])) for line in log],
            [float(np.mean([1000 * line[f"eval_l1/{name}"] for name in MOVING])) for line in log],
            float(np.mean([episode.success for episode in rollouts])) if rollouts else float("nan"),
        )


def text(values: list[float], digits: int, percent: bool = False) -> str:
    """Mean ± standard error."""
    array = np.array(values) * (100 if percent else 1)
    error = array.std(ddof=1) / len(array) ** 0.5 if len(array) > 1 else float("nan")
    return f"{array.mean():.{digits}f} ± {error:.{digits}f}"


def print_table(curves: dict[str, list[Curve]], targets: list[float]) -> None:
    """One line a start: mean ± standard error over the seeds."""
    evaluated = next(iter(curves.values()))[0].steps
    early, last = evaluated[max(1, len(evaluated) // 3)], evaluated[-1]
    columns = ["loss at 0", f"loss at {early}", f"loss at {last}", *(f"steps to {target:g}" for target in targets)]
    columns += ["accuracy", "L1 mm", "success"]
    print(f"{'start':<20}" + "".join(f"{column:>16}" for column in columns))
    for start, runs in curves.items():
        cells = [text([c.at(c.loss, step) for c in runs], 3) for step in (0, early, last)]
        cells += [text([c.steps_to(target) for c in runs], 0) for target in targets]
        cells += [text([c.accuracy[-1] for c in runs], 1, percent=True), text([c.l1_mm[-1] for c in runs], 2)]
        cells += [text([c.success for c in runs], 0, percent=True)]
        print(f"{start:<20}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", default=["mean", "distance", "normal"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=QUICK.training.max_steps)
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--episodes", type=int, default=30, help="of the closed loop")
    parser.add_argument("--targets", type=float, nargs="*", default=[0.4, 0.3], help="losses to reach")
    parser.add_argument("--pretrained", action="store_true", help="everything but the action tokens is trained before")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    begin = time.monotonic()
    curves: dict[str, list[Curve]] = {start: [] for start in args.starts}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        print(f"{len(bench.train)} steps to learn from, {len(bench.held_out)} held out", flush=True)
        for seed in range(args.seeds):
            base = bench.policy(seed)
            if args.pretrained:
                bench.learn(base, 1000 + seed, QUICK.training.max_steps, QUICK.training.max_steps, 0)
            for start, runs in curves.items():
                policy = deepcopy(base)
                set_rows(policy, start, seed)
                runs.append(bench.learn(policy, seed, args.steps, args.every, args.episodes))
                losses = " ".join(f"{value:.3f}" for value in runs[-1].loss)
                print(f"seed {seed}, {start}: {losses} ({(time.monotonic() - begin) / 60:.1f} min)", flush=True)
    print_table(curves, args.targets)


if __name__ == "__main__":
    main()
