"""Continuous action heads: `loss(hidden, actions, pad_mask)` and `sample(hidden)`, on any vision-language model."""

from hf_vla_actions.heads.base import ActionHead, Features, HeadConfig, HeadError
from hf_vla_actions.heads.diffusion import DiffusionConfig, DiffusionHead
from hf_vla_actions.heads.flow import FlowMatchingConfig, FlowMatchingHead
from hf_vla_actions.heads.guidance import Chain, Guidance, GuidanceError, Repaint, SoftPrefix, prefix_weights
from hf_vla_actions.heads.kinds import head_config_from_dict
from hf_vla_actions.heads.native import NativeFlowConfig
from hf_vla_actions.heads.parallel import ParallelConfig, ParallelHead
from hf_vla_actions.heads.recurrent import RecurrentConfig, RecurrentHead
from hf_vla_actions.heads.regression import RegressionConfig, RegressionHead
from hf_vla_actions.heads.transfusion import TransfusionLoss, token_loss, transfusion_loss

__all__ = [
    "ActionHead",
    "Chain",
    "DiffusionConfig",
    "DiffusionHead",
    "Features",
    "FlowMatchingConfig",
    "FlowMatchingHead",
    "Guidance",
    "GuidanceError",
    "HeadConfig",
    "HeadError",
    "NativeFlowConfig",
    "ParallelConfig",
    "ParallelHead",
    "RecurrentConfig",
    "RecurrentHead",
    "RegressionConfig",
    "RegressionHead",
    "Repaint",
    "SoftPrefix",
    "TransfusionLoss",
    "head_config_from_dict",
    "prefix_weights",
    "token_loss",
    "transfusion_loss",
]
