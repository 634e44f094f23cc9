"""LoRA on a policy: linear layers of the language model, and the rows of the action tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_vla_actions.errors import TrainingError
from hf_vla_actions.models.adapter import save_whole_adapter
from hf_vla_actions.models.families import family_of
from hf_vla_actions.train.arguments import LoraArguments


def add_lora(policy, args: LoraArguments) -> Any:
    """Return a PeftModel around a policy.

    The rows of the action tokens are trained in the input AND the output embeddings: an adapter that only knew the
    input rows would leave the output rows of new tokens at random. `lora_action_rows=False` leaves both out, for action
    tokens that the model has learned before or whose output rows have an adapter, as in OpenVLA's own recipe.

    Args:
        policy: model made by `to_vla`.
        args: rank, alpha, dropout and targets.

    Raises:
        TrainingError: no layer fits the targets, or rows would be trained twice.
    """
    from peft import LoraConfig, get_peft_model

    ids = policy.action_config.vocabulary.token_ids.reshape(-1).tolist()
    embeddings = (policy.get_input_embeddings(), policy.get_output_embeddings())
    vision = family_of(policy.config).vision_modules
    rows = {_name_of(policy, layer): ids for layer in embeddings} if args.lora_action_rows else None
    twice = sorted(set(rows or ()) & set(args.lora_target_modules or ()))
    if twice:
        raise TrainingError(
            f"{twice} would get an adapter and have the rows of the action tokens trained too: pass --lora_action_rows "
            "false, or leave them out of --lora_target_modules"
        )
    exclude = rf"(.*\.)?({'|'.join(vision)})(\..*)?" if vision and not args.lora_vision else None
    try:
        config = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.lora_target_modules or "all-linear",
            exclude_modules=exclude,
            trainable_token_indices=rows,
            init_lora_weights=args.lora_init or True,  # type: ignore[arg-type]
        )
        return save_whole_adapter(get_peft_model(policy, config))
    except ValueError as error:
        raise TrainingError(f"no LoRA adapter can be made: {error}") from None


def freeze_vision(policy) -> None:
    """Keep the vision tower and the projector of a policy as they are."""
    vision = family_of(policy.config).vision_modules
    for name, parameter in policy.named_parameters():
        if any(part in vision for part in name.split(".")):
            parameter.requires_grad_(False)


def _name_of(model: nn.Module, layer: nn.Module) -> str:
    for name, module in model.named_modules():
        if module is layer:
            return name.rpartition(".")[2]
    raise TrainingError(f"{type(model).__name__} has no separate embedding layer of type {type(layer).__name__}")
