"""Configuration of OpenVLA checkpoints (openvla/openvla, `prismatic/extern/hf/configuration_prismatic.py`)."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.models.openvla.oft_config import OFTOptions

PATCH = 14
RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
# A config names its towers by backbone id: towers (timm 0.9.10) and picture size.
_DINOV2, _SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip"
BACKBONES: dict[str, tuple[list[str], int]] = {
    "siglip-vit-so400m": ([f"{_SIGLIP}_224"], 224),
    "siglip-vit-so400m-384px": ([f"{_SIGLIP}_384"], 384),
    "dinov2-vit-l": ([_DINOV2], 224),
    "dinosiglip-vit-so-224px": ([_DINOV2, f"{_SIGLIP}_224"], 224),
    "dinosiglip-vit-so-384px": ([_DINOV2, f"{_SIGLIP}_384"], 384),
}
_SIZES: dict[str, dict[str, Any]] = {
    _DINOV2: {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0},
    _SIGLIP: {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
}


@dataclass(frozen=True)
class TowerSize:
    """Sizes of one vision tower.

    Args:
        kind: "dinov2" (class token, register tokens, LayerScale) or "siglip" (attention pooling, never used).
        width: numbers in one patch's feature.
        depth: blocks; the last one never runs.
        heads: attention heads.
        mlp_width: hidden width of a block's MLP.
        image_size: edge of the square picture, pixels.
    """

    kind: str
    width: int
    depth: int
    heads: int
    mlp_width: int
    image_size: int

    @property
    def num_patches(self) -> int:
        """Patches of one picture."""
        return (self.image_size // PATCH) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: a class token and four registers in DINOv2, none in SigLIP."""
        return 5 if self.kind == "dinov2" else 0


