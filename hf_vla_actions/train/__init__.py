"""Fine-tuning: a thin layer over Transformers' Trainer and PEFT, launched by `accelerate launch`."""

from hf_vla_actions.train.arguments import LoraArguments, VLATrainingArguments
from hf_vla_actions.train.collator import ActionCollator
from hf_vla_actions.train.lora import add_lora
from hf_vla_actions.train.recipes import RECIPES, Recipe
from hf_vla_actions.train.run import fine_tune
from hf_vla_actions.train.trainer import VLATrainer

__all__ = [
    "RECIPES",
    "ActionCollator",
    "LoraArguments",
    "Recipe",
    "VLATrainer",
    "VLATrainingArguments",
    "add_lora",
    "fine_tune",
]
