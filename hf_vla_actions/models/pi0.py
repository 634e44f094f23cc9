"""Transformers' own PI0 as a policy: real units, constraints, chunks to carry out."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.pi0.processing_pi0 import PI0Processor

from hf_vla_actions.actions.formats import parse_stats
from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import CheckpointError, StatsError, VLAActionsError
from hf_vla_actions.heads import ActionHead, Features, NativeFlowConfig
from hf_vla_actions.heads.flow import FlowMatchingHead
from hf_vla_actions.heads.times import FLOW_TIMES
from hf_vla_actions.models.continuous import HeadPolicyMixin, forward_of
from hf_vla_actions.models.families import PI0
from hf_vla_actions.models.features import cache_of, uses_cache
from hf_vla_actions.models.mixin import ActionPredictionMixin, native_class_of
from hf_vla_actions.models.pi0_processor import PI0Prompts, check_pi0_processor, normalized_state

UNNORM_KEY = "pi0"  # statistics of a PI0Processor have no name


class PI0Expert:
    """The velocity as PI0 itself computes it; stands where a `FlowMatchingHead` has its network.

    Args:
        policy: PI0 model with its `native_forward`.
    """

    def __init__(self, policy: Any):
        self.policy = policy

    def prepare(self, features: Features) -> Features:
        """What stays the same over all steps."""
        return features

    def __call__(self, noisy: torch.Tensor, time: torch.Tensor, seen: Features) -> torch.Tensor:
        """Velocity (batch, horizon, dof) of noisy chunks at (batch,) times."""
        # A cache of its own for each pass, which appends to it.
        cache = DynamicCache(seen.cache)
        out = self.policy.native_forward(
            state=normalized_state(seen.proprio, len(noisy), self.policy.config.max_state_dim, noisy),
            noise=noisy,
            timestep=time.float(),
            attention_mask=seen.mask.long(),  # type: ignore[union-attr]
            past_key_values=cache,
        )
        return out.logits


class PI0Head(FlowMatchingHead):
    """PI0's own flow by the interface of the heads; the weights stay the model's.

    Loss, integration and guidance are those of `FlowMatchingHead`; noise and times are drawn as there, of the same
    distributions as by the model itself.

    Args:
        policy: PI0 model with its `native_forward`.
        config: what `to_vla` was given.
    """

    def __init__(self, policy: Any, config: NativeFlowConfig):
        ActionHead.__init__(self, config, policy.config.vlm_config.text_config.hidden_size)
        self.times = FLOW_TIMES[config.time]
        self.network = PI0Expert(policy)  # type: ignore[assignment]

    @property
    def needs_cache(self) -> bool:
        """See `ActionHead.needs_cache`."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's projection of actions."""
        return self.network.policy.action_out_proj.weight.dtype  # type: ignore[union-attr, return-value]

    def velocity(self, seen: Any, share: float, noisy: torch.Tensor) -> torch.Tensor:
        """See `FlowMatchingHead.velocity`."""
        # The model turns the time by up to 1571 rad: rounded as in its own sampling, or the fifth digit differs.
        time = torch.full((len(noisy),), 1.0 - share, dtype=torch.float32, device=noisy.device)
        return self.network(noisy, time, seen)


