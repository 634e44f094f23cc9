"""Drawing a chunk towards something while a generative head makes it."""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch

from hf_vla_actions.errors import VLAActionsError


class GuidanceError(VLAActionsError):
    """Guidance that cannot be applied: sizes that do not fit, values that are not finite."""


class Guidance(abc.ABC):
    """Changes the estimate of the finished chunk at every step of flow matching or denoising.

    At each step a head knows a noisy chunk and, from it, an estimate of the finished one. What `guide` returns takes
    the place of that estimate, and the step goes on from there (a flow recomputes its velocity, a denoiser its noise);
    what it returns in the last step is the finished chunk. A head calls `guide` alone. A guidance that only looks at
    the estimate writes `correct`; one that goes back through the network writes `guide` too.
    """

    uses_gradient: bool = False
    """Whether the correction goes back through the network, as in inpainting by pseudo-inverse guidance."""

    @abc.abstractmethod
    def correct(self, clean: torch.Tensor, time: float) -> torch.Tensor:
        """The estimate as it should be.

        Args:
            clean: (batch, horizon, dof) normalized estimate of the finished chunk.
            time: share of the way that is done, from 0 (noise) to 1 (finished), whatever the head's own convention.
        """

    def guide(
        self, estimate: Callable[[torch.Tensor], torch.Tensor], noisy: torch.Tensor, time: float
    ) -> torch.Tensor:
        """What a head goes on from instead of `estimate(noisy)`.

        Args:
            estimate: the finished chunk that the network sees in a noisy one; differentiable in it.
            noisy: (batch, horizon, dof) at (1 - time) * noise + time * clean. A head whose noisy chunks are scaled
                otherwise divides by that scale here and multiplies inside `estimate` (`times.DiffusionTimes.scale`).
            time: share of the way that is done, as for `correct`.

        Returns:
            (batch, horizon, dof).
        """
        return self.correct(estimate(noisy), time)


class Repaint(Guidance):
    """Puts the estimate right at every step: the projection on a constraint, or a beginning that is known.

    In the spirit of RePaint (arXiv 2201.09865), where what is known takes the place of what the network thinks; the
    finished chunk is exactly what the correction returns.

    Args:
        correction: from normalized chunks (batch, horizon, dof) to normalized chunks of that shape.
    """

    def __init__(self, correction: Callable[[torch.Tensor], torch.Tensor]):
        self.correction = correction

    def correct(self, clean: torch.Tensor, time: float) -> torch.Tensor:
        """See `Guidance.correct`."""
        corrected = self.correction(clean)
        if not isinstance(corrected, torch.Tensor) or corrected.shape != clean.shape:
            got = tuple(corrected.shape) if isinstance(corrected, torch.Tensor) else type(corrected).__name__
            raise GuidanceError(f"a correction returns a tensor of shape {tuple(clean.shape)}, got {got}")
        return corrected.to(clean)


