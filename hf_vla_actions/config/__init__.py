"""`ActionConfig`: everything between what a model says and the commands of a robot."""

from hf_vla_actions.config.action_config import (
    DEFAULT_PROMPT,
    FILE_NAME,
    FORMAT_VERSION,
    PASS_THROUGH_TOLERANCE,
    ActionConfig,
)
from hf_vla_actions.config.codes import FAST_FILE, ActionTokenizer
from hf_vla_actions.config.source import check_source

__all__ = [
    "DEFAULT_PROMPT",
    "FAST_FILE",
    "FILE_NAME",
    "FORMAT_VERSION",
    "PASS_THROUGH_TOLERANCE",
    "ActionConfig",
    "ActionTokenizer",
    "check_source",
]
