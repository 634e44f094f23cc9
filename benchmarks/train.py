"""Speed of a training step against a plain Trainer, and memory of full fine-tuning, LoRA and QLoRA.

    python benchmarks/train.py            both tables (minutes, one thread)
    python benchmarks/train.py --quick    a short run of both

Speed: a small LLaVA of random weights and one batch that is made beforehand, so that pictures, prompts and tokens cost
nothing. Three contestants take turns: our VLATrainer; Transformers' Trainer on the same tensors with the same loss; and
Trainer with the model's own loss, which computes the logits of all positions. A number is the median of the
steps, without the first ones of each round, in time of the processor: what other work takes away is left out.

Memory: one process a kind, which loads a text-only Llama, takes three steps and reports the peak of its resident memory
over what it had before the model; beside it what `hf-vla train --dry_run` estimates, and "mapped": what of the resident
memory is pages of files. Weights are loaded by mapping their file. LoRA trains on these very pages; for QLoRA the whole
weights are read through them once, and as the rest of the tensors holds on to the mapping, they count (178 MiB here)
until the system needs the room: without mapped pages QLoRA has 255 MiB where LoRA has 367 with its weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_vla_actions import (
    ActionConfig,
    ActionSpace,
    ActionStats,
    ActionVocabulary,
    NormStats,
    UniformActionTokenizer,
    to_vla,
)
from hf_vla_actions.demo.tiny_vlm import TinyVLMSize, build_tokenizer, build_vlm
from hf_vla_actions.models import load_model
from hf_vla_actions.train import ActionCollator, LoraArguments, VLATrainer, VLATrainingArguments
from hf_vla_actions.train.collator import IGNORED, action_loss
from hf_vla_actions.train.lora import quantized_loading
from hf_vla_actions.train.memory import Batch, memory_of
from hf_vla_actions.train.run import model_of

INSTRUCTION, NAMES, HORIZON, KEY = (
    "move to the red block",
    ("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    4,
    "robot",
)
WARM_UP = 3
KINDS = {
    "full": LoraArguments(),
    "LoRA": LoraArguments(use_peft=True, lora_r=16),
    "QLoRA": LoraArguments(use_peft=True, lora_r=16, load_in_4bit=True),
}
MIB = 2**20


class Rows(torch.utils.data.Dataset):
    """Samples of random numbers, as ChunkDataset gives them."""

    def __init__(self, n: int, image_size: int):
        rng = np.random.default_rng(0)
        pictures = [rng.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8) for _ in range(n)]
        self.rows = [
            {
                "images": [picture],
                "instruction": INSTRUCTION,
                "actions": rng.uniform(-1, 1, (HORIZON, len(NAMES))),
                "action_pad_mask": np.ones(HORIZON, dtype=bool),
                "proprio": None,
                "episode": 0,
                "step": i,
                "unnorm_key": KEY,
            }
            for i, picture in enumerate(pictures)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class Clock(TrainerCallback):
    """Seconds of the processor from the end of a step to the end of the next, but for the first ones."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Read the clock."""
        now = time.process_time()
        if state.global_step > WARM_UP:
            self.seconds.append(now - self.last)
        self.last = now


def config_of(tokenizer) -> ActionConfig:
    """What the tokens mean; the tokenizer gains them."""
    stats = ActionStats(q01=[-1.0] * len(NAMES), q99=[1.0] * len(NAMES))
    return ActionConfig(
        UniformActionTokenizer(256),
        ActionVocabulary.append(tokenizer, 256),
        NormStats({KEY: {"action": stats}}),
        {KEY: ActionSpace(NAMES)},
        horizon=HORIZON,
    )


def text_tokenizer():
    """A tokenizer that knows the prompt."""
    prompt = ActionConfig.__dataclass_fields__["prompt"].default.format(instruction=INSTRUCTION)
    return build_tokenizer([INSTRUCTION, prompt])


def options(folder: str, batch: int, steps: int, **more) -> VLATrainingArguments:
    """A training that saves and logs nothing."""
    return VLATrainingArguments(
        output_dir=folder, use_cpu=True, per_device_train_batch_size=batch, max_steps=steps, save_strategy="no",
        disable_tqdm=True, logging_strategy="no", **more,
    )  # fmt: skip


def measure_speed(rounds: int, steps: int, batch: int, width: int) -> dict[str, float]:
    """Samples a second of each contestant."""
    size = TinyVLMSize(image_size=64, text_dim=width, text_layers=4, vision_dim=64)
    model, processor = build_vlm(text_tokenizer(), size=size)
    policy = to_vla(model, processor, config_of(processor.tokenizer))
    rows = Rows(batch, size.image_size)
    made = ActionCollator(policy.prompts, KEY)([rows[i] for i in range(batch)])
    same = {name: value for name, value in made.items() if name != "sample_ids"}
    native = {name: value for name, value in same.items() if name != "logits_to_keep"}
    prompt = made["input_ids"].shape[1] - made["labels"].shape[1]
    native["labels"] = torch.cat([torch.full((batch, prompt), IGNORED), made["labels"]], dim=1)
    clocks = {
        "ours": Clock(),
        "plain Trainer, same tensors and loss": Clock(),
        "plain Trainer, the model's loss": Clock(),
    }
    contestants = list(zip(clocks.items(), (made, same, native), strict=True))
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for (name, clock), tensors in contestants[turn % 3 :] + contestants[: turn % 3]:
                policy.load_state_dict(start)
                args = options(folder, batch, WARM_UP + steps)
                if name == "ours":
                    trainer = VLATrainer(policy, args, unnorm_key=KEY, train_dataset=rows, callbacks=[clock])
                else:
                    loss = action_loss if tensors is same else None
                    trainer = Trainer(policy, args, train_dataset=rows, compute_loss_func=loss, callbacks=[clock])
                # The loop takes what it needs out of a batch, so each step has a copy.
                trainer.data_collator = lambda samples, tensors=tensors: dict(tensors)
                trainer.train()
    return {name: batch / float(np.median(clock.seconds)) for name, clock in clocks.items()}


