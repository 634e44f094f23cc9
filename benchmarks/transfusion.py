"""Words and actions in one loss: what the weight of the actions (lambda of Transfusion, arXiv 2408.11039) does to both.

    python benchmarks/transfusion.py --output transfusion.json
    python benchmarks/transfusion.py --output quick.json --quick

One small Llama with a flow matching head learns the task of `multimodal_world.py`, and to say of each state which way the block
lies, in a word of its own for each of about 50 distances (in 4 mm, from the difference of two numbers of the prompt). Both are
learned in one forward of one model, `language + lambda * action`; measured on held-out demonstrations, with equal steps,
each lambda for itself. Then lambda 1 once more with knowledge insulation (no gradient from the head into the model,
arXiv 2505.23705). `transfusion.json` beside this file was measured with it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from multimodal_training import HEADS, backbone, tokenizer_of
from multimodal_world import HORIZON, KEY, SPACE, UNSEEN, Demonstrations, Setting, demonstrate, words
from tokens import commit
from tokens_training import _batches, _schedule, _step
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from hf_vla_actions import ActionConfig, ActionStats, NormStats, to_vla

WEIGHTS = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)
FURTHEST = 80  # grains from tool to block that there are words for


class Spoken:
    """Demonstrations with the word that is to be said after each sentence.

    Args:
        policy: whose tokens.
        part: demonstrated.
    """

    def __init__(self, policy, part: Demonstrations):
        prompts = policy.prepare(None, part.sentences)
        told = [{word[0]: int(word[1:]) for word in sentence.split()[1:]} for sentence in part.sentences]
        answers = [f"ahead{state['b'] - state['y']}" for state in told]
        ids = torch.tensor(policy.prompts.tokenizer.convert_tokens_to_ids(answers))[:, None]
        if (ids == policy.prompts.tokenizer.unk_token_id).any():
            raise SystemExit(f"a block is further away than {FURTHEST} grains")
        self.inputs = {"input_ids": torch.cat([prompts["input_ids"], ids], dim=1)}
        self.inputs["attention_mask"] = torch.ones_like(self.inputs["input_ids"])
        self.labels = torch.full_like(self.inputs["input_ids"], -100)
        self.labels[:, -1:] = ids
        self.chunks = torch.from_numpy(policy.action_config.normalize(part.actions, KEY)).float()

    def loss(self, policy, rows, **options) -> Any:
        """Both losses of some rows."""
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        return policy(**inputs, labels=self.labels[rows], normalized=self.chunks[rows], **options)


def measure(setting: Setting, parts: Sequence[Demonstrations], weight: float, insulate: bool, seed: int) -> dict:
    """Train with one weight; held-out losses and how often the word is right."""
    begin = time.process_time()
    tokenizer = tokenizer_of([*words(setting), *(f"ahead{n}" for n in range(-FURTHEST, FURTHEST + 1))])
    stats = NormStats({KEY: {"action": ActionStats.compute(parts[0].actions, mode="bounds"), "proprio": None}})
    config = ActionConfig(
        None, None, stats, {KEY: SPACE}, horizon=HORIZON, prompt=" {instruction}", head=HEADS["flow"]
    )
    policy = to_vla(backbone(tokenizer, seed), tokenizer, config)
    learned, held_out = (Spoken(policy, part) for part in parts)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=setting.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = _schedule(optimizer, setting.steps)
    set_seed(seed)
    policy.train()
    batches = _batches(len(parts[0]), setting.batch_size, setting.steps, seed)
    for rows in tqdm(batches, total=setting.steps, desc=f"lambda {weight}", leave=False, mininterval=5):
        loss = learned.loss(policy, rows, action_weight=weight, insulate=insulate).loss
        _step(loss, list(policy.parameters()), optimizer, schedule)
    policy.eval()
    set_seed(UNSEEN)  # the same noise for every row
    found = []
    with torch.no_grad():
        for rows in torch.arange(len(parts[1])).split(256):
            out = held_out.loss(policy, rows)
            right = out.logits[:, -2].argmax(dim=-1) == held_out.labels[rows, -1]
            found.append((len(rows), out.language_loss.item(), out.action_loss.item(), right.float().mean().item()))
    n, *values = np.array(found).T
    language, action, right = (float((n * value).sum() / n.sum()) for value in values)
    row: dict[str, Any] = {"weight": weight, "insulate": insulate, "seed": seed, "language_loss": language}
    row |= {"action_loss": action, "right_words": right, "cpu_seconds": round(time.process_time() - begin, 1)}
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["lambda", "language loss", "words right", "action loss"]
    lines = [head, ["---"] * len(head)]
    for key in dict.fromkeys((row["weight"], row["insulate"]) for row in rows):
        some = [row for row in rows if (row["weight"], row["insulate"]) == key]
        values = [np.mean([row[name] for row in some]) for name in ("language_loss", "right_words", "action_loss")]
        name = f"{key[0]:g}" + (", insulated" if key[1] else "")
        lines.append([name, f"{values[0]:.3f}", f"{values[1]:.2f}", f"{values[2]:.3f}"])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the file after each row and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", required=True, type=Path, help="JSON file")
    options.add_argument("--seeds", type=int, default=2, help="trainings of each weight (default: %(default)s)")
    options.add_argument("--quick", action="store_true", help="three steps: a smoke test")
    args = options.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    setting = Setting(blocked=(0.03,), demonstrations=500, steps=600)
    if args.quick:
        setting = Setting(blocked=(0.03,), demonstrations=4, steps=3, batch_size=4)
    parts = demonstrate(setting, 0), demonstrate(setting, UNSEEN, max(4, setting.demonstrations // 5))
    rows: list[dict[str, Any]] = []
    for seed in range(1 if args.quick else args.seeds):
        for weight, insulate in [*((w, False) for w in WEIGHTS), (1.0, True)]:
            rows.append(measure(setting, parts, weight, insulate, seed))
            content = {"commit": commit(), "steps": setting.steps, "held_out": len(parts[1]), "rows": rows}
            temporary = args.output.with_name(args.output.name + ".tmp")
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, args.output)
    print(table(rows))


if __name__ == "__main__":
    main()
