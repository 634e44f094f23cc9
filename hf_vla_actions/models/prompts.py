"""From pictures and a sentence to the tensors of a model: one piece of code for training and for use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from PIL import Image

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import ActionTokenError, VLAActionsError
from hf_vla_actions.models.families import ModelFamily

logger = logging.getLogger(__name__)
# Some templates write today's date into the prompt. A policy must see the prompt that it was trained on, so it is
# always the day that Llama 3's own template falls back to.
FIXED_DATE = "{%- macro strftime_now(pattern) -%}26 Jul 2024{%- endmacro -%}"


class PromptBuilder:
    """Builds the prompts of a batch and calls the processor.

    Args:
        processor: the model's processor; for a text-only model its tokenizer.
        config: holds the prompt's wording, and whether it goes into the processor's chat template.
        family: how the model wants its images announced.
    """

    processor_options: ClassVar[dict[str, Any]] = {}
    """What this kind of processor has to be told besides."""

    def __init__(self, processor, config: ActionConfig, family: ModelFamily):
        self.processor = processor
        self.tokenizer = processor.tokenizer if family.takes_images else processor
        self.config = config
        self.family = family
        self._warned: set[str] = set()
        template = str(self._chat_template())
        # Whoever could write these into an instruction would speak as the model, or point at a picture.
        self._control = {processor.image_token} if family.takes_images else set()
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special or (token.content in template and not token.content.isspace()):
                self._control.add(token.content)

    def _chat_template(self) -> str | None:
        """The template that wraps a prompt; the same before a policy is saved and after it is loaded."""
        if not self.config.chat:
            return None
        if self.family.takes_images and self.processor.chat_template is None:
            # Older repositories have it in the tokenizer's file only, and saving would give it to the processor: the
            # policy would be trained without and used with it.
            self.processor.chat_template = self.tokenizer.chat_template
        template = self.processor.chat_template
        if isinstance(template, dict):
            if "default" not in template:
                raise VLAActionsError(
                    f"the model has the chat templates {sorted(template)}, and none is the 'default': give "
                    "processor.chat_template one of them, or pass ActionConfig(chat=False)"
                )
            template = template["default"]
        if template is not None and "strftime_now" in template:
            template = FIXED_DATE + template
        return template

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

        Raises:
            ActionTokenError: an instruction holds a token that controls the model, or that is an action.
        """
        if not isinstance(instruction, (str, list, tuple)):
            raise VLAActionsError(f"an instruction is a sentence or a list of them, got {instruction!r}")
        sentences = [instruction] if isinstance(instruction, str) else list(instruction)
        if not sentences:
            raise VLAActionsError("no instruction was given")
        pictures = self._pictures(images, isinstance(instruction, str), len(sentences))
        texts = [self.text(s, len(p)) for s, p in zip(sentences, pictures, strict=True)]
        options: dict[str, Any] = {"padding": len(texts) > 1, "padding_side": padding_side, "return_tensors": "pt"}
        options |= self.processor_options
        bos = self.tokenizer.bos_token
        if bos is not None and texts[0].lstrip().startswith(bos):
            options["add_special_tokens"] = False  # the chat template has written it: a second one would follow
        if self.family.takes_images:
            batch = dict(self.processor(images=pictures, text=texts, **options))
        else:
            batch = dict(self.processor(texts, **options))
        batch.pop("labels", None)  # PaliGemma's processor makes some, for a text that follows the prompt
        self._check_ids(batch["input_ids"], batch["attention_mask"], sentences)
        return batch

    def text(self, sentence: str, n_images: int) -> str:
        """The text of one prompt as the processor gets it: chat template, marks of the pictures, wording, sentence.

        Args:
            sentence: the user's instruction. One that holds the text of a special token raises.
            n_images: pictures in front of it.
        """
        prompt = self.config.prompt_for(sentence)
        for token in self._control:
            if token in sentence:
                raise ActionTokenError(
                    f"the instruction {sentence!r} contains {token!r}, which controls the model: take it out"
                )
        template = self._chat_template()
        if template is None:
            return self.family.announce(self.processor, n_images) + prompt
        content: Any = prompt
        if self.family.takes_images:
            content = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
        try:
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            raise VLAActionsError(
                f"the model's chat template refuses a single message of a user ({error}): change "
                "processor.chat_template, or pass ActionConfig(chat=False)"
            ) from None

    def _check_ids(self, ids: torch.Tensor, mask: torch.Tensor, sentences: list[str]) -> None:
        """Refuse what the text did not show: ids that are actions, and a prompt that is closed already."""
        vocabulary = self.config.vocabulary
        if vocabulary is not None:
            self._check_actions(ids, mask, sentences)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ((ids[:, 1:] == bos) & (ids[:, :-1] == bos) & mask[:, :-1].bool()).any():
            raise ActionTokenError(
                f"the prompt begins twice with {self.tokenizer.bos_token!r}, once by the chat template and once by the "
                "tokenizer: load the tokenizer with add_bos_token=False"
            )
        last = ids.shape[1] - 1 - mask.flip(1).argmax(dim=1)
        if vocabulary is not None and (ids.gather(1, last[:, None]) == vocabulary.end_token_id).any():
            raise ActionTokenError(
                f"the tokenizer closes the prompt with {self.tokenizer.eos_token!r}, so no action would follow: load "
                "it with add_eos_token=False"
            )

    def _check_actions(self, ids: torch.Tensor, mask: torch.Tensor, sentences: list[str]) -> None:
        vocabulary = self.config.vocabulary
        actions = vocabulary.find(ids.numpy()) & mask.bool().numpy()
        if actions.any():
            row, column = np.argwhere(actions)[0]
            token = self.tokenizer.convert_ids_to_tokens(int(ids[row, column]))
            message = f"the prompt for {sentences[row]!r} contains {token!r}, which is an action token of this policy"
            if not vocabulary.in_prompts:
                raise ActionTokenError(f"{message}: say it in other words")
            if token not in self._warned:  # once: a robot asks several times a second
                self._warned.add(token)
                logger.warning("%s: the model reads it as a movement", message)

    def _pictures(self, images, single: bool, n: int) -> list[list[Image.Image]]:
        if not self.family.takes_images:
            if images is not None:
                raise VLAActionsError(f"a {self.family.name} model takes no images; pass images=None")
            return [[] for _ in range(n)]
        if images is None:
            raise VLAActionsError(f"a {self.family.name} model needs images; got None")
        if not single and not (isinstance(images, Sequence) and not isinstance(images, str)):
            raise VLAActionsError(
                f"a list of instructions needs a list of pictures, one entry each, got a {type(images).__name__}"
            )
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
        if picture.mode.startswith("I") or picture.mode == "F":
            raise VLAActionsError(
                f"a picture of mode {picture.mode!r} has more than 8 bits, which would be cut off at white: scale it to "
                "uint8 first"
            )
        return picture.convert("RGB")
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise VLAActionsError(
            f"a picture is a PIL image or a uint8 array (height, width, 3), got {array.dtype} {array.shape}"
        )
    return Image.fromarray(array)
