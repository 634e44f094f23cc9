"""`to_vla`: turn a loaded model into a robot policy, without changing what it saves."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.heads import ActionHead, HeadConfig
from hf_vla_actions.models.continuous import HeadPolicyMixin, forward_of
from hf_vla_actions.models.embeddings import grow_embeddings
from hf_vla_actions.models.families import OPENVLA_TYPE, PI0_TYPE, family_of
from hf_vla_actions.models.features import sizes_of, watch_embeddings
from hf_vla_actions.models.mixin import ActionPredictionMixin, native_class_of
from hf_vla_actions.models.pi0 import pi0_policy
from hf_vla_actions.models.prompts import PromptBuilder
from hf_vla_actions.tokenizers import ActionVocabulary

logger = logging.getLogger(__name__)


def to_vla(model, processor, config: ActionConfig, head: HeadConfig | ActionHead | None = None) -> Any:
    """Give a model the methods of `ActionPredictionMixin`; changes and returns that model.

    The embeddings grow if the action tokens need rows (they never shrink). What is saved later keeps the native
    `model_type`, `architectures` and weight names, so plain Transformers loads it.

    Args:
        model: any AutoModelForImageTextToText of a supported family, or any AutoModelForCausalLM.
        processor: its processor (with the action tokens in its tokenizer); for a text-only model the tokenizer.
        config: what turns token ids into robot commands.
        head: a continuous head for actions: what it is made of (it starts with random weights), or a module. By default
            `config.head`, if there is one. A policy that has this very head keeps it, with its weights.

    Rows that are added for action tokens get a start (`models.embeddings`). Rows that the model has already stay as they
    are, since nobody can tell whether they were trained: for a new policy on unused ones call `initialize_rows`, as the
    training command does.

    Raises:
        VLAActionsError: the model cannot be a policy, or processor, config and model do not belong together.
    """
    if not isinstance(model, PreTrainedModel):
        raise VLAActionsError(f"to_vla needs a loaded Transformers model, got {type(model).__name__}")
    if model.config.model_type == PI0_TYPE:
        return pi0_policy(model, processor, _with_head(config, head))  # its own flow is its head
    if not model.can_generate():
        raise VLAActionsError(
            f"{type(model).__name__} cannot generate; load it with AutoModelForImageTextToText or AutoModelForCausalLM"
        )
    if model.config.is_encoder_decoder:
        raise VLAActionsError(f"{type(model).__name__} is an encoder-decoder; policies here are decoders")
    if model.config.model_type == OPENVLA_TYPE:
        if head is not None or config.head is not None:
            raise VLAActionsError("an OpenVLA model has heads of its own: see OFTOptions of models.openvla")
        native: Any = model
        return native.attach(processor, config)  # a policy by itself, with prompts of its own
    family = family_of(model.config)
    wanted = ProcessorMixin if family.takes_images else PreTrainedTokenizerBase
    if not isinstance(processor, wanted):
        raise VLAActionsError(
            f"a {family.name} model needs its {'processor' if family.takes_images else 'tokenizer'}, got a "
            f"{type(processor).__name__}"
        )
    config = _with_head(config, head)
    if config.head is not None:
        config = replace(config, head=config.head.fitted(**sizes_of(model)))
    prompts = PromptBuilder(processor, config, family)
    if config.vocabulary is not None:
        config.vocabulary.check(prompts.tokenizer)
    if prompts.tokenizer.pad_token is None:
        # The attention mask hides padding, so any token will do; without one there are no batches.
        prompts.tokenizer.pad_token = prompts.tokenizer.eos_token
        logger.warning("the tokenizer has no pad token; its end-of-sequence token is used")
    if config.vocabulary is not None:
        warn_of_words(config.vocabulary, prompts.tokenizer)
        grow_embeddings(model, config.vocabulary, len(prompts.tokenizer))
        model.generation_config = _neutral_generation(model.generation_config, config.vocabulary)
    model.__class__ = _policy_class(native_class_of(model), config.head is not None)  # type: ignore[arg-type]
    policy: Any = model
    policy.action_config, policy.processor, policy.prompts = config, processor, prompts
    _attach(policy, config.head, head)
    return policy


def _with_head(config: ActionConfig, head: HeadConfig | ActionHead | None) -> ActionConfig:
    """The config with the head that was asked for."""
    wanted = head.config if isinstance(head, ActionHead) else head
    if wanted is None and config.head is None and config.tokenizer is None:
        raise VLAActionsError(
            "a policy says its actions as tokens (tokenizer and vocabulary of the config) or with a continuous head; there is "
            "neither: pass head=..., such as heads.FlowMatchingConfig(horizon, dof)"
        )
    if wanted is None or wanted == config.head:
        return config
    if not isinstance(wanted, HeadConfig):
        raise VLAActionsError(f"head is a HeadConfig or an ActionHead, got {type(head).__name__}")
    if config.head is not None:
        raise VLAActionsError(f"the config has another head already: {config.head}")
    return replace(config, head=wanted)


def _attach(policy, config: HeadConfig | None, head: HeadConfig | ActionHead | None) -> None:
    """Put the head into the model, on its device; one that a policy has already stays, if it is the one that is asked for."""
    old = policy._modules.get("action_head")
    if config is None:
        policy._modules.pop("action_head", None)
        return
    if old is head is not None or (old is not None and not isinstance(head, ActionHead) and old.config == config):
        return
    width = policy.get_input_embeddings().weight.shape[1]
    if isinstance(head, ActionHead):
        if head.width != width:
            raise VLAActionsError(
                f"the head was made for hidden states of {head.width} numbers, the model's have {width}"
            )
        policy.action_head = head.to(policy.device)
    else:
        with torch.device(policy.device):
            policy.action_head = config.build(width)
    policy.action_head.train(policy.training)
    watch_embeddings(policy.get_input_embeddings())


def warn_of_words(vocabulary: ActionVocabulary, tokenizer) -> None:
    """Log a warning if ordinary text can contain action tokens, as in OpenVLA's layout."""
    if not vocabulary.in_prompts:
        return
    ids = vocabulary.token_ids.reshape(-1).tolist()
    texts = [tokenizer.decode([i]) for i in ids]
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    words = [text for i, text, found in zip(ids, texts, again, strict=True) if i in found]
    if words:
        logger.warning(
            "%d of %d action tokens are text that a prompt can contain, such as %s: the model would read it as a "
            "movement (the layouts 'append' and 'per_dimension' have tokens of their own)",
            len(words),
            len(ids),
            words[:3],
        )


