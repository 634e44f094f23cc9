"""Published recipes of fine-tuning, as presets of the command's options: what the user says wins."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers.hf_argparser import string_to_bool
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from hf_vla_actions.models.families import OPENVLA_TYPE

logger = logging.getLogger(__name__)

# What "all-linear" of peft 0.11.1 resolved to on OpenVLA: the last parts of the names of all linear layers. Written out,
# because later releases of PEFT skip lm_head. `proj` is also the name of the convolution that embeds the patches, and
# the layers that never run (SigLIP's pooling, the last block of a tower) have an adapter too.
OPENVLA_TARGET_MODULES = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    *("qkv", "proj", "fc1", "fc2", "fc3", "q", "kv"),
)


@dataclass(frozen=True)
class Recipe:
    """Options of a published training.

    Args:
        name: value of `--recipe`.
        source: where it was published.
        model_type: models that it is for.
        use_peft: an adapter instead of all weights.
        learning_rate: of AdamW.
        lr_scheduler_type: how the learning rate changes.
        weight_decay: of AdamW.
        max_grad_norm: gradients are cut at this norm; 0 for never.
        per_device_train_batch_size: samples a device and step; None where the source gives a number for all devices.
        lora_r: rank.
        lora_alpha: scale of the adapter is alpha / r.
        lora_dropout: dropout inside the adapter.
        lora_init: how A starts ("gaussian": standard deviation 1 / r; B is 0).
        lora_target_modules: ends of the names of the layers that get an adapter.
        lora_vision: adapt the vision towers and the projector too.
        lora_action_rows: train the rows of the action tokens beside the adapter.

    bfloat16 is used for the frozen weights of an adapter and for the computation wherever the accelerator has it.
    """

    name: str
    source: str
    model_type: str
    use_peft: bool
    learning_rate: float
    lr_scheduler_type: str
    weight_decay: float
    max_grad_norm: float
    per_device_train_batch_size: int | None = None
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    lora_init: str | None = None
    lora_target_modules: tuple[str, ...] | None = None
    lora_vision: bool | None = None
    lora_action_rows: bool | None = None

    def options(self, bf16: bool) -> dict[str, Any]:
        """The command's options and their values.

        Args:
            bf16: the device computes in bfloat16.
        """
        about = ("name", "source", "model_type")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in about}
        found = {name: value for name, value in values.items() if value is not None}
        if self.lora_target_modules is not None:
            found["lora_target_modules"] = list(self.lora_target_modules)
        if self.use_peft:
            # The adapter itself stays float32; small steps would vanish in anything less.
            found["dtype"] = "bfloat16" if bf16 else "float32"
        return {**found, "bf16": bf16}


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="openvla-lora",
            source="openvla/openvla vla-scripts/finetune.py: FinetuneConfig, LoraConfig(alpha=min(rank, 16)), AdamW as "
            "torch has it, no clipping",
            model_type=OPENVLA_TYPE,
            use_peft=True,
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=0.0,
            per_device_train_batch_size=16,
            lora_r=32,
            lora_alpha=16,
            lora_dropout=0.0,
            lora_init="gaussian",
            lora_target_modules=OPENVLA_TARGET_MODULES,
            lora_vision=True,
            lora_action_rows=False,
        ),
        Recipe(
            name="openvla-full",
            source="openvla/openvla prismatic/conf/vla.py; arXiv 2406.09246 section 3.4 (2e-5, no warm-up; 256 samples a "
            "step over all devices, which --per_device_train_batch_size and --gradient_accumulation_steps make up)",
            model_type=OPENVLA_TYPE,
            use_peft=False,
            learning_rate=2e-5,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
        ),
    )
}


def asked_recipe(argv: Sequence[str]) -> tuple[Recipe, dict[str, Any]] | None:
    """The recipe that a command line asks for, and its options on this machine; None if it asks for none.

    Args:
        argv: all options; names of recipes that do not exist are left to the parser proper.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--use_cpu", "--use-cpu", nargs="?", const=True, default=False, type=string_to_bool)
    asked, _ = first.parse_known_args(list(argv))
    recipe = RECIPES.get(asked.recipe)
    if recipe is None:
        return None
    on_cpu = asked.use_cpu or string_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    return recipe, recipe.options(bf16=not on_cpu and is_torch_bf16_gpu_available())


def log_differences(recipe: Recipe, options: dict[str, Any], arguments: Sequence[Any]) -> dict[str, Any]:
    """Say which options of a recipe the user has changed; returns these with the user's values.

    Args:
        recipe: the recipe.
        options: its options, as `asked_recipe` returned them.
        arguments: the parsed dataclasses.
    """
    given = {f.name: getattr(group, f.name) for group in arguments for f in fields(group) if f.name in options}
    changed = {name: given[name] for name, value in options.items() if given[name] != value}
    for name, value in changed.items():
        logger.warning("recipe %s has %s=%r, you asked for %r: yours is used", recipe.name, name, options[name], value)
    return changed
