"""The recurrent head of RoboVLMs: one learned token behind the prompt, whose hidden states over time feed an LSTM."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hf_vla_actions.heads.base import Features, HeadError, check_whole
from hf_vla_actions.heads.one_shot import PointConfig, PointHead, ProprioEncoder


@dataclass(frozen=True)
class RecurrentConfig(PointConfig):
    """What a `RecurrentHead` is made of; the defaults are those of RoboVLMs.

    Args:
        window: steps that the LSTM sees, the present one among them.
        hidden: width of the LSTM.
        layers: of the LSTM.
        readout: widths of the hidden layers of the MLPs behind it.
    """

    kind: ClassVar[str] = "recurrent"

    loss: str = "huber"
    gripper_weight: float = 0.01
    window: int = 8
    hidden: int = 1024
    layers: int = 4
    readout: tuple[int, ...] = (1024, 512)

    def __post_init__(self):
        super().__post_init__()
        for name in ("window", "hidden", "layers"):
            check_whole(name, getattr(self, name))
        if not isinstance(self.readout, tuple):
            raise HeadError(f"readout is a tuple of widths, got {self.readout!r}")
        for value in self.readout:
            check_whole("a width of readout", value)
        if self.gripper_dim is not None and self.dof == 1:
            raise HeadError("a 'recurrent' head with a gripper needs other dimensions beside it; dof is 1")

    @property
    def reach(self) -> float:
        """See the base class."""
        return 1.0

    def build(self, width: int) -> RecurrentHead:
        """See the base class."""
        return RecurrentHead(self, width)


class RecurrentHead(PointHead):
    """An LSTM over what the learned token saw at the last steps, then one MLP for the arm and one for the gripper.

    Source: RoboVLMs (arXiv 2412.14058; Robot-VLAs/RoboVLMs, `robovlms/model/policy_head/base_policy.py`). There the
    state of the LSTM is carried along; here it begins anew at each call and runs over the window, which gives the
    same at every step that is trained, and leaves the head without memory: the steps before arrive as
    `Features.past`. The loss is that of the present step only.

    The arm ends in a Tanh: its normalized values lie in [-1, 1], so statistics with which the data goes beyond that
    (mean and standard deviation) ask for what it cannot answer. The robot's state, if it reads one, is added to what
    the LSTM says at the present step.

    Args:
        config: what it is made of.
        width: of the model's hidden states.
    """

    def __init__(self, config: RecurrentConfig, width: int):
        super().__init__(config, width, n_slots=1)
        self.lstm = nn.LSTM(width, config.hidden, config.layers, batch_first=True)
        self.proprio = None if config.proprio_dim is None else ProprioEncoder(config.proprio_dim, config.hidden)
        widths = (config.hidden, *config.readout)
        has_gripper = config.gripper_dim is not None
        self.arm = nn.Sequential(*perceptron(*widths, config.horizon * (config.dof - has_gripper)), nn.Tanh())
        self.gripper = nn.Sequential(*perceptron(*widths, config.horizon)) if has_gripper else None

    @property
    def window(self) -> int:
        """Steps that it sees at once, the present one among them."""
        return self.config.window

    def predict(self, features: Features) -> torch.Tensor:
        """See the base class."""
        state = self.remember(features)
        if self.proprio is not None:
            state = state + self.proprio(features.proprio)
        horizon, dim = self.config.horizon, self.config.gripper_dim
        arm = self.arm(state).unflatten(-1, (horizon, -1))
        if self.gripper is None:
            return arm
        return torch.cat([arm[..., :dim], self.gripper(state)[..., None], arm[..., dim:]], dim=-1)

    def remember(self, features: Features) -> torch.Tensor:
        """(batch, hidden): what the LSTM says at the present step, having seen the real steps of the window."""
        steps, real = self.steps(features)
        # The real steps move to the front: what comes behind the present one cannot reach it.
        before = (~real).sum(dim=1, keepdim=True)
        order = (torch.arange(steps.shape[1], device=steps.device) + before) % steps.shape[1]
        steps = torch.where(real[..., None], steps, 0.0)
        # Not in half precision: not every processor can, and what is rounded at one step is rounded again at the next.
        with torch.autocast(steps.device.type, enabled=False):
            states, _ = self.lstm(steps.to(self.dtype).take_along_dim(order[..., None], dim=1))
        present = steps.shape[1] - 1 - before
        return states.take_along_dim(present[..., None], dim=1)[:, 0]

    def steps(self, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, window, width) states of the token, the present one last, and (batch, window) which are real."""
        if features.slots is None:
            raise HeadError("a 'recurrent' head needs its slot's hidden states")
        present = torch.ones(len(features), 1, dtype=torch.bool, device=features.slots.device)
        if self.window == 1:
            return features.slots, present
        shape = (len(features), self.window - 1, 1, self.width)
        past, mask = features.past, features.past_mask
        if past is None or tuple(past.shape) != shape:
            raise HeadError(f"past has shape {shape}, got {None if past is None else tuple(past.shape)}")
        if mask is None:
            mask = present.expand(shape[:2])
        if mask.dtype != torch.bool or tuple(mask.shape) != shape[:2]:
            raise HeadError(
                f"past_mask is bool of shape {shape[:2]} (True = real), got {mask.dtype} {tuple(mask.shape)}"
            )
        if (mask[:, :-1] & ~mask[:, 1:]).any():
            raise HeadError("past_mask marks steps before the episode began: once True, it stays True to the present")
        return torch.cat([past[:, :, 0], features.slots], dim=1), torch.cat([mask, present], dim=1)


def perceptron(*widths: int) -> list[nn.Module]:
    """Linear layers between these widths, with a ReLU between two."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return layers[:-1]
