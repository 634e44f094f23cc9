"""How each family of models wants its pictures announced in the prompt, and where its vision lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from hf_vla_actions.errors import VLAActionsError


@dataclass(frozen=True)
class ModelFamily:
    """What differs between families of models.

    Args:
        name: for messages.
        takes_images: false for models that only read text.
        announce: (processor, number of pictures) to the text in front of a prompt that no chat template wraps.
        vision_modules: names of the modules that LoRA and freezing leave out unless asked.
        suffix_type: `token_type_ids` of the tokens that follow the prompt, where the model has any.
        own_positions: the model computes its positions from the sizes of the pictures, in several dimensions.
        action_modules: names of the model's own modules between actions and layers, which LoRA trains as a whole.
        expert_modules: names of the model's own layers that work on actions, which freezing the language model leaves.
        prompt: wording that the model's published weights know, where they are a policy already; None: OpenVLA's.
    """

    name: str
    takes_images: bool
    announce: Callable[[Any, int], str]
    vision_modules: tuple[str, ...]
    suffix_type: int = 0
    own_positions: bool = False
    action_modules: tuple[str, ...] = ()
    expert_modules: tuple[str, ...] = ()
    prompt: str | None = None


# Functions of the module, because a collator must travel to worker processes that are started anew.
def _nothing(processor, n_images: int) -> str:
    return ""


def _image_tokens(processor, n_images: int) -> str:
    return processor.image_token * n_images


def _image_tokens_and_line(processor, n_images: int) -> str:
    return processor.image_token * n_images + "\n"


def _begin_of_image(processor, n_images: int) -> str:
    return processor.boi_token * n_images


def _qwen_vision(processor, n_images: int) -> str:
    return f"<|vision_start|>{processor.image_token}<|vision_end|>" * n_images


TEXT_ONLY = ModelFamily("text-only", False, _nothing, ())
LLAVA = ModelFamily("LLaVA", True, _image_tokens_and_line, ("vision_tower", "multi_modal_projector"))
IDEFICS3 = ModelFamily("Idefics3", True, _image_tokens, ("vision_model", "connector"))
SMOLVLM = ModelFamily("SmolVLM", True, _image_tokens, ("vision_model", "connector"))
# The prompt is a prefix that reads itself in both directions (type 0); actions follow causally (type 1).
PALIGEMMA = ModelFamily("PaliGemma", True, _image_tokens, ("vision_tower", "multi_modal_projector"), suffix_type=1)
GEMMA3 = ModelFamily("Gemma3", True, _begin_of_image, ("vision_tower", "multi_modal_projector"))
QWEN_VL = ModelFamily("Qwen-VL", True, _qwen_vision, ("visual",), own_positions=True)
OPENVLA = ModelFamily("OpenVLA", True, _nothing, ("vision_backbone", "projector"))
# Its processor puts image tokens and the line behind the sentence by itself.
PI0 = ModelFamily(
    "PI0",
    True,
    _nothing,
    ("vision_tower", "multi_modal_projector"),
    action_modules=("embed_action_time", "action_out_proj"),
    expert_modules=("dit",),
    prompt="{instruction}",
)
OPENVLA_TYPE = "openvla"
PI0_TYPE = "pi0"

# model_type (saved in config.json) to family; text-only models of any type need no entry.
VISION_FAMILIES = {
    "llava": LLAVA,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
    "paligemma": PALIGEMMA,
    "gemma3": GEMMA3,
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
    "qwen3_vl": QWEN_VL,
    OPENVLA_TYPE: OPENVLA,
    PI0_TYPE: PI0,
}


def family_of(config) -> ModelFamily:
    """The family of a model by its configuration; a vision model that is not known yet raises."""
    if config.model_type in VISION_FAMILIES:
        return VISION_FAMILIES[config.model_type]
    if "vision_config" in config.sub_configs or config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise VLAActionsError(
            f"vision models that can be used are of type {sorted(VISION_FAMILIES)}, got {config.model_type!r}; a model "
            "that is like one of them can be entered into hf_vla_actions.models.families.VISION_FAMILIES, after which "
            "check_sees_image() and check_reads_instruction() tell whether it works"
        )
    return TEXT_ONLY
