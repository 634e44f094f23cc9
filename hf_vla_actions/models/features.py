"""What a vision-language model has seen, as continuous heads read it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import torch

from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.heads import ActionHead, Features
from hf_vla_actions.heads.transfusion import IGNORED
from hf_vla_actions.models.families import ModelFamily

ROPE_THETA = 10000.0  # where a model does not say another


def features_of(policy, head: ActionHead, inputs: Mapping[str, Any]) -> tuple[Features, Any]:
    """Run the model on prompts, the head's learned embeddings behind them.

    Nothing depends on whether the model is in training mode, but for dropout.

    Args:
        policy: model made by `to_vla`.
        head: its head.
        inputs: tensors of the prompts, padded on the left; with `labels` the model's own output too (not its loss).

    Returns:
        Features without proprio and past, and the model's output where there are labels, else None.
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels", None)
    mask = inputs.get("attention_mask")
    inputs["attention_mask"] = mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    n, family = head.n_slots, policy.prompts.family
    if n:
        inputs = with_slots(inputs, n, family)
    if not family.own_positions:
        # As generate() counts them; the default would count the padding too.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    inputs["use_cache"] = uses_cache(policy, head)
    with slots_at_the_end(policy.get_input_embeddings(), head):
        if labels is None:
            out = _backbone(policy)(**inputs)
            hidden, said = out.last_hidden_state, None
        else:
            said = out = policy.native_forward(**inputs, output_hidden_states=True)
            hidden = out.hidden_states[-1]
    length = hidden.shape[1] - n
    slots = hidden[:, length:] if n else None
    if not head.needs_cache:
        return Features(hidden[:, :length], mask.bool(), slots), said
    return Features(hidden, mask.bool(), slots, cache_of(out, length), _next_position(policy, mask)), said


def check_inputs(policy, inputs: Mapping[str, Any]) -> None:
    """Raise for what is no tensor of a prompt: a model would take no notice of it, without a word.

    Args:
        policy: model made by `to_vla`.
        inputs: what was given beside the options of the head.
    """
    known = {*signature(policy.native_forward).parameters, "token_type_ids", "mm_token_type_ids"}
    useless = sorted(
        name for name, value in inputs.items() if name not in known or not isinstance(value, torch.Tensor)
    )
    if useless:
        raise VLAActionsError(
            f"a policy with a {policy.action_config.head.kind!r} head has no use for {useless} here: beside the tensors of "
            "prepare(), predict_action takes proprio, noise, generator, num_steps and guidance (no options of generate); "
            "forward takes normalized, action_pad_mask, normalized_proprio, past_mask and labels"
        )


def unsaid(features: Features, labels: torch.Tensor) -> Features:
    """The features as they are when the policy acts: the words that labels ask for have not been said yet.

    Args:
        features: of prompts with words behind them.
        labels: (batch, length) ids, -100 where none is asked for.
    """
    said = features.mask & (labels != IGNORED)  # type: ignore[operator]
    position = None if features.next_position is None else features.next_position - said.sum(dim=1)
    return replace(features, mask=features.mask & ~said, next_position=position)  # type: ignore[operator]


def with_slots(inputs: Mapping[str, Any], n: int, family: ModelFamily) -> dict[str, Any]:
    """The prompts with `n` more columns, whose embeddings `slots_at_the_end` puts in."""
    shape = inputs["input_ids"].shape
    inputs = dict(inputs)
    filler = inputs["input_ids"][:, -1:].expand(-1, n)  # any word that is no picture
    more = {"input_ids": filler, "attention_mask": torch.ones_like(filler)}
    more["token_type_ids"] = torch.full_like(filler, family.suffix_type)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.shape == shape and not value.is_floating_point():
            tail = more.get(name, torch.zeros_like(filler))
            inputs[name] = torch.cat([value, tail.to(value.dtype)], dim=1)
    return inputs


class _Wanted(threading.local):
    """The embeddings that this thread's forward is to put in, and whether it has."""

    slots: torch.Tensor | None = None
    put_in: bool = False


_wanted = _Wanted()  # by thread: others may be running the same model, on words


@torch.compiler.disable  # a compiled forward would go on doing what it did when it was compiled
def _put_in(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor | None:
    if _wanted.slots is None:
        return None
    _wanted.put_in = True
    slots = _wanted.slots.to(out.device, out.dtype).expand(len(out), -1, -1)
    return torch.cat([out[:, : -slots.shape[1]], slots], dim=1)


def watch_embeddings(embeddings: torch.nn.Module) -> None:
    """Let `slots_at_the_end` work on these embeddings; before a model is compiled, so that its graph leaves room for it."""
    if _put_in not in embeddings._forward_hooks.values():
        embeddings.register_forward_hook(_put_in)


@contextmanager
def slots_at_the_end(embeddings: torch.nn.Module, head: ActionHead) -> Iterator[None]:
    """Within it, the last embeddings of every sequence of this thread are those that the head has learned."""
    if not head.n_slots:
        yield
        return
    watch_embeddings(embeddings)
    _wanted.slots, _wanted.put_in = head.slot_embeddings, False
    try:
        yield
    finally:
        _wanted.slots = None
    if not _wanted.put_in:
        raise VLAActionsError(
            "the model ran without the head's learned embeddings, so what it saw is not what the head was trained on. Was it "
            "compiled before its layers were changed (an adapter put on, embeddings replaced)? Call torch.compiler.reset()"
        )


def sizes_of(model) -> dict[str, Any]:
    """Sizes of a model's layers, as `HeadConfig.fitted` takes them."""
    config = model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    theta = float(rope.get("rope_theta", ROPE_THETA))
    return {
        "n_layers": config.num_hidden_layers,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rope_theta": theta,
    }


def cache_of(out, length: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Keys and values of every layer, of the whole prompt."""
    layers = [(layer.keys, layer.values) for layer in getattr(out.past_key_values, "layers", ())]
    if not layers or any(keys.ndim != 4 or keys.shape[2] != length for keys, _ in layers):
        raise VLAActionsError(
            f"the head attends to keys and values of all {length} places of the prompt, and the model keeps "
            f"{sorted({tuple(keys.shape) for keys, _ in layers}) or 'none'} of them: use a head with attend='hidden'"
        )
    return tuple(layers)


def _next_position(policy, mask: torch.Tensor) -> torch.Tensor:
    """(batch,) position that the model would give to a token behind the prompt."""
    real = mask.sum(dim=1)
    return real + _backbone(policy).rope_deltas.reshape(-1) if policy.prompts.family.own_positions else real


def uses_cache(policy, head: ActionHead) -> bool:
    """Whether the model has to keep its keys and values for the head; raises where it cannot."""
    if not head.needs_cache:
        return False
    if policy.training and policy.is_activation_checkpointing:
        raise VLAActionsError(
            "the head attends to the model's keys and values, which are not kept with gradient checkpointing: leave "
            "gradient_checkpointing out, or use a head with attend='hidden'"
        )
    return True


def _backbone(policy) -> Any:
    """The model without its output layer."""
    inner = policy.base_model
    inner = getattr(policy, "model", policy) if inner is policy else inner  # some say no `base_model_prefix`
    if inner is policy:
        raise VLAActionsError(
            f"{type(policy).__name__} does not say where its layers end and its output layer begins: heads need a model "
            "with a `base_model` or `model`"
        )
    return inner
