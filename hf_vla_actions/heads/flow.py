"""Flow matching: the head learns the velocity that leads from noise to a chunk, and follows it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hf_vla_actions.heads.base import ActionHead, Features, HeadConfig, HeadError, check_number, check_whole
from hf_vla_actions.heads.cached import CachedTransformer, CacheSize
from hf_vla_actions.heads.guidance import Guidance
from hf_vla_actions.heads.layers import ChunkTransformer, Memory, check_transformer
from hf_vla_actions.heads.noise import normal, uniform
from hf_vla_actions.heads.times import FLOW_TIMES, beta_quantile, check_beta

ATTENDS = ("hidden", "cache")
SOLVERS = ("euler", "heun")


@dataclass(frozen=True)
class FlowMatchingConfig(HeadConfig):
    """A head by flow matching, as in pi0 (arXiv 2410.24164), SmolVLA (arXiv 2506.01844) and GR00T N1 (arXiv 2503.14734).

    Args:
        width: of the head's own tokens.
        depth: blocks.
        n_heads: of attention; a multiple of `kv_heads` with attend="cache", else a divisor of `width`.
        attend: "hidden" (cross-attention to the last hidden states of the prompt, as GR00T) or "cache" (each block
            attends to the keys and values of one of the model's layers together with its own, as pi0).
        steps: of integration, when a call names no other number.
        solver: "euler" (the first order, one pass a step) or "heun" (the second, two passes).
        time: "pi0" (1 is noise) or "gr00t" (0 is noise, told in thousandths); see `times`.
        beta: parameters of the beta distribution of the times in training, one of them 1; (1, 1) is uniform.
        n_layers: of the model, with attend="cache"; None until the model is known.
        kv_heads: of the model's layers, with attend="cache"; None until the model is known.
        head_dim: of the model's layers, with attend="cache"; None until the model is known.
        rope_theta: base of the rotary positions of the model's layers, with attend="cache".
    """

    kind = "flow"

    width: int = 512
    depth: int = 6
    n_heads: int = 8
    attend: str = "hidden"
    steps: int = 10
    solver: str = "euler"
    time: str = "pi0"
    beta: tuple[float, float] = (1.5, 1.0)
    n_layers: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0

    def __post_init__(self):
        super().__post_init__()
        check_whole("steps", self.steps)
        for name, possible in (("attend", ATTENDS), ("solver", SOLVERS), ("time", tuple(FLOW_TIMES))):
            if getattr(self, name) not in possible:
                raise HeadError(f"{name} is one of {list(possible)}, got {getattr(self, name)!r}")
        check_beta(self.beta)
        check_number("rope_theta", self.rope_theta, least=1.0)
        # The heads of attend="cache" have the model's head_dim, whatever the width.
        check_transformer(self.width, self.depth, self.n_heads if self.attend == "hidden" else 1)
        check_whole("n_heads", self.n_heads)
        sizes = {name: getattr(self, name) for name in ("n_layers", "kv_heads", "head_dim")}
        if self.attend == "hidden" and any(value is not None for value in sizes.values()):
            raise HeadError(f'attend="hidden" looks at no cache: leave out {list(sizes)}, got {sizes}')
        if self.attend == "cache" and None not in sizes.values():
            self.cache_size()

    def cache_size(self) -> CacheSize:
        """The cache that a head with attend="cache" is made for.

        Raises:
            HeadError: it is not known, or does not go with `n_heads`.
        """
        if self.n_layers is None or self.kv_heads is None or self.head_dim is None:
            raise HeadError(
                'attend="cache" needs n_layers, kv_heads and head_dim of the model; fill them in with '
                "dataclasses.replace(config, n_layers=..., kv_heads=..., head_dim=...)"
            )
        size = CacheSize(self.n_layers, self.kv_heads, self.head_dim)
        if self.n_heads % size.kv_heads:
            raise HeadError(f"n_heads is a multiple of the model's {size.kv_heads} kv_heads, got {self.n_heads}")
        return size

    def fitted(self, *, n_layers: int, kv_heads: int, head_dim: int, rope_theta: float) -> FlowMatchingConfig:
        """See `HeadConfig.fitted`; sizes that are there already stay."""
        if self.attend != "cache" or self.n_layers is not None:
            return self
        sizes = {"n_layers": n_layers, "kv_heads": kv_heads, "head_dim": head_dim}
        return replace(self, **sizes, rope_theta=rope_theta)  # type: ignore[arg-type]

    def build(self, width: int) -> FlowMatchingHead:
        """See `HeadConfig.build`."""
        return FlowMatchingHead(self, width)


class FlowMatchingHead(ActionHead):
    """Learns the velocity with the mean squared error and integrates it from noise to a chunk.

    Args:
        config: what it is made of.
        width: of the model's hidden states.
    """

    def __init__(self, config: FlowMatchingConfig, width: int):
        super().__init__(config, width)
        self.times = FLOW_TIMES[config.time]
        common: dict[str, Any] = {
            "horizon": config.horizon,
            "dof": config.dof,
            "width": config.width,
            "depth": config.depth,
            "n_heads": config.n_heads,
            "proprio_dim": config.proprio_dim,
        }
        self.network: ChunkTransformer | CachedTransformer
        if config.attend == "hidden":
            self.network = ChunkTransformer(**common, features_width=width)
        else:
            self.network = CachedTransformer(**common, size=config.cache_size(), rope_theta=config.rope_theta)

    @property
    def needs_cache(self) -> bool:
        """See `ActionHead.needs_cache`."""
        return self.config.attend == "cache"

    @property
    def takes_guidance(self) -> bool:
        """See `ActionHead.takes_guidance`."""
        return True

    def errors(
        self, features: Features, actions: torch.Tensor, *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Squared errors of the velocity at one drawn time and noise a chunk; see `ActionHead.errors`."""
        noise = normal(tuple(actions.shape), actions, generator)
        time = self.times.from_beta(beta_quantile(uniform(len(actions), actions, generator), self.config.beta))
        predicted = self.network(self.times.mix(actions, noise, time), self.times.told(time), features)
        return (predicted - self.times.velocity(actions, noise)) ** 2

    def draw(
        self,
        features: Features,
        *,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        guidance: Guidance | None = None,
    ) -> torch.Tensor:
        """Integrates the velocity; see `ActionHead.sample`.

        With guidance, the finished chunk is exactly what the guidance makes of the last estimate.
        """
        n_steps = self.config.steps if num_steps is None else num_steps
        if noise is None:
            shape = (len(features), self.config.horizon, self.config.dof)
            noise = normal(shape, features.hidden, generator)
        memory = self.network.prepare(features)
        noisy = noise
        for step in range(n_steps):
            share, after = step / n_steps, (step + 1) / n_steps
            move = self.times.direction * (after - share)
            if guidance is not None and after == 1:
                # A step along the velocity ends here too, but for rounding, which a hard limit would feel.
                return guidance.guide(partial(self.estimate, memory, share), noisy, share)
            velocity = self._velocity(memory, noisy, share, guidance)
            if self.config.solver == "heun":
                ahead = self._velocity(memory, noisy + move * velocity, after, guidance)
                velocity = (velocity + ahead) / 2
            noisy = noisy + move * velocity
        return noisy

    def velocity(self, seen: Features | Memory, share: float, noisy: torch.Tensor) -> torch.Tensor:
        """Velocity (batch, horizon, dof) by the head's own time, where `share` of the way is done."""
        time = self.times.time(torch.full((len(noisy),), share, dtype=noisy.dtype, device=noisy.device))
        return self.network(noisy, self.times.told(time), seen)

    def estimate(self, seen: Features | Memory, share: float, noisy: torch.Tensor) -> torch.Tensor:
        """The finished chunk (batch, horizon, dof) that the head sees in a noisy one."""
        return self.times.clean(noisy, self.velocity(seen, share, noisy), share)

    def _velocity(
        self, seen: Features | Memory, noisy: torch.Tensor, share: float, guidance: Guidance | None
    ) -> torch.Tensor:
        if guidance is None:
            return self.velocity(seen, share, noisy)
        clean = guidance.guide(partial(self.estimate, seen, share), noisy, share)
        return self.times.velocity_to(noisy, clean, share)
