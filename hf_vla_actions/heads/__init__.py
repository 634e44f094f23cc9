"""Continuous action heads: `loss(hidden, actions, pad_mask)` and `sample(hidden)`, on any vision-language model."""

from hf_vla_actions.heads.base import ActionHead, Features, HeadConfig, HeadError
from hf_vla_actions.heads.guidance import Guidance
from hf_vla_actions.heads.kinds import head_config_from_dict
from hf_vla_actions.heads.regression import RegressionConfig, RegressionHead

__all__ = [
    "ActionHead",
    "Features",
    "Guidance",
    "HeadConfig",
    "HeadError",
    "RegressionConfig",
    "RegressionHead",
    "head_config_from_dict",
]
