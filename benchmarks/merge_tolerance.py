"""How far do logits move when an adapter is merged? Where the tolerances of `hf-vla merge` come from.

Random Llamas of several depths get a LoRA adapter with all weights moved, trained rows included, and are merged as the
command does. For each dtype: the largest difference of a logit between the adapter policy (float32) and the merged one,
loaded from disk, as a share of the largest logit; beside it, as the peer in the same run, how far the un-merged adapter
policy itself moves when it merely computes in that dtype. The last column says what a wrong merge does: one lost row.

example:
  python benchmarks/merge_tolerance.py --quick
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from tiny import action_config, tiny_tokenizer

from hf_vla_actions import AutoModelForActionPrediction, to_vla
from hf_vla_actions.hub.merge import TOLERANCES, merge_adapter
from hf_vla_actions.hub.probe import Probe, ask, compare
from hf_vla_actions.train import LoraArguments, add_lora

HEADER = ("layers", "dtype", "merged", "adapter itself", "allowed", "lost row")


def adapter_of(layers: int, hidden: int, folder: Path, seed: int) -> Path:
    """An adapter on a saved random Llama; its deltas are a tenth of the weights, its rows are all new."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        initializer_range=hidden**-0.5,
        tie_word_embeddings=False,
    )
    to_vla(LlamaForCausalLM(config), tokenizer, action_config(tokenizer)).save_pretrained(folder / "base")
    base = AutoModelForActionPrediction.from_pretrained(folder / "base", self_test=False)
    model = add_lora(base, LoraArguments(use_peft=True, lora_r=32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.1 * hidden**-0.5 if "lora_" in name else hidden**-0.5
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def measure(layers: int, hidden: int, seed: int) -> list[tuple[str, ...]]:
    """A row of the table for each dtype."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        adapter = adapter_of(layers, hidden, Path(place), seed)
        policy = AutoModelForActionPrediction.from_pretrained(adapter, self_test=False)
        probe = Probe.synthetic(policy)
        reference = ask(policy.get_base_model(), probe)
        for dtype, allowed in TOLERANCES.items():
            name = str(dtype).removeprefix("torch.")
            # Without refusal: what is wanted here is the number.
            report = merge_adapter(adapter, Path(place) / name, dtype=dtype, tolerance=10.0, probe=probe)
            narrow = AutoModelForActionPrediction.from_pretrained(adapter, self_test=False, dtype=dtype)
            itself = compare(reference, ask(narrow.get_base_model(), probe, reference), 10.0)
            whole = AutoModelForActionPrediction.from_pretrained(Path(place) / name, self_test=False)
            with torch.no_grad():
                whole.get_output_embeddings().weight[int(whole.action_config.vocabulary.token_ids[9])] = 0.0
            lost = compare(reference, ask(whole, probe, reference), 10.0)
            shares = [one.difference / one.scale for one in (report.comparison, itself, lost)]
            rows.append(
                (str(layers), name, f"{shares[0]:.2g}", f"{shares[1]:.2g}", f"{allowed:g}", f"{shares[2]:.2g}")
            )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 and 8 layers, narrow")
    parser.add_argument("--seeds", type=int, default=1, help="models of each depth")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    print(" | ".join(HEADER))
    for layers in (2, 8) if args.quick else (2, 8, 32):
        for seed in range(args.seeds):
            for row in measure(layers, 64 if args.quick else 256, seed):
                print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()
