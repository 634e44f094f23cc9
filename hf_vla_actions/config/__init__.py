"""`ActionConfig`: everything between what a model says and the commands of a robot."""

from hf_vla_actions.config.action_config import (
    DEFAULT_PROMPT,
    FILE_NAME,
    FORMAT_VERSION,
    PASS_THROUGH_TOLERANCE,
    ActionConfig,
)
from hf_vla_actions.config.codes import FAST_FILE, ActionTokenizer
from hf_vla_actions.config.presets import Preset
from hf_vla_actions.config.source import check_source
from hf_vla_actions.config.token_plan import TokenPlan

__all__ = [
    "DEFAULT_PROMPT",
    "FAST_FILE",
    "FILE_NAME",
    "FORMAT_VERSION",
    "PASS_THROUGH_TOLERANCE",
    "ActionConfig",
    "ActionTokenizer",
    "Preset",
    "TokenPlan",
    "check_source",
]