def _neutral_generation(old: GenerationConfig, vocabulary: ActionVocabulary) -> GenerationConfig:
    """Only the special tokens of a checkpoint's generation config, with the closing token among its ends.

    How a chat model likes to sample its text (penalties, suppressed tokens, top_p, guidance) would bend the
    distribution over actions, in `predict_action` and in plain `generate` alike.
    """
    end_token_id = vocabulary.end_token_id
    ends = old.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ends += [end_token_id] if end_token_id not in ends else []
    if vocabulary.find(ends).any():
        raise VLAActionsError(
            f"generate() stops at the ids {ends}, and action tokens are among them: an action would end in its middle. "
            "Use other ids for actions, or take theirs out of model.generation_config.eos_token_id"
        )
    return GenerationConfig(
        bos_token_id=old.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=end_token_id if old.pad_token_id is None else old.pad_token_id,
    )


@functools.cache
def _policy_class(native: type, continuous: bool) -> type:
    """A subclass that Transformers takes for the native class.

    Weight conversions, `architectures` and the loss are looked up by the class's name and module. A subclass of
    another name loses them silently: weights are then loaded at random and saved under other keys.
    """
    names = {"__module__": native.__module__, "__qualname__": native.__qualname__, "__doc__": native.__doc__}
    if not continuous:
        return type(native.__name__, (ActionPredictionMixin, native), names)
    names |= {"forward": forward_of(native), "native_forward": native.forward}  # type: ignore[attr-defined]
    return type(native.__name__, (HeadPolicyMixin, native), names)
