"""The vision towers of OpenVLA: plain ViTs whose module paths are the keys of the checkpoints.

Numbers follow timm 0.9.10 (`timm/models/vision_transformer.py`): pre-norm blocks, LayerNorm eps 1e-6, exact GELU in
both towers. The features are those of the block before the last. What comes after it (last block, final norm, SigLIP's
attention pooling) has weights in every checkpoint and LoRA adapters on them, so it exists here too, but never runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.models.openvla.configuration import PATCH, OpenVLAConfig, TowerSize

EPS = 1e-6


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full attention, written out: (batch, heads, tokens, head width) in, (batch, tokens, heads, head width) out."""
    weights = torch.softmax((query @ key.transpose(2, 3) * scaling).float(), dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class VisionAttention(nn.Module):
    """Every token attends to every token."""

    def __init__(self, config: OpenVLAConfig, size: TowerSize):
        super().__init__()
        self.config = config
        self.heads = size.heads
        self.is_causal = False
        self.scaling = (size.width // size.heads) ** -0.5
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.proj = nn.Linear(size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width) to the same shape."""
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, _ = attend(self, query, key, value, None, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.proj(out.reshape(batch, tokens, width).contiguous())


class VisionMLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()  # erf, also for SigLIP: Transformers' own SiglipVisionModel would use tanh
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) to the same shape."""
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A factor for each number of the width, with the name that OpenVLA's checkpoints give it."""

    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) to the same shape."""
        return x * self.scale_factor


class VisionBlock(GradientCheckpointingLayer):
    """One block of a tower."""

    def __init__(self, config: OpenVLAConfig, size: TowerSize):
        super().__init__()
        scaled = size.kind == "dinov2"
        self.norm1 = nn.LayerNorm(size.width, eps=EPS)
        self.attn = VisionAttention(config, size)
        self.ls1 = LayerScale(size.width) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(size.width, eps=EPS)
        self.mlp = VisionMLP(size.width, size.mlp_width)
        self.ls2 = LayerScale(size.width) if scaled else nn.Identity()
        self.has_film = False

    def add_film(self, hidden: int) -> None:
        """Let the instruction modulate this block: a factor and an offset from its mean embedding (batch, hidden).

        Source: moojink/openvla-oft, `prismatic/models/film_vit_wrapper.py`.
        """
        like = self.norm1.weight
        self.scale = nn.Linear(hidden, len(like), device=like.device, dtype=like.dtype)
        self.shift = nn.Linear(hidden, len(like), device=like.device, dtype=like.dtype)
        self.has_film = True

    def forward(self, x: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, tokens, width) to the same shape; with FiLM also the instruction (batch, hidden)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        if self.has_film:
            if language is None:
                raise VLAActionsError("the instruction modulates this vision tower (FiLM): it cannot run without")
            x = x * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """A linear map of each 14 x 14 patch."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=PATCH, stride=PATCH)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) to (batch, patches, width), row by row."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """SigLIP's pooling: only a holder of weights, which no OpenVLA model uses."""

    def __init__(self, size: TowerSize):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, size.width))
        self.q = nn.Linear(size.width, size.width)
        self.kv = nn.Linear(size.width, 2 * size.width)
        self.proj = nn.Linear(size.width, size.width)
        self.norm = nn.LayerNorm(size.width, eps=EPS)
        self.mlp = VisionMLP(size.width, size.mlp_width)


class VisionTower(nn.Module):
    """One ViT; returns the patches' features after the block before the last."""

    def __init__(self, config: OpenVLAConfig, size: TowerSize):
        super().__init__()
        self.num_prefix_tokens = size.num_prefix_tokens
        self.patch_embed = PatchEmbedding(size.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, size.num_patches, size.width))
        if size.kind == "dinov2":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
            self.reg_token = nn.Parameter(torch.zeros(1, size.num_prefix_tokens - 1, size.width))
        self.blocks = nn.ModuleList(VisionBlock(config, size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=EPS)
        if size.kind == "siglip":
            self.attn_pool = AttentionPool(size)

    def forward(self, pixels: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, 3, height, width), and with FiLM (batch, hidden), to (batch, patches, width)."""
        # Not the convolution's dtype: an adapter or a quantizer may have wrapped it.
        x = self.patch_embed(pixels.to(self.pos_embed.dtype)) + self.pos_embed
        if self.num_prefix_tokens:
            # They stand in front and have no position.
            prefix = torch.cat([self.cls_token, self.reg_token], dim=1)
            x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks[:-1]:
            x = block(x, language)
        return x[:, self.num_prefix_tokens :]


class VisionBackbone(nn.Module):
    """One tower, or two whose features stand side by side (DINOv2 first)."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        towers = config.towers
        self.num_towers = len(towers)
        self.image_size = towers[0].image_size
        self.featurizer = VisionTower(config, towers[0])
        if self.num_towers == 2:
            self.fused_featurizer = VisionTower(config, towers[1])

    def forward(self, pixel_values: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, 3 * towers * images, height, width) to (batch, images * patches, sum of the towers' widths).

        With FiLM `language` is the mean embedding of each instruction (batch, hidden).
        """
        channels = 3 * self.num_towers
        if pixel_values.ndim != 4 or not pixel_values.shape[1] or pixel_values.shape[1] % channels:
            raise VLAActionsError(
                f"pixel_values have shape (batch, {channels} for each image, {self.image_size}, {self.image_size}), got "
                f"{tuple(pixel_values.shape)}; use the checkpoint's own image processor"
            )
        if pixel_values.shape[2:] != (self.image_size, self.image_size):
            raise VLAActionsError(
                f"the model sees pictures of {self.image_size} x {self.image_size} pixels, got "
                f"{tuple(pixel_values.shape[2:])}; use the checkpoint's own image processor"
            )
        batch = len(pixel_values)
        # Several images come stacked along the channels; each goes through the towers like a sample of its own.
        images = pixel_values.reshape(-1, channels, *pixel_values.shape[2:])
        if language is not None:
            language = language.repeat_interleave(len(images) // batch, dim=0)
        features = self.featurizer(images[:, :3], language)
        if self.num_towers == 2:
            features = torch.cat([features, self.fused_featurizer(images[:, 3:], language)], dim=2)
        return features.reshape(batch, -1, features.shape[-1])


class Projector(nn.Module):
    """From the width of the vision features to that of the language model: an MLP with exact GELU."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        width = sum(tower.width for tower in config.towers)
        hidden: int = config.text_config.hidden_size  # type: ignore[union-attr]
        self.fused = bool(config.use_fused_vision_backbone)
        first = 4 * width if self.fused else hidden
        self.fc1 = nn.Linear(width, first)
        self.fc2 = nn.Linear(first, hidden)
        if self.fused:
            self.fc3 = nn.Linear(hidden, hidden)
        self.act = nn.GELU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, patches, width of the features) to (batch, patches, width of the language model)."""
        x = self.fc2(self.act(self.fc1(features)))
        return self.fc3(self.act(x)) if self.fused else x
