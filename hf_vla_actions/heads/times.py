"""The conventions of time in flow matching and diffusion, and the way between them.

Every family mixes a chunk with noise, and a time says how much of each. What they share is the share `s` of the way
from noise (0) to chunk (1): every state is `scale(s) * ((1 - s) * noise + s * actions)`, so a state of one family is
one of any other but for a number.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from hf_vla_actions.heads.base import HeadError


class Times(abc.ABC):
    """How a family of heads counts the time. All of it works on tensors of any shape and on plain numbers' tensors."""

    @abc.abstractmethod
    def share(self, time: torch.Tensor) -> torch.Tensor:
        """Share of the way that is done, from 0 (noise) to 1 (finished), at a time of this family."""

    @abc.abstractmethod
    def time(self, share: torch.Tensor) -> torch.Tensor:
        """Time of this family at a share of the way: the inverse of `share`."""

    def scale(self, share: torch.Tensor) -> torch.Tensor:
        """By what `(1 - share) * noise + share * actions` is multiplied in this family."""
        return torch.ones_like(share)

    def mix(self, actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The noisy chunk (batch, horizon, dof) of a chunk and a noise at (batch,) times."""
        share = self.share(time)
        return self.scale(share)[:, None, None] * torch.lerp(noise, actions, share[:, None, None])


class FlowTimes(Times):
    """A family that learns the velocity along the straight line between noise and chunk.

    Attributes:
        direction: +1 where the time grows from noise to chunk, -1 where it grows towards the noise.
    """

    direction: float

    @abc.abstractmethod
    def from_beta(self, drawn: torch.Tensor) -> torch.Tensor:
        """The time of training for a number drawn from the beta distribution; its mode, 1, is noise."""

    @abc.abstractmethod
    def to_beta(self, time: torch.Tensor) -> torch.Tensor:
        """The inverse of `from_beta`."""

    def told(self, time: torch.Tensor) -> torch.Tensor:
        """What the network is told of a time."""
        return time

    def velocity(self, actions: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Change of the noisy chunk by this family's time: what the network learns."""
        return self.direction * (actions - noise)

    def clean(self, noisy: torch.Tensor, velocity: torch.Tensor, share: float) -> torch.Tensor:
        """The finished chunk to which a velocity leads from a noisy one."""
        return noisy + (1 - share) * self.direction * velocity

    def velocity_to(self, noisy: torch.Tensor, clean: torch.Tensor, share: float) -> torch.Tensor:
        """The velocity that leads from a noisy chunk to a finished one: the inverse of `clean` for a share below 1."""
        return self.direction * (clean - noisy) / (1 - share)


@dataclass(frozen=True)
class Pi0Times(FlowTimes):
    """Time 1 is noise: noisy = t * noise + (1 - t) * actions, velocity = noise - actions.

    As in openpi (`models/pi0.py`), SmolVLA and Transformers' PI0; in training t = 0.999 * Beta(1.5, 1) + 0.001.
    """

    direction = -1.0

    def share(self, time: torch.Tensor) -> torch.Tensor:
        """See `Times.share`."""
        return 1 - time

    def time(self, share: torch.Tensor) -> torch.Tensor:
        """See `Times.time`."""
        return 1 - share

    def from_beta(self, drawn: torch.Tensor) -> torch.Tensor:
        """See `FlowTimes.from_beta`."""
        return 0.999 * drawn + 0.001

    def to_beta(self, time: torch.Tensor) -> torch.Tensor:
        """See `FlowTimes.to_beta`."""
        return (time - 0.001) / 0.999


@dataclass(frozen=True)
class Gr00tTimes(FlowTimes):
    """Time 0 is noise: noisy = (1 - t) * noise + t * actions, velocity = actions - noise.

    As in GR00T N1 (`flow_matching_action_head.py`); in training t = (0.999 - Beta(1.5, 1)) / 0.999, which falls below
    0 by a thousandth once in 700 draws, as there. The network is told the time in whole thousandths.
    """

    direction = 1.0
    buckets = 1000

    def share(self, time: torch.Tensor) -> torch.Tensor:
        """See `Times.share`."""
        return time

    def time(self, share: torch.Tensor) -> torch.Tensor:
        """See `Times.time`."""
        return share

    def from_beta(self, drawn: torch.Tensor) -> torch.Tensor:
        """See `FlowTimes.from_beta`."""
        return (0.999 - drawn) / 0.999

    def to_beta(self, time: torch.Tensor) -> torch.Tensor:
        """See `FlowTimes.to_beta`."""
        return 0.999 - 0.999 * time

    def told(self, time: torch.Tensor) -> torch.Tensor:
        """See `FlowTimes.told`: cut, not rounded, to thousandths."""
        # 0.57 * 1000 is a little less than 570 in floating point, and belongs to 570.
        return (time * self.buckets + 1e-3).trunc() / self.buckets


@dataclass(frozen=True)
class DiffusionTimes(Times):
    """Whole timesteps of a diffusion: noisy = sqrt(alpha_bar) * actions + sqrt(1 - alpha_bar) * noise.

    Source: "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239).

    Args:
        alpha_bars: of timestep 0, 1, ...: the products of all alphas until there, falling, between 0 and 1.
    """

    alpha_bars: tuple[float, ...]

    def __post_init__(self):
        falling = all(a > b for a, b in pairwise(self.alpha_bars))
        if not self.alpha_bars or not falling or not (self.alpha_bars[0] <= 1 and self.alpha_bars[-1] >= 0):
            raise HeadError(f"alpha_bars fall from at most 1 to at least 0, got {self.alpha_bars}")

    def share(self, time: torch.Tensor) -> torch.Tensor:
        """See `Times.share`; of whole timesteps, in float64."""
        if time.is_floating_point() or not ((time >= 0) & (time < len(self.alpha_bars))).all():
            raise HeadError(f"timesteps are whole numbers from 0 to {len(self.alpha_bars) - 1}, got {time}")
        alpha_bar = torch.tensor(self.alpha_bars, dtype=torch.float64, device=time.device)[time]
        return alpha_bar.sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())

    def time(self, share: torch.Tensor) -> torch.Tensor:
        """See `Times.time`; the timestep whose share is nearest."""
        shares = self.share(torch.arange(len(self.alpha_bars), device=share.device))
        return (share.double()[..., None] - shares).abs().argmin(dim=-1)

    def scale(self, share: torch.Tensor) -> torch.Tensor:
        """See `Times.scale`: it keeps the variance at 1 where a flow does not."""
        return (share**2 + (1 - share) ** 2).rsqrt()

    def clean(self, noisy: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The finished chunk, from a noisy one and the noise in it at (batch,) timesteps."""
        signal, sigma = self._parts(time)
        return (noisy - sigma * noise) / signal

    def noise_in(self, noisy: torch.Tensor, clean: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The noise in a noisy chunk, from the finished one: the inverse of `clean`."""
        signal, sigma = self._parts(time)
        return (noisy - signal * clean) / sigma

    def _parts(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        share = self.share(time)[:, None, None]
        scale = self.scale(share)
        return scale * share, scale * (1 - share)


FLOW_TIMES: dict[str, FlowTimes] = {"pi0": Pi0Times(), "gr00t": Gr00tTimes()}


def convert(
    noisy: torch.Tensor, time: torch.Tensor, source: Times, target: Times
) -> tuple[torch.Tensor, torch.Tensor]:
    """A state of one family as the state of another with the same chunk and the same noise in it.

    Into a diffusion this is exact where the share of the time is that of one of its timesteps; a share between two
    of them is an error, for the state would be of neither.

    Args:
        noisy: (batch, horizon, dof) of the source.
        time: (batch,) of the source.
        source: family it comes from.
        target: family it becomes one of.

    Returns:
        noisy (batch, horizon, dof) and time (batch,) of the target.

    Raises:
        HeadError: a time that the target does not have.
    """
    share = source.share(time)
    other = target.time(share)
    there = target.share(other).to(share)
    # Float32 times are only known to some 1e-7.
    if not torch.allclose(there, share, rtol=0, atol=1e-6):
        raise HeadError(
            f"the target has no time at the shares {share.tolist()} of the way; the nearest are {there.tolist()}"
        )
    ratio = target.scale(share) / source.scale(share)
    return noisy * ratio[:, None, None].to(noisy), other


def beta_quantile(levels: torch.Tensor, beta: tuple[float, float]) -> torch.Tensor:
    """Numbers of a beta distribution from uniform ones.

    In closed form, which exists where one of the two parameters is 1: Beta(a, 1) is u^(1/a), as every family uses it
    with a = 1.5, and Beta(1, b) is its mirror image.
    """
    first, second = beta
    return levels ** (1 / first) if second == 1 else 1 - (1 - levels) ** (1 / second)


def beta_level(drawn: torch.Tensor, beta: tuple[float, float]) -> torch.Tensor:
    """The distribution function of a beta distribution: the inverse of `beta_quantile`."""
    first, second = beta
    return drawn**first if second == 1 else 1 - (1 - drawn) ** second


def check_beta(beta: tuple[float, float]) -> None:
    """Raise unless a beta distribution is one of those above."""
    numbers = isinstance(beta, tuple) and len(beta) == 2 and all(isinstance(x, (int, float)) for x in beta)
    if not numbers or not all(math.isfinite(x) and x > 0 for x in beta) or 1 not in beta:
        raise HeadError(f"beta is two numbers above 0, at least one of them 1, such as (1.5, 1.0), got {beta!r}")
