"""Pictures and prompts of Transformers' PI0, also without torchvision.

Everything but the handling of pictures is the native `PI0Processor`. Its image processor is there for torchvision
only; `PI0ImageProcessorPil` has the same settings on Transformers' own backend for PIL (which resizes with PIL instead
of torchvision: single values may differ by rounding), and is saved under the native name, so a folder saved here loads
natively where torchvision is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad
from transformers import AutoTokenizer
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling
from transformers.models.pi0.processing_pi0 import PI0Processor

from hf_vla_actions.errors import CheckpointError, VLAActionsError
from hf_vla_actions.models.prompts import PromptBuilder

TEXT_TOKENS = 48  # that the published weights were trained on at most: sentence, beginning and line end


class PI0ImageProcessorPil(PilBackend):
    """`PI0ImageProcessor` without torchvision: to 224 x 224 keeping the aspect, to [-1, 1], zeros right and below."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size: ClassVar[dict[str, int]] = {"max_height": 224, "max_width": 224}  # type: ignore[misc]
    pad_size: ClassVar[dict[str, int]] = {"height": 224, "width": 224}  # type: ignore[misc]
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_pad = True
    image_seq_length = 256


class PI0Prompts(PromptBuilder):
    """Prompts as pi0 reads them: image tokens, beginning, sentence, line end; at most 48 tokens of text."""

    # Its own padding is to 48, image tokens and all: rows with 256 of these would stay of different lengths.
    processor_options: ClassVar[dict[str, Any]] = {"max_length": None}

    def build(self, images, instruction, padding_side: str = "left") -> dict[str, Any]:
        """Tensors of one sample or of a batch; see `PromptBuilder.build`.

        Returns:
            `input_ids` and `attention_mask` (batch, length), `pixel_values` (batch, cameras, 3, height, width) and
            `pixel_attention_mask` (batch, cameras) bool, False where a sample has fewer pictures than another.
        """
        batch = super().build(images, instruction, padding_side)
        is_text = batch["attention_mask"].bool() & (batch["input_ids"] != self.processor.image_token_id)
        n_tokens = is_text.sum(dim=1)
        if (n_tokens > TEXT_TOKENS).any():
            row = int(n_tokens.argmax())
            sentence = instruction if isinstance(instruction, str) else instruction[row]
            raise VLAActionsError(
                f"the prompt of {sentence!r} has {int(n_tokens[row])} tokens of text, and pi0 reads up to {TEXT_TOKENS}: say "
                "it in fewer words"
            )
        return batch


def load_pi0_processor(path: str | Path, **hub_arguments: Any) -> PI0Processor:
    """Load a PI0 processor that needs no torchvision.

    Args:
        path: folder or repository id.
        hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, `force_download`.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), **hub_arguments)
        pictures = PI0ImageProcessorPil.from_pretrained(str(path), **hub_arguments)
        settings, _ = PI0Processor.get_processor_dict(str(path), **hub_arguments)
        return PI0Processor.from_args_and_dict([pictures, tokenizer], settings)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"no PI0 processor to be had from {str(path)!r}: {(str(error).strip() or type(error).__name__).splitlines()[0]}. "
            "It is a PaliGemma tokenizer and the settings of pictures (preprocessor_config.json or processor_config.json)"
        ) from None


def check_pi0_processor(processor: Any, config: Any) -> None:
    """Raise unless a processor makes what a PI0 model of this configuration reads."""
    if not isinstance(processor, PI0Processor):
        raise VLAActionsError(
            f"a PI0 model needs its PI0Processor, got a {type(processor).__name__}: load it with load_pi0_processor(path), or "
            "make PI0Processor(PI0ImageProcessorPil(), tokenizer) of a PaliGemma tokenizer (models.pi0_processor)"
        )
    vision, image_token = config.vlm_config.vision_config, config.vlm_config.image_token_id
    if processor.image_token_id != image_token:
        raise VLAActionsError(
            f"the tokenizer is not that of the model: its image token {processor.image_token!r} has id "
            f"{processor.image_token_id}, the model expects {image_token}"
        )
    n_tokens = (vision.image_size // vision.patch_size) ** 2
    edges = [processor.image_processor.pad_size[name] for name in ("height", "width")]
    if processor.image_seq_length != n_tokens or edges != [vision.image_size] * 2:
        raise VLAActionsError(
            f"the processor makes pictures of {edges} with {processor.image_seq_length} tokens each, the model reads "
            f"{vision.image_size} x {vision.image_size} with {n_tokens}"
        )


def normalized_state(proprio: torch.Tensor | None, rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """(batch, width) state that the model is shown, filled up with zeros; all zeros for a policy that reads none."""
    if proprio is None:
        return like.new_zeros(rows, width)
    return pad(proprio.to(like), (0, width - proprio.shape[-1]))
