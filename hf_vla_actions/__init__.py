"""Robot policies from Transformers vision-language models, with commands that respect the robot's limits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_vla_actions.registration import register

__version__ = "0.1.0"

_HOME = {
    "ActionSpace": "actions",
    "ActionStats": "actions",
    "Actions": "actions",
    "BinGrid": "actions",
    "Gripper": "actions",
    "NormStats": "actions",
    "PoseDims": "actions",
    "RunningStats": "actions",
    "ActionVocabulary": "tokenizers",
    "FASTActionTokenizer": "tokenizers",
    "UniformActionTokenizer": "tokenizers",
    "VQActionTokenizer": "tokenizers",
    "ActionConfig": "config",
    "Context": "constraints",
    "FASTLogitsProcessor": "decoding",
    "TACOLogitsProcessor": "decoding",
    "TACOLoss": "decoding",
    "taco_loss": "decoding",
    "ActionOutput": "models",
    "ActionPredictionMixin": "models",
    "AutoModelForActionPrediction": "models",
    "load_model": "models",
    "to_vla": "models",
    "OpenVLAConfig": "models.openvla",
    "OpenVLAForActionPrediction": "models.openvla",
    "PrismaticImageProcessor": "models.openvla",
    "PrismaticProcessor": "models.openvla",
    "load_oft": "models.openvla",
    "FASTDecodeError": "errors",
    "InfeasibleConstraintError": "errors",
    "VLAActionsError": "errors",
}
_ROOMS = ("constraints",)

__all__ = ["__version__", *_HOME, *_ROOMS]

if TYPE_CHECKING:
    from hf_vla_actions import constraints as constraints
    from hf_vla_actions.actions import (
        Actions,
        ActionSpace,
        ActionStats,
        BinGrid,
        Gripper,
        NormStats,
        PoseDims,
        RunningStats,
    )
    from hf_vla_actions.config import ActionConfig
    from hf_vla_actions.constraints import Context
    from hf_vla_actions.decoding import FASTLogitsProcessor, TACOLogitsProcessor, TACOLoss, taco_loss
    from hf_vla_actions.errors import FASTDecodeError, InfeasibleConstraintError, VLAActionsError
    from hf_vla_actions.models import (
        ActionOutput,
        ActionPredictionMixin,
        AutoModelForActionPrediction,
        load_model,
        to_vla,
    )
    from hf_vla_actions.models.openvla import (
        OpenVLAConfig,
        OpenVLAForActionPrediction,
        PrismaticImageProcessor,
        PrismaticProcessor,
        load_oft,
    )
    from hf_vla_actions.tokenizers import (
        ActionVocabulary,
        FASTActionTokenizer,
        UniformActionTokenizer,
        VQActionTokenizer,
    )


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"hf_vla_actions.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'hf_vla_actions' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hf_vla_actions.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register()
