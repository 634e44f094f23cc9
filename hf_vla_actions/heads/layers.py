"""Transformer blocks of a denoiser: noisy chunks and a time in, something of the chunks' shape out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from hf_vla_actions.heads.base import Features, HeadError, check_whole


class TimeEmbedding(nn.Module):
    """Times as sines and cosines of geometrically spaced periods, then a small perceptron.

    The periods go from 0.004 to 4, as in openpi (`create_sinusoidal_pos_embedding` of its `models/pi0.py`), made for
    times between 0 and 1; discrete timesteps are divided by their number first.

    Args:
        width: of the embedding; even.
    """

    def __init__(self, width: int):
        super().__init__()
        self.n_periods = width // 2
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        """From (batch,) times between 0 and 1 to (batch, width)."""
        # In float32 whatever the weights are: half precision cannot tell times apart at the shortest period.
        periods = torch.logspace(math.log10(4e-3), math.log10(4.0), self.n_periods, device=time.device)
        angles = 2 * math.pi * time.float()[:, None] / periods
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.second(F.silu(self.first(waves.to(self.first.weight.dtype))))


class Modulation(nn.Module):
    """Shift, scale and gate of a part of a block, from the time: adaptive layer norm that begins as zero.

    Source: "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), adaLN-Zero.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.linear = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: torch.Tensor, when: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Modulated tokens (batch, length, width) and the gate (batch, 1, width) for what is made of them."""
        shift, scale, gate = self.linear(F.silu(when))[:, None].chunk(3, dim=-1)
        return self.norm(tokens) * (1 + scale) + shift, gate


class Attention(nn.Module):
    """Attention of tokens to each other, or to a memory.

    Args:
        width: of the tokens and of the memory.
        n_heads: divides the width.
    """

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.to_query = nn.Linear(width, width)
        self.to_key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, n_heads, length, head_dim) of (batch, length, width)."""
        keys, values = self.to_key_value(memory).chunk(2, dim=-1)
        return split_heads(keys, self.n_heads), split_heads(values, self.n_heads)

    def forward(
        self,
        tokens: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            tokens: (batch, length, width).
            keys_values: of what to attend to; None: of the tokens themselves.
            mask: (batch, 1, 1, memory_length) bool, True = may be seen; None: all may.

        Returns:
            (batch, length, width); zeros before the output layer where nothing may be seen.
        """
        keys, values = self.keys_values(tokens) if keys_values is None else keys_values
        query = split_heads(self.to_query(tokens), self.n_heads)
        return self.out(join_heads(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)))


class Block(nn.Module):
    """Self-attention over the chunk, cross-attention to the memory, perceptron; each behind its own modulation."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.modulations = nn.ModuleList(Modulation(width) for _ in range(3))
        self.self_attention = Attention(width, n_heads)
        self.cross_attention = Attention(width, n_heads)
        self.perceptron = perceptron(width)

    def forward(
        self,
        tokens: torch.Tensor,
        when: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tokens (batch, length, width), the embedding of the time, the memory's and its mask; tokens again."""
        modulated, gate = self.modulations[0](tokens, when)
        tokens = tokens + gate * self.self_attention(modulated)
        modulated, gate = self.modulations[1](tokens, when)
        tokens = tokens + gate * self.cross_attention(modulated, keys_values, mask)
        modulated, gate = self.modulations[2](tokens, when)
        return tokens + gate * self.perceptron(modulated)


