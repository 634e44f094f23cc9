"""Heads that answer in one go: no noise, no steps, nothing that could be guided on the way."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_vla_actions.heads.base import ActionHead, Features, HeadConfig, HeadError, check_number
from hf_vla_actions.heads.guidance import Guidance

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "l1": functional.l1_loss,
    "huber": functional.huber_loss,
    "mse": functional.mse_loss,
}


class OneShotHead(ActionHead):
    """Refuses what only a generative head has a use for; a generator is let pass, as it changes nothing."""

    @abc.abstractmethod
    def decide(self, features: Features, generator: torch.Generator | None) -> torch.Tensor:
        """(batch, horizon, dof) normalized chunks."""

    def draw(
        self,
        features: Features,
        *,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        guidance: Guidance | None = None,
    ) -> torch.Tensor:
        """See the base class; noise, num_steps and guidance raise `HeadError`."""
        options = {"noise": noise, "num_steps": num_steps, "guidance": guidance}
        useless = [name for name, value in options.items() if value is not None]
        if useless:
            raise HeadError(
                f"a {self.config.kind!r} head answers in one step and has no use for {useless}: leave it out, or take "
                "a 'flow' or 'diffusion' head"
            )
        return self.decide(features, generator)


@dataclass(frozen=True)
class PointConfig(HeadConfig):
    """What heads that predict one number each, and not a distribution, have in common.

    Args:
        loss: "l1", "huber" (with delta 1) or "mse".
        gripper_dim: dimension that is open or closed and nothing between: its number is a logit, trained by binary
            cross-entropy; None: every number is trained by `loss`.
        gripper_weight: of that cross-entropy beside the loss of the other numbers.
        gripper_values: the two normalized values of the gripper, the lower one first. (-1, 1) if the statistics
            normalize it by its bounds, (0, 1) if they leave a gripper of zeros and ones as it is (OpenVLA's mask).
            Training takes everything above their middle for the upper one; sampling gives one of the two.
    """

    loss: str = "l1"
    gripper_dim: int | None = None
    gripper_weight: float = 1.0
    gripper_values: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self):
        super().__post_init__()
        if self.loss not in LOSSES:
            raise HeadError(f"loss is one of {list(LOSSES)}, got {self.loss!r}")
        dim = self.gripper_dim
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or not 0 <= dim < self.dof):
            raise HeadError(f"gripper_dim is one of the dimensions 0..{self.dof - 1} or None, got {dim!r}")
        check_number("gripper_weight", self.gripper_weight, above=False)
        if not isinstance(self.gripper_values, tuple) or len(self.gripper_values) != 2:
            raise HeadError(f"gripper_values are two numbers, got {self.gripper_values!r}")
        check_number("the lower of gripper_values", self.gripper_values[0], least=-float("inf"))
        check_number("the upper of gripper_values", self.gripper_values[1], least=self.gripper_values[0])


class PointHead(OneShotHead):
    """Predicts numbers, and a logit for the gripper."""

    @abc.abstractmethod
    def predict(self, features: Features) -> torch.Tensor:
        """(batch, horizon, dof): normalized numbers, except the gripper's, which is a logit."""

    def errors(
        self, features: Features, actions: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """See the base class.

        With a gripper the mean of what comes back is the mean loss of the other numbers plus `gripper_weight` times
        the mean cross-entropy, however many other numbers there are (where all are real).
        """
        predicted = self.predict(features)
        errors = LOSSES[self.config.loss](predicted, actions, reduction="none")
        if self.config.gripper_dim is None:
            return errors
        dof = self.config.dof
        is_gripper = self.is_gripper(errors.device)
        is_high = (actions > sum(self.config.gripper_values) / 2).to(errors.dtype)
        entropies = functional.binary_cross_entropy_with_logits(predicted, is_high, reduction="none")
        return torch.where(is_gripper, self.config.gripper_weight * dof * entropies, errors * dof / max(dof - 1, 1))

    def decide(self, features: Features, generator: torch.Generator | None) -> torch.Tensor:
        """See the base class."""
        predicted = self.predict(features)
        if self.config.gripper_dim is None:
            return predicted
        low, high = self.config.gripper_values
        # A logit that is not finite must reach the check of `sample`, not become a closed gripper.
        gripper = low + (high - low) * (predicted > 0).to(predicted.dtype)
        decided = self.is_gripper(predicted.device) & torch.isfinite(predicted)
        return torch.where(decided, gripper, predicted)

    def is_gripper(self, device: Any) -> torch.Tensor:
        """(dof,) bool."""
        return torch.arange(self.config.dof, device=device) == self.config.gripper_dim


class ProprioEncoder(nn.Module):
    """The robot's state to a vector that is added to hidden states: linear, exact GELU, linear, as OpenVLA-OFT's.

    Args:
        proprio_dim: numbers of the state.
        width: of the hidden states.
    """

    def __init__(self, proprio_dim: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(proprio_dim, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, proprio: torch.Tensor) -> torch.Tensor:
        """(batch, proprio_dim) to (batch, width)."""
        return self.layers(proprio)
