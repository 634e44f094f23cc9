"""Diffusion: the head learns the noise in a chunk, and takes it out step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_vla_actions.heads.base import ActionHead, Features, HeadConfig, HeadError, check_number, check_whole
from hf_vla_actions.heads.guidance import Guidance
from hf_vla_actions.heads.layers import ChunkTransformer, check_transformer
from hf_vla_actions.heads.noise import normal
from hf_vla_actions.heads.schedules import DDIM, DDPM, VARIANCES, NoiseSchedule

SAMPLERS = ("ddim", "ddpm")
CLIPS = ("clean", "noisy")


@dataclass(frozen=True)
class DiffusionConfig(HeadConfig):
    """A head by diffusion with squared cosine betas, as Diffusion Policy (arXiv 2303.04137) and Octo (arXiv 2405.12213).

    Diffusion Policy: train_steps=100, steps=100, sampler="ddim", clip=1.0. Octo: train_steps=20, steps=20,
    sampler="ddpm", variance="large", clip=5.0, clips="noisy".

    Args:
        width: of the head's own tokens.
        depth: blocks.
        n_heads: of attention; divides the width.
        train_steps: steps of the noise schedule.
        steps: of denoising, at most as many, when a call names no other number.
        sampler: "ddim" (no chance but the noise it starts from) or "ddpm" (fresh noise at each step).
        clip: sampling stays within [-clip, clip], so it reaches no value beyond, even if the data has some; None: no
            bounds, with which a guidance that goes back through the network may blow up.
        clips: what is kept within them: "clean" (each estimate of the finished chunk, as diffusers) or "noisy" (each
            noisy chunk, as Octo).
        variance: of the fresh noise of "ddpm": "small" (diffusers' default) or "large" (Octo's).
    """

    kind: ClassVar[str] = "diffusion"

    width: int = 512
    depth: int = 6
    n_heads: int = 8
    train_steps: int = 100
    steps: int = 50
    sampler: str = "ddim"
    clip: float | None = 1.0
    clips: str = "clean"
    variance: str = "small"

    def __post_init__(self):
        super().__post_init__()
        check_transformer(self.width, self.depth, self.n_heads)
        check_whole("train_steps", self.train_steps)
        check_whole("steps", self.steps)
        for name, possible in (("sampler", SAMPLERS), ("clips", CLIPS), ("variance", VARIANCES)):
            if getattr(self, name) not in possible:
                raise HeadError(f"{name} is one of {list(possible)}, got {getattr(self, name)!r}")
        if self.clip is not None:
            check_number("clip", self.clip)
        if self.sampler == "ddim" and self.variance != "small":
            raise HeadError('sampler="ddim" adds no fresh noise: leave out variance, or take sampler="ddpm"')
        self.schedule(self.steps)

    def schedule(self, steps: int) -> NoiseSchedule:
        """The noise schedule with so many steps of denoising; more than `train_steps` raise."""
        clip = self.clip if self.clips == "clean" else None
        if self.sampler == "ddim":
            return DDIM(self.train_steps, steps, clip=clip)
        return DDPM(self.train_steps, steps, clip=clip, variance=self.variance)

    @property
    def reach(self) -> float | None:
        """See the base class."""
        return self.clip

    def build(self, width: int) -> DiffusionHead:
        """See `HeadConfig.build`."""
        return DiffusionHead(self, width)


class DiffusionHead(ActionHead):
    """Learns the noise with the mean squared error; a transformer over the chunk that attends to the hidden states.

    Args:
        config: what it is made of.
        width: of the model's hidden states.
    """

    def __init__(self, config: DiffusionConfig, width: int):
        super().__init__(config, width)
        self.network = ChunkTransformer(
            horizon=config.horizon,
            dof=config.dof,
            width=config.width,
            depth=config.depth,
            n_heads=config.n_heads,
            features_width=width,
            proprio_dim=config.proprio_dim,
        )

    @property
    def takes_guidance(self) -> bool:
        """See `ActionHead.takes_guidance`."""
        return True

    def errors(
        self, features: Features, actions: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Squared errors of the noise at one drawn timestep and noise a chunk; see `ActionHead.errors`."""
        noise = normal(tuple(actions.shape), actions, generator)
        place = actions.device if generator is None else generator.device
        timesteps = torch.randint(self.config.train_steps, (len(actions),), generator=generator, device=place)
        timesteps = timesteps.to(actions.device)
        noisy = self.config.schedule(self.config.steps).add_noise(actions, noise, timesteps).to(self.dtype)
        return (self.noise(features, noisy, timesteps) - noise) ** 2

    def noise(self, features: Features, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise (batch, horizon, dof) that the head sees in noisy chunks at (batch,) timesteps."""
        return self.network(noisy, timesteps.to(self.dtype) / self.config.train_steps, features)

    def draw(
        self,
        features: Features,
        *,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        guidance: Guidance | None = None,
    ) -> torch.Tensor:
        """Denoises; see `ActionHead.sample`.

        With guidance, the finished chunk is exactly what the guidance makes of the last estimate.
        """
        schedule = self.config.schedule(self.config.steps if num_steps is None else num_steps)
        shape = (len(features), self.config.horizon, self.config.dof)
        noisy = normal(shape, features.hidden, generator) if noise is None else noise
        for timestep in schedule.timesteps:
            if guidance is None:
                predicted = self._noise(features, timestep, noisy)
                clean = schedule.clean_from_noise(predicted, timestep, noisy)
            else:
                clean = self._guided(features, schedule, timestep, noisy, guidance)
                if timestep == 0:
                    return clean
                if guidance.uses_gradient and schedule.clip is not None:
                    # Where nearly all is noise, the way back through the network multiplies by a hundred.
                    clean = clean.clamp(-schedule.clip, schedule.clip)
                predicted = schedule.noise_from_clean(clean, timestep, noisy)
            is_chance = self.config.sampler == "ddpm" and timestep > 0
            fresh = normal(shape, noisy, generator) if is_chance else None
            noisy = schedule.back(clean, predicted, timestep, noisy, fresh)
            if self.config.clip is not None and self.config.clips == "noisy":
                noisy = noisy.clamp(-self.config.clip, self.config.clip)
        return noisy

    def _noise(self, features: Features, timestep: int, noisy: torch.Tensor) -> torch.Tensor:
        return self.noise(features, noisy, torch.full((len(noisy),), timestep, device=noisy.device))

    def _guided(
        self,
        features: Features,
        schedule: NoiseSchedule,
        timestep: int,
        noisy: torch.Tensor,
        guidance: Guidance,
    ) -> torch.Tensor:
        """The finished chunk (batch, horizon, dof) that guidance makes of the head's estimate."""
        share, scale = schedule.share(timestep), schedule.scale(timestep)

        def estimate(scaled: torch.Tensor) -> torch.Tensor:
            whole = scaled * scale
            return schedule.clean_from_noise(self._noise(features, timestep, whole), timestep, whole)

        return guidance.guide(estimate, noisy / scale, share)