class ChunkTokens(nn.Module):
    """A noisy chunk as tokens: a learned position for each step, and one token of the robot's state before them.

    Args:
        horizon: steps of a chunk.
        dof: numbers of a step.
        width: of the tokens.
        proprio_dim: numbers of the robot's state; None for no such token.
    """

    def __init__(self, horizon: int, dof: int, width: int, proprio_dim: int | None):
        super().__init__()
        self.horizon = horizon
        self.embed = nn.Linear(dof, width)
        self.positions = nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.proprio = None if proprio_dim is None else nn.Linear(proprio_dim, width)
        self.norm = Modulation(width)
        self.readout = nn.Linear(width, dof)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    @property
    def n_tokens(self) -> int:
        """Of a chunk, with that of the robot's state."""
        return self.horizon + (self.proprio is not None)

    def forward(self, noisy: torch.Tensor, proprio: torch.Tensor | None) -> torch.Tensor:
        """From (batch, horizon, dof) to (batch, n_tokens, width)."""
        tokens = self.embed(noisy) + self.positions
        if self.proprio is None:
            return tokens
        return torch.cat([self.proprio(proprio)[:, None], tokens], dim=1)

    def read(self, tokens: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        """From tokens back to (batch, horizon, dof)."""
        return self.readout(self.norm(tokens[:, -self.horizon :], when)[0])


@dataclass(frozen=True)
class Memory:
    """What a denoiser makes of features, once for all steps of a chunk.

    Args:
        layers: keys and values of each block, (batch, kv_heads, length, head_dim).
        mask: (batch, 1, 1, length) bool, True = may be seen; None: all may.
        proprio: as in the features.
        turn: cosines and sines of the tokens' rotary positions, for a denoiser that has them.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    mask: torch.Tensor | None
    proprio: torch.Tensor | None
    turn: tuple[torch.Tensor, torch.Tensor] | None = None


class ChunkTransformer(nn.Module):
    """A denoiser: from a noisy chunk, a time and features to something of the chunk's shape.

    A new one answers zero everywhere, whatever it is given.

    Args:
        horizon: steps of a chunk.
        dof: numbers of a step.
        width: of its own tokens.
        depth: blocks.
        n_heads: of attention; divides the width.
        features_width: of the model's hidden states.
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
        features_width: int,
        proprio_dim: int | None = None,
    ):
        super().__init__()
        check_transformer(width, depth, n_heads)
        self.chunk = ChunkTokens(horizon, dof, width, proprio_dim)
        self.time = TimeEmbedding(width)
        # Hidden states of a language model hold a few huge numbers, which the norm takes away.
        self.memory = nn.Sequential(nn.LayerNorm(features_width), nn.Linear(features_width, width))
        self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(depth))

    def prepare(self, features: Features) -> Memory:
        """What `forward` needs of features, for many calls of it.

        Args:
            features: `hidden` with its `mask`, and `proprio` where the head reads one.
        """
        memory = self.memory(blank(features.hidden, features.mask))
        layers = tuple(block.cross_attention.keys_values(memory) for block in self.blocks)  # type: ignore[union-attr, operator]
        mask = None if features.mask is None else features.mask[:, None, None, :]
        return Memory(layers, mask, features.proprio)

    def forward(self, noisy: torch.Tensor, time: torch.Tensor, seen: Features | Memory) -> torch.Tensor:
        """Denoise.

        Args:
            noisy: (batch, horizon, dof).
            time: (batch,) between 0 and 1.
            seen: features, or what `prepare` made of them.

        Returns:
            (batch, horizon, dof).
        """
        memory = self.prepare(seen) if isinstance(seen, Features) else seen
        when = self.time(time)
        tokens = self.chunk(noisy, memory.proprio)
        for block, keys_values in zip(self.blocks, memory.layers, strict=True):
            tokens = block(tokens, when, keys_values, memory.mask)
        return self.chunk.read(tokens, when)


def check_transformer(width: int, depth: int, n_heads: int) -> None:
    """Raise unless a transformer can have these sizes."""
    for name, value in (("width", width), ("depth", depth), ("n_heads", n_heads)):
        check_whole(name, value)
    if width % n_heads or width % 2:
        raise HeadError(f"the width is even and a multiple of n_heads, got width {width} and {n_heads} heads")


def perceptron(width: int, factor: int = 4) -> nn.Sequential:
    """The two layers of a block, the hidden one `factor` times as wide."""
    return nn.Sequential(
        nn.Linear(width, factor * width), nn.GELU(approximate="tanh"), nn.Linear(factor * width, width)
    )


def blank(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Hidden states (batch, ..., length, width) with zeros at padding, where some models leave NaN.

    Nothing attends there, but NaN times zero would still be NaN.
    """
    if mask is None:
        return hidden
    return torch.where(mask.view(len(mask), *[1] * (hidden.ndim - 3), -1, 1), hidden, 0.0)


def split_heads(tokens: torch.Tensor, n_heads: int) -> torch.Tensor:
    """From (batch, length, n_heads * head_dim) to (batch, n_heads, length, head_dim); `join_heads` goes back."""
    return tokens.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def join_heads(heads: torch.Tensor) -> torch.Tensor:
    """From (batch, n_heads, length, head_dim) to (batch, length, n_heads * head_dim)."""
    return heads.transpose(1, 2).flatten(2)
