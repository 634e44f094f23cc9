"""OpenVLA-OFT (arXiv 2502.19645): a whole chunk in one pass through the language model.

The sequence is BOS, the patches of all pictures, the robot's state (one token), for diffusion the timestep (one
token), the prompt, one slot for each number of the chunk, the stop token. Every token sees every other. Source:
moojink/openvla-oft, `prismatic/extern/hf/modeling_prismatic.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.heads.schedules import DDIM
from hf_vla_actions.models.openvla.configuration import OpenVLAConfig
from hf_vla_actions.models.openvla.heads import DiffusionHead, L1Head, TokenProjector, timestep_embedding
from hf_vla_actions.models.openvla.insertion import PatchInsertion
from hf_vla_actions.models.openvla.oft_config import OFTOptions
from hf_vla_actions.models.openvla.policy import close_prompt


@dataclass
class OFTOutput(ModelOutput):
    """One pass of an OFT policy.

    Args:
        loss: where actions were given: mean absolute error ("l1"), cross-entropy of their tokens ("discrete") or
            squared error of the noise ("diffusion").
        normalized: (batch, horizon, dof) float32: predicted actions ("l1"), denoised actions ("diffusion", without
            loss). None where the tokens say it ("discrete").
        logits: (batch, horizon * dof, vocabulary) of the slots ("discrete").
        slot_states: (batch, horizon * dof, hidden): what the head was given; of the last pass.
    """

    loss: torch.Tensor | None = None
    normalized: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    slot_states: torch.Tensor | None = None


def install_oft(model: Any, config: OpenVLAConfig) -> list[str]:
    """Add the modules of an OFT policy to a model, with random weights.

    Args:
        model: OpenVLAForActionPrediction without them.
        config: its configuration, with `oft`.

    Returns:
        Names of the modules that were added; those of FiLM are inside the vision backbone.
    """
    options: OFTOptions = config.oft_options  # type: ignore[assignment]
    hidden: int = config.text_config.hidden_size  # type: ignore[union-attr]
    parts: dict[str, nn.Module] = {}
    if options.mode == "l1":
        parts["action_head"] = L1Head(hidden, options.dof)
    elif options.mode == "diffusion":
        parts["action_head"] = DiffusionHead(hidden, options.dof)
        parts["noisy_action_projector"] = TokenProjector(1, hidden)
    if options.proprio_dim is not None:
        parts["proprio_projector"] = TokenProjector(options.proprio_dim, hidden)
    like: torch.Tensor = model.projector.fc1.weight
    for name, part in parts.items():
        # Where a loaded model is, and as wide; quantized weights are whole numbers.
        model.add_module(name, part.to(like.device, like.dtype if like.is_floating_point() else None))
    if options.use_film:
        backbone: Any = model.vision_backbone
        towers = [backbone.featurizer] + ([backbone.fused_featurizer] if backbone.num_towers == 2 else [])
        for tower in towers:
            for block in tower.blocks:
                block.add_film(hidden)
    return list(parts)


class OFTForward:
    """The forward pass of an OFT policy, mixed into OpenVLAForActionPrediction."""

    config: OpenVLAConfig

    def predict_chunk(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor,
        proprio: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        *,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> OFTOutput:
        """Predict chunks, or with actions the loss.

        Args:
            input_ids: (batch, length) prompts, padded on the left; 29871 is appended where it is missing.
            attention_mask: (batch, length); None if nothing is padded.
            pixel_values: (batch, 3 * towers * num_images, size, size).
            proprio: (batch, proprio_dim) normalized; only for a policy that reads it, which cannot do without.
            actions: (batch, horizon, dof) normalized, for the loss.
            noise: (batch, horizon, dof) that denoising starts from, or with actions what is added to them
                ("diffusion" only); drawn if None.
            timesteps: (batch,) with actions: how much of it; drawn if None. With both noise and timesteps and no
                actions a single pass is made, and `normalized` is the noise it predicts.

        Raises:
            VLAActionsError: shapes that do not fit the policy, or NaN in proprio or actions.
        """
        options = self._options()
        if options.mode != "diffusion" and (noise is not None or timesteps is not None):
            raise VLAActionsError(f"noise and timesteps are for diffusion; this policy is {options.mode!r}")
        slots = self._slots(options, input_ids, attention_mask, pixel_values, proprio)
        if actions is not None:
            actions = _numbers(actions, (len(input_ids), options.horizon, options.dof), "actions").to(self._device())
        if options.mode == "l1":
            states = slots(None, None)
            normalized = self.action_head(states).float()  # type: ignore[attr-defined]
            loss = None if actions is None else (normalized - actions).abs().mean()
            return OFTOutput(loss=loss, normalized=normalized, slot_states=states)
        if options.mode == "discrete":
            states = slots(None, None)
            logits = self.get_output_embeddings()(states)  # type: ignore[attr-defined]
            loss = None
            if actions is not None:
                config = self.action_config  # type: ignore[attr-defined]
                codes = config.tokenizer.encode(actions.double().cpu().numpy())
                ids = torch.from_numpy(config.vocabulary.to_ids(codes)).to(logits.device)
                loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
            return OFTOutput(loss=loss, logits=logits, slot_states=states)
        return self._diffusion(options, slots, len(input_ids), actions, noise, timesteps)

    def _diffusion(
        self,
        options: OFTOptions,
        slots: Callable[[torch.Tensor | None, torch.Tensor | None], torch.Tensor],
        batch: int,
        actions: torch.Tensor | None,
        noise: torch.Tensor | None,
        timesteps: torch.Tensor | None,
    ) -> OFTOutput:
        shape = (batch, options.horizon, options.dof)
        device, head = self._device(), self.action_head  # type: ignore[attr-defined]
        drawn = torch.randn(shape, device=device) if noise is None else _numbers(noise, shape, "noise").to(device)
        scheduler = DDIM(options.diffusion_train_steps, options.steps)
        if actions is not None:
            if timesteps is None:
                timesteps = torch.randint(options.diffusion_train_steps, (batch,), device=device)
            states = slots(scheduler.add_noise(actions, drawn, timesteps.to(device)), timesteps)
            loss = nn.functional.mse_loss(head(states).float(), drawn)
            return OFTOutput(loss=loss, slot_states=states)
        if timesteps is not None:
            states = slots(drawn, timesteps)
            return OFTOutput(normalized=head(states).float(), slot_states=states)
        sample = drawn
        for timestep in scheduler.timesteps:
            states = slots(sample, torch.full((batch,), timestep, device=device))
            sample = scheduler.step(head(states).float(), timestep, sample)
        return OFTOutput(normalized=sample, slot_states=states)

    def _slots(self, options, input_ids, attention_mask, pixel_values, proprio):
        """A function of noisy actions (batch, horizon, dof) and timesteps (batch,) to the states of the slots.

        What does not depend on them (pictures, prompt) is computed once.
        """
        ids, mask = close_prompt(input_ids, attention_mask, self.config.pad_token_id or 0)
        if mask is None:
            mask = torch.ones_like(ids)
        batch, length = ids.shape
        images, rest = divmod(pixel_values.shape[1], 3 * self.vision_backbone.num_towers)  # type: ignore[attr-defined]
        if images != options.num_images or rest:
            raise VLAActionsError(
                f"the policy was trained on {options.num_images} picture(s) a sample, got {images} (pixel_values of "
                f"{pixel_values.shape[1]} channels)"
            )
        if len(pixel_values) != batch:
            raise VLAActionsError(f"{len(pixel_values)} samples of pixel_values for {batch} of text")
        stop = self._stop()
        embed = self.get_input_embeddings()  # type: ignore[attr-defined]
        text = embed(torch.cat([ids, torch.full_like(ids[:, :1], stop)], dim=1))
        seen = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        language = None
        if options.use_film:
            weights = seen.to(text.dtype)[..., None]
            language = (text * weights).sum(dim=1) / weights.sum(dim=1)
        front = [self.get_image_features(pixel_values, language).to(text.device, text.dtype)]  # type: ignore[attr-defined]
        front += self._proprio_token(options, proprio, batch, text)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1]).expand(-1, options.n_slots + 1)], dim=1)

        def states(noisy: torch.Tensor | None, timesteps: torch.Tensor | None) -> torch.Tensor:
            tokens = list(front)
            empty = text.new_zeros(batch, options.n_slots, text.shape[-1])
            if noisy is not None and timesteps is not None:
                tokens.append(timestep_embedding(timesteps.to(text.device), text.shape[-1])[:, None].to(text.dtype))
                empty = self.noisy_action_projector(noisy.reshape(batch, -1, 1)).to(text.dtype)  # type: ignore[attr-defined]
            before = torch.cat(tokens, dim=1)
            insert = PatchInsertion(mask, mask.shape[1], before.shape[1])
            embeds = insert(torch.cat([text[:, :-1], empty, text[:, -1:]], dim=1), before)
            whole = insert.fill(mask, 1)
            out = self.language_model.base_model(  # type: ignore[attr-defined]
                inputs_embeds=embeds,
                attention_mask=whole,
                position_ids=(whole.cumsum(dim=1) - 1).clamp(min=0),
                use_cache=False,
                # The configuration says so to the masks; this, where no mask is needed, to the attention itself.
                is_causal=False,
            )
            # Shifted by one, as in next-token prediction: the first slot is the last token of the prompt.
            first = length + before.shape[1] - 1
            return out.last_hidden_state[:, first : first + options.n_slots]

        return states

    def _proprio_token(self, options: OFTOptions, proprio, batch: int, text: torch.Tensor) -> list[torch.Tensor]:
        if options.proprio_dim is None:
            if proprio is not None:
                raise VLAActionsError("this policy was not trained to read proprio; leave it out")
            return []
        if proprio is None:
            raise VLAActionsError(f"this policy reads the robot's state: pass proprio ({options.proprio_dim} numbers)")
        state = _numbers(proprio, (batch, options.proprio_dim), "proprio").to(text.device)
        return [self.proprio_projector(state)[:, None].to(text.dtype)]  # type: ignore[attr-defined]

    def _options(self) -> OFTOptions:
        options = self.config.oft_options
        if options is None:
            raise VLAActionsError("this model is no OFT policy: its config has no `oft`; load_oft() makes one")
        return options

    def _stop(self) -> int:
        end = self.config.text_config.eos_token_id  # type: ignore[union-attr]
        return end if isinstance(end, int) else end[0]

    def _device(self) -> torch.device:
        return self.get_input_embeddings().weight.device  # type: ignore[attr-defined]


def _numbers(values: Any, shape: tuple[int, ...], what: str) -> torch.Tensor:
    """A finite float32 tensor of a shape; a single sample may come without its first axis."""
    tensor = torch.as_tensor(values).detach().to(torch.float32)
    if shape[0] == 1 and tuple(tensor.shape) == shape[1:]:
        tensor = tensor[None]
    if tuple(tensor.shape) != shape:
        raise VLAActionsError(f"{what} must have shape {shape}, got {tuple(tensor.shape)}")
    if not bool(torch.isfinite(tensor).all()):
        raise VLAActionsError(f"{what} has NaN or infinite values")
    return tensor
