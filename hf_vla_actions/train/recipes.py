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

from hf_vla_actions.errors import TrainingError
from hf_vla_actions.models.families import OPENVLA_TYPE
from hf_vla_actions.models.openvla.oft_config import PRESETS

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
    """Options of a published training; None where the source says nothing, or nothing that fits here.

    Args:
        name: value of `--recipe`.
        source: where it was published.
        model_type: models that it is for; None for any.
        refusal: why this command cannot train it and what can be done instead; None where it can.
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
        freeze_vision: keep the vision tower and the projector as they are.
        freeze_text_embeddings: keep the embeddings as they are, but for the rows of the action tokens.
        horizon: actions in a chunk.
        norm_mode: which bounds become [-1, 1].
        n_bins: bins a dimension.
        action_tokenizer: what makes tokens of a chunk.
        fast_scale: steps in a coefficient of 1.
        fast_vocab: codes at most.

    bfloat16 is used for the frozen weights of an adapter and for the computation wherever the accelerator has it.
    """

    name: str
    source: str
    use_peft: bool
    model_type: str | None = None
    refusal: str | None = None
    learning_rate: float | None = None
    lr_scheduler_type: str | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    per_device_train_batch_size: int | None = None
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    lora_init: str | None = None
    lora_target_modules: tuple[str, ...] | None = None
    lora_vision: bool | None = None
    lora_action_rows: bool | None = None
    freeze_vision: bool | None = None
    freeze_text_embeddings: bool | None = None
    horizon: int | None = None
    norm_mode: str | None = None
    n_bins: int | None = None
    action_tokenizer: str | None = None
    fast_scale: float | None = None
    fast_vocab: int | None = None

    def options(self, bf16: bool) -> dict[str, Any]:
        """The command's options and their values.

        Args:
            bf16: the device computes in bfloat16.
        """
        about = ("name", "source", "model_type", "refusal")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in about}
        found = {name: value for name, value in values.items() if value is not None}
        if self.lora_target_modules is not None:
            found["lora_target_modules"] = list(self.lora_target_modules)
        if self.use_peft:
            # The adapter itself stays float32; small steps would vanish in anything less.
            found["dtype"] = "bfloat16" if bf16 else "float32"
        return {**found, "bf16": bf16}


def _oft(kind: str, *, batch: int, decay: int) -> Recipe:
    preset = PRESETS[kind]
    return Recipe(
        name=f"oft-{kind}",
        source=f"moojink/openvla-oft {kind.upper()}.md, prismatic/vla/constants.py; arXiv 2502.19645 (L1 head, the rate a "
        f"tenth after {decay:,} steps, 8 GPUs)",
        model_type=OPENVLA_TYPE,
        refusal="its head predicts the whole chunk in one pass, and this command teaches tokens one after the other. Such "
        f"checkpoints load with AutoModelForActionPrediction.from_pretrained(path, oft={kind!r}), and Transformers' Trainer "
        "trains them in Python (they return their loss where the batch holds `actions`). For chunks of the same length "
        f"from a model without that head, pass --recipe fast-default --horizon {preset['horizon']}",
        use_peft=True,
        learning_rate=5e-4,
        weight_decay=0.01,
        max_grad_norm=0.0,
        per_device_train_batch_size=batch,
        lora_r=32,
        lora_alpha=16,
        lora_dropout=0.0,
        lora_init="gaussian",
        lora_vision=True,
        lora_action_rows=False,
        horizon=preset["horizon"],
        norm_mode=preset["normalization"],
    )


def _robovlms(**options: Any) -> Recipe:
    return Recipe(
        model_type=None, learning_rate=2e-5, weight_decay=0.0, horizon=10, n_bins=256, **options
    )  # its other normalization, a fixed range of 0.65, is that of one dataset


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
        _oft("libero", batch=8, decay=100_000),
        _oft("aloha", batch=4, decay=50_000),
        _robovlms(
            name="robovlms-lora",
            source="Robot-VLAs/RoboVLMs train_setup of its configs (lora_r 64, lora_alpha 16, lora_dropout 0.05, lora_bias "
            "none) and base_policy.py; arXiv 2412.14058. Its own experiments fine-tune all weights",
            use_peft=True,
            lora_r=64,
            lora_alpha=16,
            lora_dropout=0.05,
        ),
        _robovlms(
            name="robovlms-full",
            source="Robot-VLAs/RoboVLMs configs/calvin_finetune (full-ft, train_vision, train_text_embedding, wd-0, act-10); "
            "arXiv 2412.14058",
            use_peft=False,
            freeze_vision=False,
            freeze_text_embeddings=False,
        ),
        Recipe(
            name="fast-default",
            source="FAST, arXiv 2501.09747 (scale 10, 1024 codes, chunks of about one second: give --horizon); adapter and "
            "learning rate are the defaults of this command",
            use_peft=True,
            learning_rate=5e-4,
            action_tokenizer="fast",
            fast_scale=10.0,
            fast_vocab=1024,
        ),
    )
}


def asked_recipe(argv: Sequence[str]) -> tuple[Recipe, dict[str, Any]] | None:
    """The recipe that a command line asks for, and its options on this machine; None if it asks for none.

    Args:
        argv: all options; names of recipes that do not exist are left to the parser proper.

    Raises:
        TrainingError: this command cannot train it, or the options cannot be read.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe")
    first.add_argument("--use_cpu", "--use-cpu", nargs="?", const=True, default=False, type=string_to_bool)
    try:
        asked, _ = first.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise TrainingError(str(error)) from None
    recipe = RECIPES.get(asked.recipe)
    if recipe is None:
        return None
    if recipe.refusal is not None:
        raise TrainingError(f"the recipe {recipe.name!r} cannot be trained here: {recipe.refusal}")
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