class PI0PolicyMixin(HeadPolicyMixin):
    """`prepare`, `predict_action` and `policy` for Transformers' `PI0ForConditionalGeneration`; made by `to_vla`.

    With `normalized=` chunks, `forward` gives the flow's mean squared error over the numbers that are real; the model's
    own takes those that fill a robot's actions up to 32 as well. Without it, `forward` and `sample_actions` are the
    native ones.
    """

    @property
    def action_head(self) -> PI0Head:  # type: ignore[override]
        """The model's own flow, seen as a head; it has no weights besides the model's."""
        return PI0Head(self, self.action_config.head)  # type: ignore[arg-type]

    def heard(self, inputs: dict[str, Any]) -> torch.Tensor:
        """See `HeadPolicyMixin.heard`: the velocity of one and the same noise, in a state of zeros."""
        head, config = self.action_head, self.action_config.head
        noise = torch.randn(1, config.horizon, config.dof, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
        noise = noise.to(self.device, head.dtype).expand(len(inputs["input_ids"]), -1, -1)  # type: ignore[attr-defined]
        return head.velocity(self._prefix(inputs), 0.0, noise).flatten(1)

    def _features(self, inputs, proprio, past, past_mask) -> tuple[Features, Any]:
        if "labels" in inputs:
            raise VLAActionsError("PI0 has no output layer for words: leave labels out")
        if past is not None or past_mask is not None:
            raise VLAActionsError("PI0 sees the present step only: leave past and past_mask out")
        return replace(self._prefix(inputs), proprio=proprio), None

    def _prefix(self, inputs: Mapping[str, Any]) -> Features:
        """Pictures and words, read once for all steps of integration."""
        policy: Any = self
        missing = [name for name in ("pixel_values", "pixel_attention_mask") if inputs.get(name) is None]
        useless = sorted(set(inputs) - {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"})
        if useless:
            raise VLAActionsError(
                f"PI0 has no use for {useless} here: predict_action takes the state as proprio= in real units, forward with "
                "normalized= chunks as normalized_proprio=; sample_actions is the native method"
            )
        if missing:
            raise VLAActionsError(f"PI0 needs the tensors of prepare(), {missing} are missing")
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        uses_cache(policy, self.action_head)
        embeddings = policy.model.embed_prefix(ids, inputs["pixel_values"], inputs["pixel_attention_mask"])
        out = policy.model.vlm(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=mask.cumsum(-1) - 1,
            token_type_ids=torch.zeros_like(embeddings)[:, :, 0],
            use_cache=True,
        )
        return Features(out.last_hidden_state, mask.bool(), None, cache_of(out, ids.shape[1]))

    def generate(self, *args, **kwargs):
        """Refused: PI0 says no words, and its actions are `predict_action`."""
        raise VLAActionsError("PI0 predicts numbers and generates no tokens: use predict_action")

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """As `ActionPredictionMixin.save_pretrained`; the head's weights are among the model's own."""
        ActionPredictionMixin.save_pretrained(self, save_directory, **kwargs)


def pi0_policy(model: Any, processor: Any, config: ActionConfig) -> Any:
    """What `to_vla` makes of a `PI0ForConditionalGeneration`; changes and returns that model.

    Raises:
        VLAActionsError: processor, config and model do not belong together.
    """
    check_pi0_processor(processor, model.config)
    if not isinstance(config.head, NativeFlowConfig):
        found = "action tokens" if config.head is None else f"a {config.head.kind!r} head"
        raise VLAActionsError(
            f"a PI0 model has a flow of its own, and the config has {found}: use "
            "ActionConfig.preset('pi0-transformers').config(norm_stats, spaces)"
        )
    if config.tokenizer is not None:
        raise VLAActionsError("PI0 has no output layer for action tokens: leave tokenizer and vocabulary out")
    _check_fits(config.head, model.config)
    model.__class__ = _policy_class(native_class_of(model))
    model.action_config, model.processor = config, processor
    model.prompts = PI0Prompts(processor, config, PI0)
    return model


def pi0_action_config(settings: Mapping[str, Any], native: Any, source: str) -> ActionConfig:
    """The config of a PI0 checkpoint that no policy was saved in: statistics of its processor, sizes of its model.

    Args:
        settings: of the processor, `PI0Processor.get_processor_dict(path)[0]`.
        native: the model's configuration.
        source: where they are from, for messages.

    Raises:
        CheckpointError: the processor has no statistics, as that of a base model.
    """
    names = ("actions_mean", "actions_std", "state_mean", "state_std")
    missing = [name for name in names if settings.get(name) is None]
    if missing:
        raise CheckpointError(
            f"the processor in {source!r} has no {missing}, without which its numbers mean nothing: pass "
            "config=ActionConfig.preset('pi0-transformers').config(NormStats.from_file(...)), with the statistics of the data "
            "that it was trained on"
        )
    try:
        stats = parse_stats(dict(settings), key=UNNORM_KEY, format="pi0_processor").stats
    except StatsError as error:
        raise CheckpointError(f"the statistics of the processor in {source!r} cannot be used: {error}") from None
    sizes = {"horizon": native.chunk_size, "dof": native.max_action_dim, "proprio_dim": native.max_state_dim}
    beta = (native.time_sampling_beta_alpha, native.time_sampling_beta_beta)
    return ActionConfig.preset("pi0-transformers").config(stats, **sizes, beta=beta, steps=native.num_inference_steps)


def pi0_settings(path: str, **hub: Any) -> dict[str, Any]:
    """Settings of the processor of a PI0 checkpoint, its statistics among them."""
    try:
        return PI0Processor.get_processor_dict(path, **hub)[0]
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no processor_config.json to be had from {path!r}: {str(error).splitlines()[0]}"
        ) from None


def _check_fits(head: NativeFlowConfig, native: Any) -> None:
    """Raise unless the config says of the flow what the model computes."""
    times = (native.time_sampling_scale, native.time_sampling_offset)
    found = {
        "horizon": native.chunk_size,
        "dof": native.max_action_dim,
        "proprio_dim": None if head.proprio_dim is None else min(head.proprio_dim, native.max_state_dim),
        "beta": (native.time_sampling_beta_alpha, native.time_sampling_beta_beta),
        "time": "pi0" if times == (0.999, 0.001) else f"scale and offset {times}",
    }
    wrong = {name: value for name, value in found.items() if getattr(head, name) != value}
    if wrong:
        said = {name: getattr(head, name) for name in wrong}
        raise VLAActionsError(
            f"the config says {said} and the model has {wrong}: change the config, or load the model with another "
            "chunk_size (no weight depends on it)"
        )


@functools.cache
def _policy_class(native: type) -> type:
    """As that of `wrap`: a subclass that Transformers takes for the native class."""
    names = {"__module__": native.__module__, "__qualname__": native.__qualname__, "__doc__": native.__doc__}
    names |= {"forward": forward_of(native), "native_forward": native.forward}  # type: ignore[attr-defined]
    return type(native.__name__, (PI0PolicyMixin, native), names)
