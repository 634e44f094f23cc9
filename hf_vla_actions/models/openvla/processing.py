"""Pictures and prompts of OpenVLA; Pillow alone, to the same bits as the original (timm's transforms on torchvision).

Source: openvla/openvla, `prismatic/extern/hf/processing_prismatic.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.models.openvla.configuration import RESIZE_STRATEGIES

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
FILTERS |= {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PrismaticImageProcessor(BaseImageProcessor):
    """Pictures to `pixel_values`: each once for every tower, stacked along the channels.

    Args:
        use_fused_vision_backbone: two towers.
        image_resize_strategy: "resize-naive" (to the square, the aspect is lost), "resize-crop" (shorter side to the
            size, then the middle) or "letterbox" (padded to a square first).
        input_sizes: `[3, size, size]` of each tower.
        interpolations: filter of each tower.
        means: mean of each channel (0 to 1) for each tower.
        stds: standard deviation likewise.
        kwargs: other fields of the file (the original's `tvf_*` repeat these) are ignored.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (read by Transformers as a plain class attribute)

    def __init__(
        self,
        use_fused_vision_backbone: bool = True,
        image_resize_strategy: str = "resize-naive",
        input_sizes: Sequence[Sequence[int]] | None = None,
        interpolations: Sequence[str] | None = None,
        means: Sequence[Sequence[float]] | None = None,
        stds: Sequence[Sequence[float]] | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        towers = 2 if use_fused_vision_backbone else 1
        self.use_fused_vision_backbone = bool(use_fused_vision_backbone)
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = [list(size) for size in input_sizes or [(3, 224, 224)] * towers]
        self.interpolations = list(interpolations or ["bicubic"] * towers)
        self.means = [list(mean) for mean in means or [_MEAN, (0.5,) * 3][-towers:]]
        self.stds = [list(std) for std in stds or [_STD, (0.5,) * 3][-towers:]]
        lengths = {len(values) for values in (self.input_sizes, self.interpolations, self.means, self.stds)}
        if lengths != {towers}:
            raise VLAActionsError(
                f"{towers} tower(s) take as many input_sizes, interpolations, means and stds; got "
                f"{len(self.input_sizes)}, {len(self.interpolations)}, {len(self.means)} and {len(self.stds)}"
            )
        if image_resize_strategy not in RESIZE_STRATEGIES:
            raise VLAActionsError(
                f"image_resize_strategy must be one of {list(RESIZE_STRATEGIES)}, got {image_resize_strategy!r}"
            )
        unknown = sorted(set(self.interpolations) - set(FILTERS))
        if unknown or any(len(size) != 3 or size[1] != size[2] for size in self.input_sizes):
            raise VLAActionsError(
                f"input_sizes must be [3, size, size] and interpolations among {sorted(FILTERS)}; got "
                f"{self.input_sizes} and {self.interpolations}"
            )

    def __call__(  # type: ignore[override]
        self, images, *, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Same as `preprocess`."""
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)

    def preprocess(self, images, *, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Pictures to tensors.

        Args:
            images: a picture; a list of pictures, one a sample; or a list of lists, the pictures of each sample. A
                picture is a PIL image, or a uint8 array or tensor (height, width, 3).
            return_tensors: "pt" or "np".
            kwargs: the picture processors of Transformers take options here; this one has none and ignores them.

        Returns:
            `pixel_values` (samples, 3 * towers * pictures of a sample, size, size), float32.
        """
        entries = list(images) if isinstance(images, (list, tuple)) else [images]
        if not entries:
            raise VLAActionsError("no picture was given")
        samples = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in entries]
        if len({len(sample) for sample in samples}) > 1 or not samples[0]:
            raise VLAActionsError(
                f"every sample needs the same number of pictures, got {[len(sample) for sample in samples]}"
            )
        arrays = [
            np.concatenate([tower for picture in sample for tower in self._towers(_picture(picture))])
            for sample in samples
        ]
        return BatchFeature({"pixel_values": np.stack(arrays)}, tensor_type=return_tensors)

    def _towers(self, picture: Image.Image) -> list[np.ndarray]:
        """One (3, size, size) float32 array a tower."""
        if self.image_resize_strategy == "letterbox":
            # The color of the last tower in the list, for all of them.
            picture = _pad_to_square(picture, tuple(int(mean * 255) for mean in self.means[-1]))
        arrays = []
        for (_, size, _), name, mean, std in zip(
            self.input_sizes, self.interpolations, self.means, self.stds, strict=True
        ):
            resized = _resize(picture, size, FILTERS[name], self.image_resize_strategy == "resize-naive")
            values = np.asarray(resized, dtype=np.float32) / np.float32(255)
            values = (values - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
            arrays.append(np.ascontiguousarray(values.transpose(2, 0, 1)))
        return arrays


def _picture(picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    array = picture.numpy() if isinstance(picture, torch.Tensor) else np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise VLAActionsError(
            f"a picture is a PIL image or a uint8 array (height, width, 3), got {array.dtype} {array.shape}"
        )
    return Image.fromarray(array)


def _pad_to_square(picture: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The same border on both sides: where the difference is odd, one pixel short of a square."""
    width, height = picture.size
    edge = max(width, height)
    left, top = int((edge - width) / 2), int((edge - height) / 2)
    if not left and not top:
        return picture
    padded = Image.new("RGB", (width + 2 * left, height + 2 * top), color)
    padded.paste(picture, (left, top))
    return padded


def _resize(picture: Image.Image, size: int, resample: Image.Resampling, naive: bool) -> Image.Image:
    """To size x size: straight, or the shorter side to the size and then the middle."""
    width, height = picture.size
    if naive:
        target = (size, size)
    else:
        short, long = min(width, height), max(width, height)
        longer = int(size * long / short)
        target = (size, longer) if width <= height else (longer, size)
    if picture.size != target:
        picture = picture.resize(target, resample)
    if target == (size, size):
        return picture
    # Python rounds halves to the even number, as torchvision does.
    left, top = round((target[0] - size) / 2.0), round((target[1] - size) / 2.0)
    return picture.crop((left, top, left + size, top + size))


class PrismaticProcessor(ProcessorMixin):
    """Image processor and tokenizer in one.

    Args:
        image_processor: PrismaticImageProcessor.
        tokenizer: tokenizer of the language model; pads with `<PAD>` (32000).
        kwargs: other fields of the file, such as `chat_template`.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(  # type: ignore[override]
        self,
        text: str | list[str] | None = None,
        images: Any = None,
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prompts and pictures to the tensors of the model.

        Args:
            text: prompt or list of prompts.
            images: for one prompt a picture or a list of pictures; for a list of prompts one such entry each. Either
                order of the first two arguments is understood: the original took the text first, Transformers takes
                the images first.
            padding: as in the tokenizer; a batch for generation is padded on the left.
            truncation: as in the tokenizer.
            max_length: as in the tokenizer.
            padding_side: "left" or "right"; that of the tokenizer unless given.
            add_special_tokens: put BOS in front.
            return_tensors: "pt" or "np".
            kwargs: none is used.

        Returns:
            `input_ids`, `attention_mask` (batch, length), and with pictures `pixel_values`.
        """
        if _is_text(images) or (text is not None and not _is_text(text)):
            text, images = images, text
        if text is None and images is None:
            raise VLAActionsError("the processor needs text, images or both")
        data: dict[str, Any] = {}
        if text is not None:
            options = {} if padding_side is None else {"padding_side": padding_side}
            data.update(
                self.tokenizer(
                    [text] if isinstance(text, str) else list(text),
                    padding=padding,
                    truncation=truncation,
                    max_length=max_length,
                    add_special_tokens=add_special_tokens,
                    return_tensors=return_tensors,
                    **options,
                )
            )
            data.pop("token_type_ids", None)
        if images is not None:
            pictures = images if isinstance(images, (list, tuple)) else [images]
            if isinstance(text, str) and not isinstance(pictures[0], (list, tuple)):
                pictures = [list(pictures)]
            data.update(self.image_processor(pictures, return_tensors=return_tensors))
            if text is not None and len(data["pixel_values"]) != len(data["input_ids"]):
                raise VLAActionsError(
                    f"{len(data['pixel_values'])} samples of pictures for {len(data['input_ids'])} prompts"
                )
        return BatchFeature(data, tensor_type=return_tensors)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], str))
