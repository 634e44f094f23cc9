"""Heads and projectors of OpenVLA-OFT; module paths equal the keys of its component files.

Source: moojink/openvla-oft, `prismatic/models/action_heads.py` and `projectors.py`.
"""

from __future__ import annotations

import math

import torch
from torch import nn

HEAD_EPS = 1e-5
RESIDUAL_BLOCKS = 2
MAX_PERIOD = 10000


class ResidualBlock(nn.Module):
    """x plus ReLU of a linear map of the normalized x."""

    def __init__(self, width: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width, eps=HEAD_EPS), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) to the same shape."""
        return x + self.ffn(x)


class ResidualMLP(nn.Module):
    """Norm, linear, ReLU, two residual blocks, norm, linear."""

    def __init__(self, inputs: int, width: int, outputs: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs, eps=HEAD_EPS)
        self.fc1 = nn.Linear(inputs, width)
        self.relu = nn.ReLU()
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(RESIDUAL_BLOCKS))
        self.layer_norm2 = nn.LayerNorm(width, eps=HEAD_EPS)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., outputs)."""
        x = self.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1Head(nn.Module):
    """Regression: the hidden states of one action's slots, side by side, to its numbers.

    Args:
        hidden: width of the language model.
        dof: numbers in an action.
    """

    def __init__(self, hidden: int, dof: int):
        super().__init__()
        self.dof = dof
        self.model = ResidualMLP(hidden * dof, hidden, dof)

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        """(batch, horizon * dof, hidden) to normalized actions (batch, horizon, dof)."""
        return self.model(slots.reshape(len(slots), slots.shape[1] // self.dof, -1))


class NoisePredictor(nn.Module):
    """Holds the MLP of `DiffusionHead` under the name that the original gives it."""

    def __init__(self, hidden: int, dof: int):
        super().__init__()
        self.mlp_resnet = ResidualMLP(hidden * dof, hidden, dof)


class DiffusionHead(nn.Module):
    """Denoising: the hidden states of the slots, into which noisy actions went, to the noise in them.

    Args:
        hidden: width of the language model.
        dof: numbers in an action.
    """

    def __init__(self, hidden: int, dof: int):
        super().__init__()
        self.dof = dof
        self.noise_predictor = NoisePredictor(hidden, dof)

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        """(batch, horizon * dof, hidden) to noise (batch, horizon, dof)."""
        return self.noise_predictor.mlp_resnet(slots.reshape(len(slots), slots.shape[1] // self.dof, -1))


class TokenProjector(nn.Module):
    """Numbers to one embedding of the language model: linear, exact GELU, linear.

    Args:
        inputs: how many numbers; the robot's state, or one noisy number of an action.
        hidden: width of the language model.
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.inputs = inputs
        self.fc1 = nn.Linear(inputs, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) to (..., hidden)."""
        # An adapter may have wrapped the layers, whose dtype is then one level down.
        return self.fc2(self.act(self.fc1(x.to(next(self.parameters()).dtype))))


def timestep_embedding(timesteps: torch.Tensor, hidden: int) -> torch.Tensor:
    """Sines, then cosines of the timesteps at geometrically spaced frequencies.

    Args:
        timesteps: (batch,).
        hidden: width of the language model, even and above 2.

    Returns:
        (batch, hidden) float32.
    """
    half = hidden // 2
    steps = torch.arange(half, device=timesteps.device)
    frequencies = torch.exp(steps * -math.log(MAX_PERIOD) / (half - 1))
    angles = timesteps.float()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
