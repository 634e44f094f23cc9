"""Regression: one learned slot an action behind the prompt, and an MLP from its hidden state to the action."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hf_vla_actions.heads.base import Features, HeadError, check_whole
from hf_vla_actions.heads.one_shot import PointConfig, PointHead, ProprioEncoder


@dataclass(frozen=True)
class RegressionConfig(PointConfig):
    """What a `RegressionHead` is made of.

    Args:
        hidden: width of the MLP; None for that of the model.
        blocks: residual blocks of the MLP.
    """

    kind: ClassVar[str] = "regression"

    hidden: int | None = None
    blocks: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.hidden is not None:
            check_whole("hidden", self.hidden)
        check_whole("blocks", self.blocks, least=0)

    def build(self, width: int) -> RegressionHead:
        """See the base class."""
        return RegressionHead(self, width)


class Residual(nn.Module):
    """x plus ReLU of a linear map of the normalized x.

    Args:
        width: of x.
    """

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) to the same shape."""
        return x + self.layers(x)


class RegressionHead(PointHead):
    """Reads each action off its own slot: a chunk in one forward of the model.

    The MLP (norm, linear, ReLU, residual blocks, norm, linear) is that of OpenVLA-OFT (arXiv 2502.19645;
    moojink/openvla-oft, `prismatic/models/action_heads.py`), which has one slot a number instead of one an action.
    The robot's state, if it reads one, is added to every slot's hidden state. Its answers are not clipped to [-1, 1].

    Args:
        config: what it is made of.
        width: of the model's hidden states.
    """

    def __init__(self, config: RegressionConfig, width: int):
        super().__init__(config, width, n_slots=config.horizon)
        hidden = config.hidden or width
        self.proprio = None if config.proprio_dim is None else ProprioEncoder(config.proprio_dim, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.ReLU(),
            *(Residual(hidden) for _ in range(config.blocks)),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, config.dof),
        )

    def predict(self, features: Features) -> torch.Tensor:
        """See the base class."""
        slots = features.slots
        if slots is None:
            raise HeadError("a 'regression' head needs its slots' hidden states")
        if self.proprio is not None:
            slots = slots + self.proprio(features.proprio)[:, None]
        return self.mlp(slots)
