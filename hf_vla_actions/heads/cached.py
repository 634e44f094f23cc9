"""A denoiser whose layers attend to the keys and values that the model's layers left of the prompt, as in pi0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from hf_vla_actions.heads.base import Features, HeadError, check_whole
from hf_vla_actions.heads.layers import (
    ChunkTokens,
    Memory,
    Modulation,
    TimeEmbedding,
    blank,
    check_transformer,
    join_heads,
    perceptron,
    split_heads,
)


@dataclass(frozen=True)
class CacheSize:
    """Sizes of a model's cache.

    Args:
        n_layers: of the model.
        kv_heads: key and value heads of each layer.
        head_dim: numbers of a head; even.
    """

    n_layers: int
    kv_heads: int
    head_dim: int

    def __post_init__(self):
        for name in ("n_layers", "kv_heads", "head_dim"):
            check_whole(name, getattr(self, name))
        if self.head_dim % 2:
            raise HeadError(f"rotary positions turn pairs of numbers: head_dim is even, got {self.head_dim}")

    def layer_for(self, block: int, depth: int) -> int:
        """The model's layer to which a block of `depth` attends: its own number if there are as many, else evenly."""
        return -(-(block + 1) * self.n_layers // depth) - 1

    def check(self, features: Features) -> None:
        """Raise unless features hold a cache of these sizes, over all of the prompt."""
        cache = features.cache or ()
        if len(cache) != self.n_layers:
            raise HeadError(f"the head was made for the cache of {self.n_layers} layers, got {len(cache)}")
        shape = (len(features), self.kv_heads, features.hidden.shape[1], self.head_dim)
        for layer, (keys, values) in enumerate(cache):
            if tuple(keys.shape) != shape or tuple(values.shape) != shape:
                raise HeadError(
                    f"keys and values of each layer have shape {shape} (batch, kv_heads, length, head_dim), got "
                    f"{tuple(keys.shape)} and {tuple(values.shape)} in layer {layer}; layers that keep less than the "
                    'prompt, or nothing of it, cannot be attended to: use attend="hidden"'
                )


class JointAttention(nn.Module):
    """Attention of the head's tokens to themselves and to the keys and values of a model's layer, at once.

    Args:
        width: of the tokens.
        n_heads: of the queries; a multiple of the size's `kv_heads`.
        size: of the cache.
    """

    def __init__(self, width: int, n_heads: int, size: CacheSize):
        super().__init__()
        self.n_heads, self.kv_heads = n_heads, size.kv_heads
        self.to_query = nn.Linear(width, n_heads * size.head_dim)
        self.to_key_value = nn.Linear(width, 2 * size.kv_heads * size.head_dim)
        self.out = nn.Linear(n_heads * size.head_dim, width)

    def forward(
        self,
        tokens: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            tokens: (batch, length, width).
            turn: cosines and sines of the tokens' positions, as from `rotary`.
            cache: keys (rotated) and values of a layer, (batch, kv_heads, prompt, head_dim).
            mask: (batch, 1, 1, prompt + length) bool, True = may be seen; None: all may.

        Returns:
            (batch, length, width).
        """
        own_keys, own_values = self.to_key_value(tokens).chunk(2, dim=-1)
        query = rotate(split_heads(self.to_query(tokens), self.n_heads), turn)
        keys = torch.cat([cache[0], rotate(split_heads(own_keys, self.kv_heads), turn)], dim=2)
        values = torch.cat([cache[1], split_heads(own_values, self.kv_heads)], dim=2)
        return self.out(
            join_heads(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True))
        )


class JointBlock(nn.Module):
    """Joint attention and a perceptron, each behind its own modulation."""

    def __init__(self, width: int, n_heads: int, size: CacheSize):
        super().__init__()
        self.modulations = nn.ModuleList(Modulation(width) for _ in range(2))
        self.attention = JointAttention(width, n_heads, size)
        self.perceptron = perceptron(width)

    def forward(
        self,
        tokens: torch.Tensor,
        when: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens (batch, length, width), the embedding of the time and what `JointAttention` takes; tokens again."""
        modulated, gate = self.modulations[0](tokens, when)
        tokens = tokens + gate * self.attention(modulated, turn, cache, mask)
        modulated, gate = self.modulations[1](tokens, when)
        return tokens + gate * self.perceptron(modulated)


class CachedTransformer(nn.Module):
    """A denoiser like `layers.ChunkTransformer` that reads `Features.cache` instead of `Features.hidden`.

    Its tokens stand behind the prompt: their rotary positions go on from `Features.next_position`. Where the model
    stretches its positions (scaled or partial rotary embeddings, a base that differs by layer), those of the head are
    not the model's own; they are the same in every call all the same, and the head learns with them.
    A new one answers zero everywhere.

    Args:
        horizon: steps of a chunk.
        dof: numbers of a step.
        width: of its own tokens.
        depth: blocks.
        n_heads: of the queries; a multiple of the size's `kv_heads`.
        size: of the model's cache.
        rope_theta: base of the model's rotary positions.
        proprio_dim: numbers of the robot's state that it reads; None for none.

    Raises:
        HeadError: sizes that do not go together.
    """

    def __init__(
        self,
        *,
        horizon: int,
        dof: int,
        width: int,
        depth: int,
        n_heads: int,
        size: CacheSize,
        rope_theta: float = 10000.0,
        proprio_dim: int | None = None,
    ):
        super().__init__()
        check_transformer(width, depth, 1)
        if n_heads % size.kv_heads:
            raise HeadError(f"n_heads is a multiple of the model's {size.kv_heads} kv_heads, got {n_heads}")
        self.size, self.rope_theta = size, rope_theta
        self.chunk = ChunkTokens(horizon, dof, width, proprio_dim)
        self.time = TimeEmbedding(width)
        self.blocks = nn.ModuleList(JointBlock(width, n_heads, size) for _ in range(depth))

    def prepare(self, features: Features) -> Memory:
        """What `forward` needs of features, for many calls of it.

        Args:
            features: `cache` with its `mask`, and `proprio` where the head reads one.

        Raises:
            HeadError: a cache of other sizes.
        """
        self.size.check(features)
        n_tokens, depth = self.chunk.n_tokens, len(self.blocks)
        positions = after_prompt(features)[:, None] + torch.arange(n_tokens, device=features.hidden.device)
        turn = rotary(positions, self.size.head_dim, self.rope_theta, features.hidden.dtype)
        cache = features.cache or ()
        chosen = [cache[self.size.layer_for(block, depth)] for block in range(depth)]
        layers = tuple((blank(keys, features.mask), blank(values, features.mask)) for keys, values in chosen)
        mask = None
        if features.mask is not None:
            mask = F.pad(features.mask, (0, n_tokens), value=True)[:, None, None, :]
        return Memory(layers, mask, features.proprio, turn)

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, seen: Features | Memory) -> torch.Tensor:
        """Denoise.

        Args:
            noisy: (batch, horizon, dof).
            time: (batch,) between 0 and 1.
            seen: features, or what `prepare` made of them.

        Returns:
            (batch, horizon, dof).

        Raises:
            HeadError: a cache of other sizes.
        """
        memory = self.prepare(seen) if isinstance(seen, Features) else seen
        when = self.time(time)
        tokens = self.chunk(noisy, memory.proprio)
        for block, keys_values in zip(self.blocks, memory.layers, strict=True):
            tokens = block(tokens, when, memory.turn, keys_values, memory.mask)
        return self.chunk.read(tokens, when)


def after_prompt(features: Features) -> torch.Tensor:
    """(batch,) `Features.next_position`, or the place in the row behind the last real token; 0 behind none."""
    length = features.hidden.shape[1]
    if features.next_position is not None:
        if tuple(features.next_position.shape) != (len(features),):
            raise HeadError(f"next_position has shape ({len(features)},), got {tuple(features.next_position.shape)}")
        return features.next_position
    if features.mask is None:
        return torch.full((len(features),), length, device=features.hidden.device)
    return (features.mask * torch.arange(1, length + 1, device=features.mask.device)).amax(dim=1)


def rotary(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (batch, 1, length, head_dim) of (batch, length) positions.

    Rotary positions (arXiv 2104.09864) in the layout of Transformers' models: number i is paired with i + head_dim / 2.
    """
    rates = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = (positions.float()[..., None] * rates).repeat(1, 1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Queries or keys (batch, n_heads, length, head_dim), turned to their positions."""
    first, second = heads.chunk(2, dim=-1)
    return heads * turn[0] + torch.cat([-second, first], dim=-1) * turn[1]
