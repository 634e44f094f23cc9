"""LoRA on a policy: linear layers of the language model, and the rows of the action tokens."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.hf_argparser import string_to_bool

from hf_vla_actions.errors import TrainingError
from hf_vla_actions.models.adapter import quiet_peft, save_whole_adapter
from hf_vla_actions.models.families import family_of
from hf_vla_actions.models.fingerprint import BaseFingerprint
from hf_vla_actions.train.arguments import LoraArguments, VLATrainingArguments


def add_lora(policy, args: LoraArguments) -> Any:
    """Return a PeftModel around a policy.

    The rows of the action tokens are trained in the input AND the output embeddings: an adapter that only knew the
    input rows would leave the output rows of new tokens at random. `lora_action_rows=False` leaves both out, for action
    tokens that the model has learned before or whose output rows have an adapter, as in OpenVLA's own recipe.

    Args:
        policy: model made by `to_vla`.
        args: rank, alpha, dropout and targets; rsLoRA (arXiv 2312.03732) and DoRA (arXiv 2402.09353).

    All else is frozen by PEFT, on 4-bit weights too. PEFT's `prepare_model_for_kbit_training` is left out: it would
    make the embeddings and the output layer float32 for good, and turn on checkpointing that nobody asked for. What is
    trained is float32 anyway.

    Raises:
        TrainingError: no layer fits the targets, or rows would be trained twice.
    """
    from peft import LoraConfig, get_peft_model

    vocabulary, head = policy.action_config.vocabulary, policy.action_config.head
    ids = None if vocabulary is None else vocabulary.token_ids.reshape(-1).tolist()
    embeddings = (policy.get_input_embeddings(), policy.get_output_embeddings())
    family = family_of(policy.config)
    rows = {_name_of(policy, layer): ids for layer in embeddings} if ids and args.lora_action_rows else None
    twice = sorted(set(rows or ()) & set(args.lora_target_modules or ()))
    if twice:
        raise TrainingError(
            f"{twice} would get an adapter and have the rows of the action tokens trained too: pass --lora_action_rows "
            "false, or leave them out of --lora_target_modules"
        )
    left_out = [*([] if args.lora_vision else family.vision_modules), *family.action_modules]
    left_out += ["action_head"] if head is not None else []
    exclude = rf"(.*\.)?({'|'.join(left_out)})(\..*)?" if left_out else None
    try:
        config = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.lora_target_modules or "all-linear",
            exclude_modules=exclude,
            modules_to_save=list(family.action_modules) or None,  # small and all of it trained, as openpi's
            trainable_token_indices=rows,
            init_lora_weights=args.lora_init or True,  # type: ignore[arg-type]
            use_rslora=args.lora_rslora,
            use_dora=args.lora_dora,
        )
        base = BaseFingerprint.of(policy)
        with quiet_peft():
            model = get_peft_model(policy, config)
    except ValueError as error:
        raise TrainingError(f"no LoRA adapter can be made: {error}") from None
    if head is not None:
        policy.action_head.requires_grad_(
            True
        )  # it begins at random: all of it is trained, and saved beside the adapter
    return save_whole_adapter(model, base)


def quantization_of(args: LoraArguments, compute_dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig | None:
    """How the frozen weights are loaded: 4-bit as in QLoRA (arXiv 2305.14314), or None for as they are.

    All linear layers but the output layer become NF4 with double quantization, the vision tower's too: OpenVLA lost no
    success in 4 bits (arXiv 2406.09246, table 2).

    Args:
        args: `load_in_4bit`.
        compute_dtype: what weights become where they are multiplied.

    Raises:
        TrainingError: bitsandbytes is missing, or weights would be cut over processes.
    """
    if not args.load_in_4bit:
        return None
    if find_spec("bitsandbytes") is None:
        raise TrainingError("--load_in_4bit needs the package bitsandbytes: pip install bitsandbytes")
    if cuts_weights():
        raise TrainingError(
            "--load_in_4bit keeps whole weights on every device, FSDP and DeepSpeed cut them: leave one of them out"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantized_loading(lora: LoraArguments, args: VLATrainingArguments) -> dict[str, Any]:
    """Arguments of `from_pretrained` for what `--load_in_4bit` asks for; none without it."""
    computed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    quantization = quantization_of(lora, computed)
    # Quantized weights stay where they are loaded, so each process needs them on its own device from the start.
    return {} if quantization is None else {"quantization_config": quantization, "device_map": {"": str(args.device)}}


def cuts_weights() -> bool:
    """Whether `accelerate launch` was told to divide the weights among processes."""
    return any(string_to_bool(os.environ.get(f"ACCELERATE_USE_{name}", "false")) for name in ("FSDP", "DEEPSPEED"))


ALL_RUN = ("gpt2", "llama", "gemma", "gemma3_text", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
"""Language models of which every linear layer reads every token: no experts, no layer that takes another's keys."""


def every_adapter_runs(policy, args: LoraArguments) -> bool:
    """Whether each number that a LoRA adapter trains surely gets a gradient from each batch.

    Several processes wait for all gradients; where some may be missing, DistributedDataParallel must look for them in
    each step. Vision towers have layers that never run, and a continuous head leaves the output layer out.

    Args:
        policy: made by `to_vla`.
        args: which layers get an adapter.
    """
    only_language = args.use_peft and not args.lora_vision and policy.action_config.head is None
    return only_language and policy.config.get_text_config().model_type in ALL_RUN


def _name_of(model: nn.Module, layer: nn.Module) -> str:
    for name, module in model.named_modules():
        if module is layer:
            return name.rpartition(".")[2]
    raise TrainingError(f"{type(model).__name__} has no separate embedding layer of type {type(layer).__name__}")
