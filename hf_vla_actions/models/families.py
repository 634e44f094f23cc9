"""How each family of models wants its images announced in the prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_vla_actions.errors import VLAActionsError


@dataclass(frozen=True)
class ModelFamily:
    """What differs between families of models.

    Args:
        name: for messages.
        takes_images: false for models that only read text.
        prompt: (processor, prompt text, number of images) to the text that the processor is given.
        vision_modules: names of the modules that LoRA and freezing leave out unless asked.
        image_tokens: (processor) to the texts that an instruction must not contain.
    """

    name: str
    takes_images: bool
    prompt: Callable[[Any, str, int], str]
    vision_modules: tuple[str, ...]
    image_tokens: Callable[[Any], tuple[str, ...]]


def _llava_prompt(processor, prompt: str, n_images: int) -> str:
    return f"{processor.image_token * n_images}\n{prompt}"


def _text_prompt(processor, prompt: str, n_images: int) -> str:
    return prompt


def _llava_image_tokens(processor) -> tuple[str, ...]:
    return (processor.image_token,)


def _no_image_tokens(processor) -> tuple[str, ...]:
    return ()


# Functions of the module, because a collator must travel to worker processes that are started anew.
TEXT_ONLY = ModelFamily("text-only", False, _text_prompt, (), _no_image_tokens)
LLAVA = ModelFamily("LLaVA", True, _llava_prompt, ("vision_tower", "multi_modal_projector"), _llava_image_tokens)

# model_type (saved in config.json) to family; text-only models of any type need no entry.
VISION_FAMILIES = {"llava": LLAVA}


def family_of(config) -> ModelFamily:
    """The family of a model by its configuration; a vision model that is not known yet raises."""
    if config.model_type in VISION_FAMILIES:
        return VISION_FAMILIES[config.model_type]
    if "vision_config" in config.sub_configs:
        raise VLAActionsError(
            f"vision models that can be used are of type {sorted(VISION_FAMILIES)}, got {config.model_type!r}"
        )
    return TEXT_ONLY
