"""From pictures and a sentence to the tensors of a model: one piece of code for training and for use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.models.families import ModelFamily


class PromptBuilder:
    """Builds the prompts of a batch and calls the processor.

    Args:
        processor: the model's processor; for a text-only model its tokenizer.
        config: holds the prompt's wording.
        family: how the model wants its images announced.
    """

    def __init__(self, processor, config: ActionConfig, family: ModelFamily):
        self.processor = processor
        self.tokenizer = processor.tokenizer if family.takes_images else processor
        self.config = config
        self.family = family

    def build(self, images, instruction, padding_side: str = "left") -> dict[str, Any]:
        """Tensors of one sample or of a batch.

        Args:
            images: for one instruction a picture or a list of pictures (one a camera); for a list of instructions one
                such entry each. A picture is a PIL image or a uint8 array (height, width, 3). None for a text-only
                model.
            instruction: a sentence, or a list of sentences.
            padding_side: "left" for generation, "right" for training.

        Returns:
            The processor's tensors: `input_ids` and `attention_mask` (batch, length), and what the images need.
        """
        sentences = [instruction] if isinstance(instruction, str) else list(instruction)
        if not sentences:
            raise VLAActionsError("no instruction was given")
        pictures = self._pictures(images, isinstance(instruction, str), len(sentences))
        texts = [self._text(s, len(p)) for s, p in zip(sentences, pictures, strict=True)]
        padding = {"padding": len(texts) > 1, "padding_side": padding_side, "return_tensors": "pt"}
        if self.family.takes_images:
            # A flat list: every picture belongs to the next image token of the texts, in order.
            return dict(self.processor(images=[p for sample in pictures for p in sample], text=texts, **padding))
        return dict(self.processor(texts, **padding))

    def _text(self, sentence: str, n_images: int) -> str:
        prompt = self.config.prompt_for(sentence)
        for token in self.family.image_tokens(self.processor):
            if token in prompt:
                raise VLAActionsError(f"the instruction {sentence!r} contains the model's image token {token!r}")
        return self.family.prompt(self.processor, prompt, n_images)

    def _pictures(self, images, single: bool, n: int) -> list[list[Image.Image]]:
        if not self.family.takes_images:
            if images is not None:
                raise VLAActionsError(f"a {self.family.name} model takes no images; pass images=None")
            return [[] for _ in range(n)]
        if images is None:
            raise VLAActionsError(f"a {self.family.name} model needs images; got None")
        entries = [images] if single else list(images)
        if len(entries) != n:
            raise VLAActionsError(f"{len(entries)} entries of images for {n} instructions")
        pictures = [
            [_picture(p) for p in (e if isinstance(e, Sequence) and not isinstance(e, np.ndarray) else [e])]
            for e in entries
        ]
        if not all(pictures):
            raise VLAActionsError("a sample has no picture")
        cameras = self.config.cameras
        if cameras and any(len(sample) != len(cameras) for sample in pictures):
            raise VLAActionsError(
                f"the policy was trained on {len(cameras)} picture(s) a sample, from {list(cameras)}, got "
                f"{sorted({len(sample) for sample in pictures})}"
            )
        return pictures


def _picture(picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise VLAActionsError(
            f"a picture is a PIL image or a uint8 array (height, width, 3), got {array.dtype} {array.shape}"
        )
    return Image.fromarray(array)
