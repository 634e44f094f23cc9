"""Noise schedules of diffusion: squared cosine betas, and the steps back of DDPM and DDIM.

Equal to those of `diffusers` (the tests hold them to 1e-6) with `beta_schedule="squaredcos_cap_v2"`, noise predicted,
estimates of the clean sample clipped, and "leading" timesteps: multiples of `train_steps // steps`, from the largest
down. Timesteps count upwards into the noise: 0 is nearly clean, `train_steps - 1` nearly noise.
"""

from __future__ import annotations

import abc
import itertools
import math

import torch

from hf_vla_actions.heads.base import HeadError, check_whole

CLIP = 1.0
LARGEST_BETA = 0.999


class NoiseSchedule(abc.ABC):
    """How much noise there is at each timestep, and the way back.

    The betas are those of "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672, squared cosine).

    Args:
        train_steps: steps of the schedule.
        steps: steps of denoising, at most as many.
        clip: estimates of the clean sample are kept within [-clip, clip]; None: they are not.

    Attributes:
        alphas: (train_steps,) float32, the share of the clean sample's variance in the noisy one (alpha bar).
        timesteps: at which the noise is predicted while denoising, in their order.

    Raises:
        HeadError: more steps of denoising than there are in the schedule.
    """

    def __init__(self, train_steps: int, steps: int, *, clip: float | None = CLIP):
        check_whole("train_steps", train_steps)
        check_whole("steps", steps)
        if steps > train_steps:
            raise HeadError(f"{steps} steps of denoising: the schedule has {train_steps}; take at most as many")

        def remaining(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        times = [i / train_steps for i in range(train_steps + 1)]
        betas = [min(1 - remaining(b) / remaining(a), LARGEST_BETA) for a, b in itertools.pairwise(times)]
        self.alphas = torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32), dim=0)
        self.clip = clip
        self.stride = train_steps // steps
        self.timesteps = [i * self.stride for i in reversed(range(steps))]

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean samples (batch, ...) with as much noise as their timesteps (batch,) have."""
        alpha = self.alphas.to(clean.device)[timesteps].reshape(-1, *[1] * (clean.ndim - 1))
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def clean_from_noise(self, noise: torch.Tensor, timestep: int, sample: torch.Tensor) -> torch.Tensor:
        """The clean sample that would be this noisy one if it had this noise in it; clipped."""
        alpha = self.alphas[timestep].to(sample.device)
        clean = (sample - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        return clean if self.clip is None else clean.clamp(-self.clip, self.clip)

    def noise_from_clean(self, clean: torch.Tensor, timestep: int, sample: torch.Tensor) -> torch.Tensor:
        """The noise in a noisy sample if this is the clean one: what `clean_from_noise` turns back."""
        alpha = self.alphas[timestep].to(sample.device)
        return (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()

    def share(self, timestep: int) -> float:
        """Share of the way from noise (0) to clean (1): that of the clean sample in a noisy one, by its weight."""
        alpha = float(self.alphas[timestep])
        return math.sqrt(alpha) / self.scale(timestep)

    def scale(self, timestep: int) -> float:
        """By what `(1 - share) * noise + share * clean` is multiplied: it keeps the variance at 1."""
        alpha = float(self.alphas[timestep])
        return math.sqrt(alpha) + math.sqrt(1 - alpha)

    def before(self, timestep: int) -> torch.Tensor:
        """Alpha bar of the timestep to which a step back goes: 1, no noise at all, behind the last."""
        before = timestep - self.stride
        return self.alphas[before] if before >= 0 else torch.ones(())

    def step(
        self, noise: torch.Tensor, timestep: int, sample: torch.Tensor, fresh: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One step back: predicted noise and noisy sample at a timestep to the sample at the one before.

        Args:
            noise: predicted.
            timestep: one of `timesteps`.
            sample: noisy, of the same shape.
            fresh: of the same shape, standard normal; only DDPM has a use for it.
        """
        return self.back(self.clean_from_noise(noise, timestep, sample), noise, timestep, sample, fresh)

    @abc.abstractmethod
    def back(
        self,
        clean: torch.Tensor,
        noise: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        fresh: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step back, as `step`, with the estimate of the clean sample given beside that of the noise."""


class DDIM(NoiseSchedule):
    """Without chance: arXiv 2010.02502 with eta 0. The noise it keeps is the predicted one, clipped estimate or not."""

    def back(
        self,
        clean: torch.Tensor,
        noise: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        fresh: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See the base class."""
        alpha = self.before(timestep).to(sample.device)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


class DDPM(NoiseSchedule):
    """With fresh noise at each step but the last: arXiv 2006.11239, equations 6 and 7.

    Args:
        train_steps: steps of the schedule.
        steps: steps of denoising, at most as many.
        clip: estimates of the clean sample are kept within [-clip, clip]; None: they are not.
        variance: of the fresh noise, "small" (that of the posterior, diffusers' default) or "large" (beta, Octo's).
    """

    def __init__(self, train_steps: int, steps: int, *, clip: float | None = CLIP, variance: str = "small"):
        super().__init__(train_steps, steps, clip=clip)
        if variance not in VARIANCES:
            raise HeadError(f"variance is one of {list(VARIANCES)}, got {variance!r}")
        self.variance = variance

    def back(
        self,
        clean: torch.Tensor,
        noise: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        fresh: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See the base class; `fresh` is needed except at timestep 0."""
        total, before = self.alphas[timestep].to(sample.device), self.before(timestep).to(sample.device)
        alpha = total / before
        beta = 1 - alpha
        mean = before.sqrt() * beta / (1 - total) * clean + alpha.sqrt() * (1 - before) / (1 - total) * sample
        if timestep == 0:
            return mean
        if fresh is None:
            raise HeadError("a step of DDPM needs fresh noise")
        variance = (1 - before) / (1 - total) * beta if self.variance == "small" else beta
        return mean + variance.sqrt() * fresh


VARIANCES = ("small", "large")