class SoftPrefix(Guidance):
    """Makes a chunk go on from what the robot is already doing: real-time chunking.

    Pseudo-inverse guidance (PiGDM) with soft weights, from "Real-Time Execution of Action Chunking Flow Policies"
    (arXiv 2506.07339): the weighted difference to the target goes back through the network, so that the free part of
    the chunk bends to the held one.

    Args:
        target: (batch, horizon, dof) or (horizon, dof) normalized; may hold anything finite where the weight is 0.
        weights: (horizon,) from 0 (free) to 1 (held), as from `prefix_weights`.
        max_weight: most that the guidance may weigh, whatever the time asks for; the paper's beta.

    Raises:
        GuidanceError: sizes that do not fit, weights outside of 0 to 1, or values that are not finite.
    """

    uses_gradient = True

    def __init__(self, target: torch.Tensor, weights: torch.Tensor, *, max_weight: float = 5.0):
        if target.ndim not in (2, 3) or tuple(weights.shape) != (target.shape[-2],):
            raise GuidanceError(
                "a target has shape (batch, horizon, dof) or (horizon, dof) and the weights (horizon,), got "
                f"{tuple(target.shape)} and {tuple(weights.shape)}"
            )
        if not torch.isfinite(target).all():
            raise GuidanceError("the target has values that are not finite; put anything where the weight is 0")
        if not ((weights >= 0) & (weights <= 1)).all():
            raise GuidanceError(f"weights go from 0 (free) to 1 (held), got {weights.tolist()}")
        if not 0 < max_weight < float("inf"):
            raise GuidanceError(f"max_weight is a number above 0, got {max_weight!r}")
        self.target, self.weights, self.max_weight = target, weights, float(max_weight)

    @classmethod
    def after(cls, previous: torch.Tensor, horizon: int, *, delay: int, max_weight: float = 5.0) -> SoftPrefix:
        """For the chunk that follows another one.

        Args:
            previous: (batch, left, dof) or (left, dof) normalized: the steps of the chunk before that were not done
                when this one was asked for.
            horizon: steps of the new chunk.
            delay: the first ones of these that will have been done when this chunk is ready; they are held.
            max_weight: see the class.
        """
        left = previous.shape[-2]
        weights = prefix_weights(horizon, held=delay, end=left)
        free = previous.new_zeros(*previous.shape[:-2], horizon - left, previous.shape[-1])
        return cls(torch.cat([previous, free], dim=-2), weights, max_weight=max_weight)

    def correct(self, clean: torch.Tensor, time: float) -> torch.Tensor:
        """The estimate, drawn to the target by the weights; see `Guidance.correct`."""
        if self.target.shape not in (clean.shape, clean.shape[1:]):
            raise GuidanceError(f"the target has shape {tuple(self.target.shape)}, the chunks {tuple(clean.shape)}")
        return torch.lerp(clean, self.target.to(clean).expand_as(clean), self.weights.to(clean)[:, None])

    def guide(
        self, estimate: Callable[[torch.Tensor], torch.Tensor], noisy: torch.Tensor, time: float
    ) -> torch.Tensor:
        """See `Guidance.guide`."""
        if torch.is_inference_mode_enabled():
            raise GuidanceError(
                "this guidance goes back through the network, which torch.inference_mode rules out: use torch.no_grad"
            )
        with torch.enable_grad():
            start = noisy.detach().requires_grad_()
            clean = estimate(start)
            difference = (self.correct(clean, time) - clean).detach()
            (pull,) = torch.autograd.grad(clean, start, difference)
        return clean.detach() + (1 - time) * self.strength(time) * pull

    def strength(self, time: float) -> float:
        """Weight of the correction on the velocity: (1 - t) / (t r^2), r^2 = (1 - t)^2 / (t^2 + (1 - t)^2), clipped."""
        if not 0 < time < 1:
            return self.max_weight
        return min(self.max_weight, (time**2 + (1 - time) ** 2) / (time * (1 - time)))


class Chain(Guidance):
    """One guidance after another on the same estimate, such as a held prefix and then a constraint.

    Args:
        first: may go back through the network.
        rest: may not: each sees what the one before it made of the estimate.
    """

    def __init__(self, first: Guidance, *rest: Guidance):
        late = [type(guidance).__name__ for guidance in rest if guidance.uses_gradient]
        if late:
            raise GuidanceError(f"only the first of a chain may go back through the network, not {late}: put it first")
        self.first, self.rest = first, rest
        self.uses_gradient = first.uses_gradient

    def correct(self, clean: torch.Tensor, time: float) -> torch.Tensor:
        """See `Guidance.correct`."""
        for guidance in (self.first, *self.rest):
            clean = guidance.correct(clean, time)
        return clean

    def guide(
        self, estimate: Callable[[torch.Tensor], torch.Tensor], noisy: torch.Tensor, time: float
    ) -> torch.Tensor:
        """See `Guidance.guide`."""
        clean = self.first.guide(estimate, noisy, time)
        for guidance in self.rest:
            clean = guidance.correct(clean, time)
        return clean


def prefix_weights(horizon: int, *, held: int, end: int) -> torch.Tensor:
    """How much each step of a new chunk is drawn to the chunk before it.

    The soft mask of real-time chunking (arXiv 2506.07339): 1 for the steps that will have been done anyway, then
    decaying exponentially over the rest of the overlap, then 0.

    Args:
        horizon: steps of the new chunk.
        held: the first steps, with weight 1.
        end: first step with weight 0: where the chunk before has nothing more to say.

    Returns:
        (horizon,) float32.
    """
    if not 0 <= held <= end <= horizon:
        raise GuidanceError(f"0 <= held <= end <= horizon, got held {held}, end {end} and horizon {horizon}")
    rest = ((end - torch.arange(horizon, dtype=torch.float64)) / (end - held + 1)).clamp(0, 1)
    return (rest * torch.expm1(rest) / torch.expm1(torch.ones(()).double())).float()