def show_speed(found: dict[str, float]) -> dict[str, float]:
    """Print the table; returns the ratios."""
    ours = found["ours"]
    sys.stdout.write(f"\n{'samples/s':<42}{'':>10}{'ours is':>12}\n")
    for name, rate in found.items():
        sys.stdout.write(f"{name:<42}{rate:>10.1f}{ours / rate:>11.3f}x\n")
    return {name: ours / rate for name, rate in found.items()}


def measure_memory(kind: str, width: int, layers: int, batch: int, folder: str) -> dict[str, float]:
    """MiB of the peak over what the process had before the model, and of the estimate. For a process of its own."""
    lora = KINDS[kind]
    args = options(f"{folder}/out", batch, 3)
    before, files = resident()
    model, tokenizer = load_model(f"{folder}/base", dtype="float32", **quantized_loading(lora, args))
    policy = to_vla(model, tokenizer, config_of(tokenizer))
    trained = model_of(policy, args, lora)
    made = ActionCollator(policy.prompts, KEY)([Rows(1, 8)[0]])
    # The quantized weights hide their shapes: the estimate is made from an outline, as the plan does.
    with torch.device("meta"):
        outline = LlamaForCausalLM(LlamaConfig.from_pretrained(f"{folder}/base"))
    outline.resize_token_embeddings(model.get_input_embeddings().weight.shape[0], mean_resizing=False)
    outline = to_vla(outline, tokenizer, policy.action_config)
    estimate = memory_of(
        model_of(outline, args, replace(lora, load_in_4bit=False)),
        Batch(batch, made["input_ids"].shape[1], 0, made["labels"].shape[1] + 1),
        vision=(), four_bit=lora.load_in_4bit, optimizer="adamw_torch", half=False, checkpointing=False, layers=layers,
    )  # fmt: skip
    VLATrainer(trained, args, unnorm_key=KEY, train_dataset=Rows(batch, 8)).train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    mapped = resident()[1] - files
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    return {"peak": peak / MIB, "mapped": mapped / MIB, "estimate": estimate.total / MIB, "trained": count}


def resident() -> tuple[int, int]:
    """Bytes of this process in memory, and those of them that are pages of files."""
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[1]) * resource.getpagesize(), int(pages[2]) * resource.getpagesize()


def show_memory(width: int, layers: int, batch: int) -> dict[str, dict[str, float]]:
    """Run a process for each kind, and print the table."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = text_tokenizer()
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=8, **sizes))
        total = sum(p.numel() for p in model.parameters())
        model.save_pretrained(f"{folder}/base")
        tokenizer.save_pretrained(f"{folder}/base")
        sys.stdout.write(
            f"\nmemory of {total:,} weights, batch {batch}: MiB over what the process had before the model\n"
        )
        sys.stdout.write(f"{'':<8}{'trained':>14}{'peak':>10}{'mapped':>10}{'estimate':>10}\n")
        for kind in KINDS:
            numbers = [str(value) for value in (width, layers, batch)]
            done = subprocess.run(
                [sys.executable, __file__, "--one", kind, folder, *numbers],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"{kind} failed:\n{done.stderr[-2000:]}")
            found[kind] = json.loads(done.stdout.splitlines()[-1])
            row = found[kind]
            sys.stdout.write(f"{kind:<8}{row['trained']:>14,.0f}{row['peak']:>10.0f}")
            sys.stdout.write(f"{row['mapped']:>10.0f}{row['estimate']:>10.0f}\n")
            sys.stdout.flush()
    return found


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, small models")
    parser.add_argument("--rounds", type=int, default=6, help="turns of every contestant (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("hf_vla_actions").setLevel(logging.ERROR)
    if args.one:
        kind, folder, *numbers = args.one
        width, layers, batch = map(int, numbers)
        sys.stdout.write("\n" + json.dumps(measure_memory(kind, width, layers, batch, folder)) + "\n")
        return
    rounds, steps, width = (3, 6, 96) if args.quick else (args.rounds, args.steps, 256)
    found = measure_speed(rounds, steps, 8, width)
    ratios = show_speed(found)
    memory = show_memory(*((512, 4, 2) if args.quick else (768, 6, 4)))
    if args.output is not None:
        numbers = {"samples_per_second": found, "ours_over": ratios, "memory_mib": memory}
        args.output.write_text(json.dumps(numbers, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