@strict
class OpenVLAConfig(PreTrainedConfig):
    """Configuration of an OpenVLA model; reads the `config.json` of the published checkpoints.

    Fields that are not named here are kept and saved again, except `auto_map`: it names code files, and the classes
    of this package are used instead.

    Args:
        vision_backbone_id: name of the vision backbone; see `BACKBONES`.
        use_fused_vision_backbone: two towers side by side; by default whether the id starts with dinosiglip or
            dinoclip.
        timm_model_ids: one model name a tower, DINOv2 first; by default those of the backbone.
        image_sizes: edge of the square picture in pixels, one a tower.
        vision_overrides: one entry a tower with `embed_dim`, `depth`, `num_heads`, `mlp_ratio` (each may be left
            out), for towers of other sizes than those behind the timm name.
        text_config: configuration of the language model (Llama unless it says otherwise).
        pad_token_id: id of padding.
        pad_to_multiple_of: rows of the embeddings behind the last word; action tokens end right before them.
        action_vocab_size: number of words, the last of which are the action tokens; by default `vocab_size` of the
            text model less `pad_to_multiple_of`. Written down when the embeddings are resized.
        n_action_bins: edges of the bins of an action, which is also the number of action tokens.
        norm_stats: `{unnorm_key: {"action": {"q01": [...], "q99": [...], "mask": [...]}, ...}}`.
        image_resize_strategy: "resize-naive", "resize-crop" or "letterbox".
        output_projector_states: return the projected patches with each forward pass.
        tie_word_embeddings: embeddings and output rows are one tensor; follows the text model.
        oft: fields of `OFTOptions`, for an OpenVLA-OFT policy: a whole chunk in one pass.

    Raises:
        CheckpointError: fields that contradict each other, or a tower whose sizes nobody knows.
    """

    model_type = "openvla"
    # No `from __future__ import annotations` in this file: fields would not be checked.
    keys_to_ignore_at_inference = ("past_key_values",)
    sub_configs_defaults = {  # noqa: RUF012 (read by Transformers as a plain class attribute)
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="llama", init_kwargs={"vocab_size": 32064, "pad_token_id": 32000}
        )
    }

    vision_backbone_id: str = "dinosiglip-vit-so-224px"
    use_fused_vision_backbone: bool | None = None
    timm_model_ids: list[str] | None = None
    image_sizes: list[int] | None = None
    vision_overrides: list[dict[str, Any]] | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    pad_token_id: int | None = 32000
    pad_to_multiple_of: int = 64
    action_vocab_size: int | None = None
    n_action_bins: int = 256
    norm_stats: dict[str, Any] | None = None
    image_resize_strategy: str = "resize-naive"
    output_projector_states: bool = False
    tie_word_embeddings: bool = False
    oft: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        kwargs.pop("auto_map", None)
        if self.use_fused_vision_backbone is None:
            self.use_fused_vision_backbone = self.vision_backbone_id.startswith(("dinosiglip", "dinoclip"))
        known = BACKBONES.get(self.vision_backbone_id)
        if self.timm_model_ids is None and known is not None:
            self.timm_model_ids = list(known[0])
        if self.image_sizes is None and known is not None:
            self.image_sizes = [known[1]] * len(known[0])
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(self.tie_word_embeddings or self._text("tie_word_embeddings", False))
        self.text_config.tie_word_embeddings = self.tie_word_embeddings  # type: ignore[union-attr]
        if self.oft is not None:
            self.set_oft(OFTOptions.from_dict(self.oft))
        self._check()

    def set_oft(self, options: OFTOptions) -> None:
        """Make this the configuration of an OFT policy, whose language model attends in both directions."""
        self.oft = options.to_dict()
        self.text_config.is_causal = False  # type: ignore[union-attr]

    @property
    def oft_options(self) -> OFTOptions | None:
        """Constants of an OFT policy; None for OpenVLA as it was."""
        return None if self.oft is None else OFTOptions.from_dict(self.oft)

    def _text(self, name: str, default: Any = None) -> Any:
        return getattr(self.text_config, name, default)

    def _check(self) -> None:
        if self.image_resize_strategy not in RESIZE_STRATEGIES:
            raise CheckpointError(
                f"image_resize_strategy must be one of {list(RESIZE_STRATEGIES)}, got {self.image_resize_strategy!r}"
            )
        if not 0 < self.n_action_bins <= self.first_unused_id:
            raise CheckpointError(
                f"{self.n_action_bins} action tokens do not fit into {self.first_unused_id} words (vocab_size "
                f"{self._text('vocab_size')} less pad_to_multiple_of {self.pad_to_multiple_of})"
            )
        sizes = self.towers
        if len({tower.num_patches for tower in sizes}) > 1:
            raise CheckpointError(
                f"towers see different numbers of patches {[tower.num_patches for tower in sizes]}; their features "
                f"are put side by side, so image_sizes {self.image_sizes} must agree"
            )

    @property
    def first_unused_id(self) -> int:
        """The id behind the last word: action tokens are counted backwards from here, rows from here on are unused."""
        if self.action_vocab_size is not None:
            return self.action_vocab_size
        return int(self._text("vocab_size")) - self.pad_to_multiple_of

    @property
    def towers(self) -> list[TowerSize]:
        """Sizes of the vision towers, in the order of their features."""
        wanted = 2 if self.use_fused_vision_backbone else 1
        names, sizes = self.timm_model_ids, self.image_sizes
        if not names or not sizes or len(names) != wanted or len(sizes) != wanted:
            raise CheckpointError(
                f"vision backbone {self.vision_backbone_id!r} has {wanted} tower(s), which takes as many timm_model_ids "
                f"and image_sizes; got {names} and {sizes}. Known backbones: {sorted(BACKBONES)}"
            )
        overrides = self.vision_overrides or [{} for _ in names]
        if len(overrides) != wanted:
            raise CheckpointError(f"vision_overrides needs one entry a tower, got {len(overrides)} for {wanted}")
        return [_tower(*values) for values in zip(names, sizes, overrides, strict=True)]

    @property
    def num_patches(self) -> int:
        """Patches of one picture, each of which becomes one position of the language model."""
        return self.towers[0].num_patches


def _tower(name: str, image_size: int, override: dict[str, Any]) -> TowerSize:
    kind = next((kind for kind in ("dinov2", "siglip") if kind in name), None)
    sizes = {**next((known for start, known in _SIZES.items() if name.startswith(start)), {}), **override}
    missing = [field for field in _SIZES[_DINOV2] if field not in sizes]
    if kind is None or missing:
        raise CheckpointError(
            f"vision tower {name!r} is not known; known are {sorted(_SIZES)}, and DINOv2 (with four registers) or "
            f"SigLIP towers of other sizes through vision_overrides with {sorted(_SIZES[_DINOV2])}"
        )
    width, depth, heads = int(sizes["embed_dim"]), int(sizes["depth"]), int(sizes["num_heads"])
    if width % heads or depth < 2 or image_size < PATCH:
        raise CheckpointError(
            f"vision tower {name!r}: width {width} must divide by {heads} heads, depth {depth} must be at least 2 (the "
            f"features are those of the block before the last), pictures of {image_size} must hold a patch of {PATCH}"
        )
    return TowerSize(kind, width, depth, heads, int(width * sizes["mlp_ratio"]), int(image_size))
