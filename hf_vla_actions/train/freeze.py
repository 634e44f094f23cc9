"""Full fine-tuning with parts of the policy frozen."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from hf_vla_actions.errors import TrainingError
from hf_vla_actions.models.families import family_of
from hf_vla_actions.models.head_files import PREFIX
from hf_vla_actions.train.lora import cuts_weights


@dataclass(frozen=True)
class Frozen:
    """What stays as it is.

    Args:
        vision: the vision tower and the projector.
        language_model: the layers of the language model; its embeddings are a part of their own, but for a policy without
            action tokens.
        text_embeddings: all rows of the input and output embeddings but those of the action tokens, to the bit.

    RoboVLMs trains with such switches for vision and text embedding (arXiv 2412.14058).
    """

    vision: bool = False
    language_model: bool = False
    text_embeddings: bool = False

    def refuse(self) -> None:
        """Raise TrainingError if anything is to be frozen: an adapter freezes all of the model by itself."""
        asked = [f"--freeze_{field.name}" for field in fields(self) if getattr(self, field.name)]
        if asked:
            raise TrainingError(
                f"{', '.join(asked)} with --use_peft: an adapter leaves the whole model as it is, and the vision tower "
                "gets none unless --lora_vision. Leave one of them out"
            )


def freeze_parts(policy, frozen: Frozen, *, weight_decay: float = 0.0) -> None:
    """Freeze parts of a policy in place.

    Args:
        policy: model made by `to_vla`.
        frozen: which.
        weight_decay: of the optimizer. It would shrink frozen rows, which lie in one tensor with those that are trained.

    Raises:
        TrainingError: rows cannot be frozen under these options.
    """
    layers = (policy.get_input_embeddings(), policy.get_output_embeddings())
    embeddings = [layer for layer in layers if layer is not None]  # PI0 says no words
    rows = {id(p) for layer in embeddings for p in layer.parameters()}
    if policy.action_config.vocabulary is None:
        _freeze_words(embeddings, frozen)
    family = family_of(policy.config)
    vision, of_actions = family.vision_modules, {*family.action_modules, *family.expert_modules}
    for name, parameter in policy.named_parameters():
        in_vision = any(part in vision for part in name.split("."))
        if id(parameter) in rows or name.startswith(PREFIX) or of_actions & set(name.split(".")):
            continue
        if frozen.vision if in_vision else frozen.language_model:
            parameter.requires_grad_(False)
    if frozen.text_embeddings and policy.action_config.vocabulary is not None:
        _freeze_rows(policy, embeddings, weight_decay)


def _freeze_words(embeddings, frozen: Frozen) -> None:
    """Freeze the embeddings of a policy without action tokens: they are a part of its language model.

    Nobody asks such a policy for words, so the output layer never gets a gradient.
    """
    read, *rest = ({id(p): p for p in layer.parameters()} for layer in embeddings)
    written = rest[0] if rest else {}
    for key, parameter in written.items():
        parameter.requires_grad_(key in read)
    if frozen.text_embeddings or frozen.language_model:
        for parameter in read.values():
            parameter.requires_grad_(False)


def _freeze_rows(policy, embeddings, weight_decay: float) -> None:
    if weight_decay:
        raise TrainingError(
            f"--freeze_text_embeddings with --weight_decay {weight_decay:g}: the decay would shrink the frozen rows, "
            "which share a matrix with those of the action tokens. Leave one of them out"
        )
    if cuts_weights():
        raise TrainingError(
            "--freeze_text_embeddings needs whole embedding matrices, FSDP and DeepSpeed cut them: leave one of them out"
        )
    ids = torch.tensor(policy.action_config.vocabulary.token_ids.reshape(-1).tolist())
    for parameter in {id(p): p for layer in embeddings for p in layer.parameters()}.values():
        # Adam moves a number whose gradient was always zero by exactly zero.
        parameter.register_hook(lambda gradient: _only(gradient, ids))


def _only(gradient: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros_like(gradient)
    ids = ids.to(gradient.device)
    kept[ids] = gradient[ids]
    return kept
