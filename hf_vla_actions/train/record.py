"""`training.json`: what a checkpoint was trained with, for its card and for whoever repeats it."""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from hf_vla_actions.train.config_file import ConfigFile

FILE_NAME = "training.json"
PACKAGES = ("hf_vla_actions", "peft", "accelerate")
# Where the file itself lies, what one machine is told, and what nobody else may know.
LEFT_OUT = ("output_dir", "logging_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run")
SECRET = "_token"


class Steps(TrainerCallback):
    """Remembers how many optimizer steps were made."""

    def __init__(self):
        self.done = 0

    def on_train_end(self, args, state, control, **kwargs):
        """Remember."""
        self.done = state.global_step


def training_record(
    asked: dict[str, Any],
    groups: list[Any],
    *,
    recipe,
    config_file: ConfigFile | None,
    steps: int,
    unnorm_key: str | list[str],
) -> dict[str, Any]:
    """JSON-ready values.

    Args:
        asked: options of the recipe, the file and the command line, by name.
        groups: the parsed dataclasses; the last one is VLATrainingArguments.
        recipe: the Recipe, or None.
        config_file: the file of options, or None.
        steps: of the optimizer.
        unnorm_key: of the dataset; of a mixture those of all.
    """
    values = {f.name: getattr(group, f.name) for group in groups for f in fields(group)}
    args = groups[-1]
    return {
        "recipe": None if recipe is None else recipe.name,
        "recipe_source": None if recipe is None else recipe.source,
        "dataset": values["dataset"],
        "unnorm_key": unnorm_key,
        "world_size": args.world_size,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "steps": steps,
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "options": _public(asked),  # also those that are the defaults of today
        "config_file": None
        if config_file is None
        else {"name": config_file.path, "content": _public(config_file.content)},
        "versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            **{name: found for name in PACKAGES if (found := _version(name)) is not None},
        },
    }


def _public(options: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(v) for name, v in options.items() if name not in LEFT_OUT and not name.endswith(SECRET)}


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)) or value is None:
        return getattr(value, "value", value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else str(getattr(value, "value", value))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
