"""The whole path in one function: demonstrations, training, closed loop free and bound, checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import set_seed

from hf_vla_actions.demo.demonstrations import SPACE, write_lerobot_dataset
from hf_vla_actions.demo.judge import Blanked, Limits, Swapped, as_json, random_actions, run, summarize, text_table
from hf_vla_actions.demo.pictures import draw_figure, draw_gif
from hf_vla_actions.demo.tiny_vlm import FULL as TINY_FULL
from hf_vla_actions.demo.tiny_vlm import PROMPT, TinyTraining, build_tokenizer, build_vlm
from hf_vla_actions.demo.tiny_vlm import QUICK as TINY_QUICK
from hf_vla_actions.demo.world import COLORS, INSTRUCTIONS, TabletopEnv
from hf_vla_actions.errors import CheckpointError, VLAActionsError
from hf_vla_actions.models import AutoModelForActionPrediction
from hf_vla_actions.models.generation import MODES
from hf_vla_actions.train import VLATrainingArguments, fine_tune
from hf_vla_actions.train.arguments import DataArguments, ModelArguments
from hf_vla_actions.train.setup import chunk_datasets, load_policy, open_dataset

UNSEEN = 1_000_000  # seeds of the judged episodes start here; demonstrations are far below
UNIT_OPTIONS = ["none" if unit is None else unit for unit in SPACE.units]


@dataclass(frozen=True)
class DemoSettings:
    """How much of everything.

    Args:
        training: how the model learns.
        judged: unseen seeds.
        max_steps: of a free episode; bound ones get `slower` times as many, because their steps are shorter.
        slower: see above.
        split_words: give each word a token instead of each sentence; much harder to learn.
        horizon: actions predicted at once.
        augment_limits: share of the demonstrations whose expert obeys a random step limit.
    """

    training: TinyTraining
    judged: int = 50
    max_steps: int = 24
    slower: int = 3
    split_words: bool = False
    horizon: int = 1
    augment_limits: float = 0.0


FULL = DemoSettings(TINY_FULL)
QUICK = DemoSettings(TINY_QUICK, judged=30, max_steps=8)


def run_demo(folder: Path, settings: DemoSettings = FULL, *, seed: int = 0, limits: Limits | None = None) -> str:
    """Run everything into a new folder.

    Args:
        folder: gets `data/`, `policy/`, `results.json`, `figure.png`, `frame.png` and `rollout.gif`.
        settings: how much of everything.
        seed: of everything.
        limits: what is forbidden in the bound runs.

    Returns:
        The table of results as text.
    """
    if folder.exists() and any(folder.iterdir()):
        raise VLAActionsError(f"{folder} is not empty; choose another --output_dir or remove it")
    limits = limits or Limits()
    begin = time.monotonic()
    set_seed(seed)
    # One core for the pictures; more than a few threads only get in each other's way in a model this small.
    torch.set_num_threads(min(4, max(1, (os.cpu_count() or 2) - 1)))
    folder.mkdir(parents=True, exist_ok=True)
    data = write_lerobot_dataset(
        folder / "data",
        episodes=settings.training.num_episodes,
        seed=100_000 * seed,
        noise=settings.training.noise,
        augment_limits=settings.augment_limits,
    )
    policy, metrics = train(folder, data, settings, seed)
    trained = time.monotonic() - begin

    seeds = range(UNSEEN + 1000 * seed, UNSEEN + 1000 * seed + settings.judged)
    options: dict[str, Any] = {"max_steps": settings.max_steps, "keep_frames": True}
    free = run(policy, "free", seeds, **options)
    rows = [
        summarize("free", free, limits),
        summarize("picture blanked", run(policy, "blanked", seeds, wrapper=Blanked, **options), limits),
        summarize("instruction swapped", run(policy, "swapped", seeds, wrapper=Swapped, **options), limits),
        summarize("random actions", run(policy, "random", seeds, predict=random_actions(policy), **options), limits),
    ]
    options["max_steps"] *= settings.slower
    bound = {mode: run(policy, mode, seeds, bound=limits, mode=mode, **options) for mode in MODES}
    rows += [summarize(f"limits kept by {mode!r}", episodes, limits) for mode, episodes in bound.items()]

    first = free[0]
    obs: dict[str, Any] = {"images": first.frames[0], "instruction": _instruction(seeds[0]), "proprio": first.poses[0]}
    prove_checkpoint(policy, folder / "policy", obs)
    Image.fromarray(obs["images"]).save(folder / "frame.png")
    slow = bound["project"]
    draw_figure(folder / "figure.png", policy, obs, free, slow, limits)
    shown = max(range(len(free)), key=lambda i: (free[i].success and slow[i].success, len(free[i].actions)))
    captions = [f"free: {_instruction(seeds[shown])}", f"at most {limits.step * 1000:.0f} mm a step"]
    draw_gif(folder / "rollout.gif", [free[shown], slow[shown]], captions)
    results = {
        "rows": as_json(rows),
        "train_token_accuracy": metrics["train_token_accuracy"],
        "seconds": {"data_and_training": trained, "all": time.monotonic() - begin},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return _report(folder, settings, rows, results, limits)


def train(folder: Path, data: Path, settings: DemoSettings, seed: int):
    """Build a base model from nothing and fine-tune it from its folder, as `hf_vla_actions.train` does."""
    sentences = [text.format(color=color) for text in INSTRUCTIONS.values() for color in COLORS]
    tokenizer = build_tokenizer(sentences, split_words=settings.split_words)
    model, processor = build_vlm(tokenizer, seed=seed)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")

    model_args = ModelArguments(model_name_or_path=str(folder / "base"), prompt=PROMPT)
    data_args = DataArguments(
        dataset=[str(data)],
        unnorm_key=["tabletop"],
        horizon=settings.horizon,
        action_units=UNIT_OPTIONS,
        action_kind="delta",
        action_frame=SPACE.frame,
        norm_mode="bounds",
    )
    dataset = open_dataset(data_args)
    policy, key = load_policy(model_args, data_args, dataset, seed)
    chunks, _ = chunk_datasets(dataset, data_args, policy.action_config.horizon, seed)
    training = settings.training
    args = VLATrainingArguments(
        output_dir=str(folder / "policy"),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        logging_steps=max(1, training.max_steps // 20),
        dataloader_num_workers=1,
        dataloader_pin_memory=False,
        save_strategy="no",
        seed=seed,
    )
    _, metrics = fine_tune(policy, chunks, args, unnorm_key=key)
    shutil.rmtree(folder / "base")
    return policy.eval(), metrics


def prove_checkpoint(policy, folder: Path, obs: dict) -> None:
    """Load the saved policy with plain Transformers and with ours; refuse if a single action or weight differs."""
    from transformers import AutoModelForImageTextToText

    from hf_vla_actions import ActionConfig, TACOLogitsProcessor

    inputs = policy.prepare(obs["images"], obs["instruction"])
    expected = policy.predict_action(**inputs)
    again = AutoModelForActionPrediction.from_pretrained(folder).to(policy.device)
    plain: Any = AutoModelForImageTextToText.from_pretrained(folder).to(policy.device)
    config = ActionConfig.from_pretrained(folder)
    ids = plain.generate(
        **inputs, logits_processor=[TACOLogitsProcessor([], config)], max_new_tokens=64, do_sample=False
    )
    generated = ids[0, inputs["input_ids"].shape[1] : -1].cpu().numpy()
    same = np.array_equal(again.predict_action(**inputs), expected)
    same &= np.array_equal(config.decode(generated)[1], expected[0])
    weights = again.state_dict()
    same &= all(torch.equal(value.cpu(), weights[name].cpu()) for name, value in policy.state_dict().items())
    if not same:
        raise CheckpointError(f"the policy saved in {folder} does not come back as it was")


def _instruction(seed: int) -> str:
    return TabletopEnv("reach").reset(seed=seed)[0]["instruction"]


def _report(folder: Path, settings: DemoSettings, rows, results, limits: Limits) -> str:
    minutes = results["seconds"]["all"] / 60
    return (
        f"\n{settings.judged} unseen episodes of 'reach'; limits: {limits.step * 1000:.0f} mm a step along each axis, and "
        f"a box\n\n{text_table(rows)}\n"
        f"The checkpoint came back as it was, through AutoModelForActionPrediction and through plain Transformers.\n"
        f"{minutes:.1f} minutes. Look at {folder / 'figure.png'} and {folder / 'rollout.gif'};\n"
        f"the policy is in {folder / 'policy'}, the demonstrations are in {folder / 'data'}.\n"
    )
