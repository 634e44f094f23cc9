"""Language and vision-language models as robot policies."""

from hf_vla_actions.models.adapter import load_adapter, save_adapter
from hf_vla_actions.models.auto import AutoModelForActionPrediction
from hf_vla_actions.models.mixin import ActionPredictionMixin
from hf_vla_actions.models.native import load_model, load_processor
from hf_vla_actions.models.output import ActionOutput
from hf_vla_actions.models.prompts import PromptBuilder
from hf_vla_actions.models.wrap import to_vla

__all__ = [
    "ActionOutput",
    "ActionPredictionMixin",
    "AutoModelForActionPrediction",
    "PromptBuilder",
    "load_adapter",
    "load_model",
    "load_processor",
    "save_adapter",
    "to_vla",
]
