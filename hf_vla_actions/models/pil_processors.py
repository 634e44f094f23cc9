"""Processors of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and SmolVLM for pictures, without torchvision.

The native processors of these families need a video processor, which needs torchvision (SmolVLM's needs num2words,
too), even where there are only pictures. The classes here are the native ones without the video processor. Everything
that is done to pictures and text is native code: `transformers/models/{qwen2_vl,qwen2_5_vl,qwen3_vl,smolvlm}/
processing_*.py` and the families' image processors for PIL.

What they save is what the native processors save: the settings of the video processor that were found beside the
checkpoint are written back as they were, and the classes have the native names, because `save_pretrained` writes the
name of the class. So a folder saved here loads natively where torchvision is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.qwen2_5_vl import processing_qwen2_5_vl
from transformers.models.qwen2_vl import processing_qwen2_vl
from transformers.models.qwen3_vl import processing_qwen3_vl
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import (
    IMAGE_PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
    is_torchvision_available,
)

from hf_vla_actions.errors import CheckpointError, VLAActionsError

_VIDEO_PROCESSOR = "video_processor"


class _PicturesOnly(ProcessorMixin):
    """What the processors here have in common; stands before the native class in the bases."""

    video_type = ""
    """Native class of the video processor."""
    video_settings: dict[str, Any]

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Refuse videos, which would otherwise be left out silently; then the native checks."""
        if videos is not None:
            raise VLAActionsError(
                f"this {type(self).__name__} takes pictures only; videos need the native one and torchvision"
            )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        """Take the video processor's settings from `processor_config.json` along; the native method drops them."""
        settings = {**processor_dict, "video_settings": processor_dict.get(_VIDEO_PROCESSOR)}
        return super().from_args_and_dict(args, settings, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The content of `processor_config.json`, with the video processor's settings in their native place."""
        settings = super().to_dict()
        settings.pop("video_settings", None)
        # Without any settings the native processor does not load; with the type alone it has its defaults.
        settings[_VIDEO_PROCESSOR] = self.video_settings or {"video_processor_type": self.video_type}
        return settings


class _QwenPictures(_PicturesOnly):
    """The three Qwen families differ only in the native class behind."""

    def __init__(self, image_processor, tokenizer, chat_template=None, video_settings=None):
        # The native constructor hands three parts on; those that are kept are the arguments of this one.
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)
        self.video_settings = dict(video_settings or {})


class Qwen2VLProcessor(_QwenPictures, processing_qwen2_vl.Qwen2VLProcessor):
    """Qwen2-VL's processor for pictures.

    Called with `images`, a flat or nested list of pictures, and `text`, one string or several, each with one
    `<|image_pad|>` a picture. Returns `input_ids`, `attention_mask` and `mm_token_type_ids` (batch, length; 1 at image
    tokens), `pixel_values` (patches of all pictures, channels * temporal_patch * patch²) and `image_grid_thw`
    (pictures, 3).

    Args:
        image_processor: `Qwen2VLImageProcessorPil`.
        tokenizer: of the checkpoint.
        chat_template: Jinja text, or a dict of several.
        video_settings: settings of the video processor, kept for saving only.
    """

    video_type = "Qwen2VLVideoProcessor"


