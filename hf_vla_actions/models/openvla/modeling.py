"""OpenVLA (arXiv 2406.09246) on current Transformers: the forward pass and `generate`.

Numbers are those of openvla/openvla (`prismatic/extern/hf/modeling_prismatic.py`); module paths equal the keys of its
checkpoints, so LoRA adapters made with the original code load as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.models.openvla.configuration import OpenVLAConfig
from hf_vla_actions.models.openvla.insertion import PatchInsertion
from hf_vla_actions.models.openvla.oft import OFTOutput, install_oft
from hf_vla_actions.models.openvla.oft_policy import OFTPolicyMixin
from hf_vla_actions.models.openvla.vision import AttentionPool, LayerScale, Projector, VisionBackbone, VisionTower


@dataclass
class OpenVLAOutput(CausalLMOutputWithPast):
    """Output of a forward pass.

    Args:
        image_hidden_states: (batch, patches, hidden) projected patches, where the picture went in and the config's
            `output_projector_states` asks for them.
    """

    image_hidden_states: torch.Tensor | None = None


class OpenVLAForActionPrediction(OFTPolicyMixin, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model that sees pictures as patches behind its first token, and speaks in action tokens."""

    config_class = OpenVLAConfig
    config: OpenVLAConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 (read by Transformers as a plain class attribute)
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionBlock"]  # noqa: RUF012 (read by Transformers; those of the text model are added)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(config)
        # The dtype in force, not the one that text_config names: published configs say bfloat16 there, and a float32
        # load must give a float32 language model too.
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        if config.oft is not None:
            install_oft(self, config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            init.ones_(module.scale_factor)
        elif isinstance(module, AttentionPool):
            init.normal_(module.latent, std=0.02)
        elif isinstance(module, VisionTower):
            init.normal_(module.pos_embed, std=0.02)
            if module.num_prefix_tokens:
                init.normal_(module.cls_token, std=0.02)
                init.normal_(module.reg_token, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output rows of the language model."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output rows of the language model."""
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """As in Transformers; the ids of the action tokens stay where they are."""
        if new_num_tokens is not None:
            # They are counted from the number of words, which could not be told from the new number of rows.
            self.config.action_vocab_size = self.config.first_unused_id
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        """Pictures (batch, 3 * towers * images, size, size) to (batch, images * patches, hidden of the text model).

        With FiLM `language` is the mean embedding of each instruction (batch, hidden).
        """
        return self.projector(self.vision_backbone(pixel_values, language))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        proprio: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> OpenVLAOutput | OFTOutput:
        """One pass over the text, and over the pictures unless the cache holds them already.

        Args:
            input_ids: (batch, length) ids of the text; there is no image token in them.
            attention_mask: (batch, length) 0 where padded, on either side. In steps that use a cache: of the whole
                sequence so far with the patches, as `prepare_inputs_for_generation` makes it.
            pixel_values: (batch, 3 * towers * images, size, size) from the checkpoint's image processor. Without it
                the pass is that of the language model alone.
            labels: (batch, length) ids to predict, -100 where nothing is to be learned. `loss` is the mean
                cross-entropy of the next token over the others.
            inputs_embeds: (batch, length, hidden) instead of `input_ids`.
            past_key_values: a cache. An empty one is no sign of a later step: the pictures go in unless it holds
                something (to take any cache for that sign is how the original lost sight of its pictures, openvla
                issue 346).
            position_ids: (batch, length) of the text; counted from each row's first token unless given.
            use_cache: as in Transformers.
            logits_to_keep: number of last positions to compute logits for; 0 for all, patches included.
            proprio: normalized state of the robot, for an OFT policy that reads it: see `predict_chunk`.
            actions: normalized chunks, the target of an OFT policy: see `predict_chunk`.
            kwargs: passed on to the language model.

        Returns:
            OFTOutput of `predict_chunk` for an OFT policy. Else OpenVLAOutput; `logits` (batch, length + patches, vocabulary), or fewer positions with `logits_to_keep`.
        """
        if self.config.oft is not None:
            given = {"labels": labels, "inputs_embeds": inputs_embeds, "past_key_values": past_key_values}
            refused = sorted(name for name, value in given.items() if value is not None)
            if refused or input_ids is None or pixel_values is None:
                raise VLAActionsError(
                    "an OFT policy predicts a chunk in one pass, from input_ids and pixel_values (with actions for a "
                    f"loss); refused: {refused}"
                )
            return self.predict_chunk(input_ids, attention_mask, pixel_values, proprio, actions)
        if proprio is not None or actions is not None:
            raise VLAActionsError("proprio and actions are for OFT policies; this model's config has no `oft`")
        if (input_ids is None) == (inputs_embeds is None):
            raise VLAActionsError("forward takes either input_ids or inputs_embeds, and not both")
        features = None
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and not _holds_something(past_key_values):
            features = self.get_image_features(pixel_values).to(inputs_embeds.device, inputs_embeds.dtype)
            if len(features) != len(inputs_embeds):
                raise VLAActionsError(f"{len(features)} samples of pixel_values for {len(inputs_embeds)} of text")
            insert = PatchInsertion(attention_mask, inputs_embeds.shape[1], features.shape[1])
            inputs_embeds = insert(inputs_embeds, features)
            if attention_mask is not None:
                attention_mask = insert.fill(attention_mask, 1)
            if labels is not None:
                labels = insert.fill(labels, -100)
            if position_ids is not None:
                position_ids = insert.positions(position_ids)
        _check_mask(attention_mask, past_key_values, inputs_embeds.shape[1])
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            counted = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
            position_ids = counted[:, -inputs_embeds.shape[1] :]
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        return OpenVLAOutput(
            loss=out.loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_hidden_states=features if self.config.output_projector_states else None,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        pixel_values: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one step of `generate`, which knows the text only.

        As long as no cache holds the patches, the pictures go along and `forward` inserts them. Afterwards mask and
        positions get the patches' part here, at every step: a cached step must not forget what is padded.
        """
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        patches = self._num_patches(pixel_values)
        # A static cache would make the GPU wait at every token if it were asked for its length.
        sure = not is_first_iteration and past_key_values is not None and past_key_values.is_compileable
        cached = sure or _holds_something(past_key_values)
        given = {"is_first_iteration": is_first_iteration, "inputs_embeds": inputs_embeds, **kwargs}
        if not cached:
            # The cache is put in afterwards: for a static one, Transformers would make a mask without the patches.
            inputs = prepare(
                input_ids,
                next_sequence_length=next_sequence_length,
                past_key_values=None if patches else past_key_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **given,
            )
            if patches:
                inputs |= {"pixel_values": pixel_values, "past_key_values": past_key_values}
            return inputs
        if patches:
            if is_first_iteration and next_sequence_length is not None:
                next_sequence_length += patches  # generate took the length of the cache, patches and all, off the text
            if attention_mask is not None:
                insert = PatchInsertion(attention_mask, attention_mask.shape[1], patches)
                attention_mask = insert.fill(attention_mask, 1)
            if position_ids is not None:
                position_ids = position_ids + patches  # type: ignore[assignment]
        if next_sequence_length is not None and next_sequence_length < 1:
            raise VLAActionsError(
                "the cache holds more than the text: go on with the pixel_values that it was filled with, or without it"
            )
        return prepare(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **given,
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        # A static cache must have room for the patches too.
        more = self._num_patches(model_kwargs.get("pixel_values"))
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + more
        )

    def _num_patches(self, pixel_values: torch.Tensor | None) -> int:
        if pixel_values is None:
            return 0
        return pixel_values.shape[1] // (3 * self.vision_backbone.num_towers) * self.config.num_patches


def _check_mask(attention_mask: torch.Tensor | None, past_key_values: Any | None, length: int) -> None:
    """Refuse a mask of the text alone in a step whose cache holds the patches too: all of it would be shifted."""
    if attention_mask is None or attention_mask.ndim != 2:
        return
    if past_key_values is not None and past_key_values.is_compileable:
        return  # its length is on the GPU
    cached = 0 if past_key_values is None else past_key_values.get_seq_length()
    if attention_mask.shape[1] != cached + length:
        raise VLAActionsError(
            f"the attention mask has {attention_mask.shape[1]} columns for {cached} cached positions (patches included) "
            f"and {length} new ones; generate() and prepare_inputs_for_generation() keep account of them"
        )


def _holds_something(past_key_values: Any | None) -> bool:
    return past_key_values is not None and bool(past_key_values.get_seq_length() > 0)