class Qwen2_5_VLProcessor(_QwenPictures, processing_qwen2_5_vl.Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor for pictures; arguments and tensors as in `Qwen2VLProcessor`."""

    video_type = "Qwen2VLVideoProcessor"


class Qwen3VLProcessor(_QwenPictures, processing_qwen3_vl.Qwen3VLProcessor):
    """Qwen3-VL's processor for pictures; arguments and tensors as in `Qwen2VLProcessor`."""

    video_type = "Qwen3VLVideoProcessor"


class SmolVLMProcessor(_PicturesOnly, processing_smolvlm.SmolVLMProcessor):
    """SmolVLM's processor for pictures.

    Called with `images`, a nested list (one list a text; a flat list belongs to a single text), and `text` with one
    `<image>` a picture. Returns `input_ids` and `attention_mask` (batch, length), `pixel_values` (batch, crops, 3,
    height, width) and `pixel_attention_mask` (batch, crops, height, width).

    Args:
        image_processor: `SmolVLMImageProcessorPil`.
        tokenizer: of the checkpoint.
        image_seq_len: image tokens of one crop.
        chat_template: Jinja text, or a dict of several.
        video_settings: settings of the video processor, kept for saving only.
    """

    video_type = "SmolVLMVideoProcessor"

    def __init__(self, image_processor, tokenizer, image_seq_len=169, chat_template=None, video_settings=None):
        # The native constructor refuses to work without num2words, which only the prompts of videos need.
        self.image_token = getattr(tokenizer, "image_token", "<image>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token = getattr(tokenizer, "video_token", "<video>")
        self.fake_image_token = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
        self.global_image_token = getattr(tokenizer, "global_image_token", "<global-img>")
        self.end_of_utterance_token = getattr(tokenizer, "end_of_utterance_token", "<end_of_utterance>")
        self.image_seq_len = image_seq_len
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_settings = dict(video_settings or {})

    # The native one asks the video processor for its frame rate first.
    apply_chat_template = ProcessorMixin.apply_chat_template


PIL_PROCESSORS: dict[str, type[Qwen2VLProcessor | Qwen2_5_VLProcessor | Qwen3VLProcessor | SmolVLMProcessor]] = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "smolvlm": SmolVLMProcessor,
}
"""model_type (saved in config.json) to the processor without torchvision."""


def needs_pil_processor(model_type: str) -> bool:
    """Whether `load_pil_processor` must stand in for the native processor of a model type."""
    return model_type in PIL_PROCESSORS and not is_torchvision_available()


def load_pil_processor(path: str | Path, config, **hub_arguments: Any):
    """Load a processor for pictures that needs no torchvision.

    Args:
        path: folder or repository id, in the format of Transformers 5 or an older one.
        config: the model's configuration; its `model_type` and `image_token_id` are read.
        hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`, `force_download`.

    Returns:
        One of the classes in `PIL_PROCESSORS`.

    Raises:
        CheckpointError: the model type is none of these, a file is missing or broken, or the tokenizer is another
            model's.
    """
    path, model_type = str(path), config.model_type
    if model_type not in PIL_PROCESSORS:
        raise CheckpointError(
            f"no processor for {model_type!r} models works without torchvision here, only those of "
            f"{sorted(PIL_PROCESSORS)}; install torchvision to use the native one"
        )
    cls = PIL_PROCESSORS[model_type]
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub_arguments)
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **hub_arguments)
        settings, _ = cls.get_processor_dict(path, **hub_arguments)
        settings.setdefault(_VIDEO_PROCESSOR, _old_video_settings(path, hub_arguments))
        processor = cls.from_args_and_dict([image_processor, tokenizer], settings)
    except (OSError, ValueError, TypeError, ImportError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"no {model_type} processor for pictures to be had from {path!r}: {why} (install torchvision to use "
            "the native processor)"
        ) from error
    found = tokenizer.get_vocab().get(processor.image_token)
    if found != config.image_token_id:
        raise CheckpointError(
            f"the tokenizer in {path!r} is not that of the model: its image token {processor.image_token!r} has id "
            f"{found}, the model expects {config.image_token_id}"
        )
    return processor


def _old_video_settings(path: str, hub_arguments: dict[str, Any]) -> dict[str, Any]:
    # Before Transformers 5 they had a file of their own, and at first they were those of the pictures. The order is
    # that of transformers/video_processing_utils.py, get_video_processor_dict.
    for name in (VIDEO_PROCESSOR_NAME, IMAGE_PROCESSOR_NAME):
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)
        if file is not None:
            return json.loads(Path(file).read_text(encoding="utf-8"))
    return {}
