"""A LLaVA small enough to train from nothing in minutes, and a Llama-style tokenizer to go with it.

Notable decisions:

- Everything is random: no weights are downloaded.
- The tokenizer merges across spaces (like Llama's, it has no pre-tokenizer). Trained on the demo's few sentences,
  it makes each of them one token. That is what makes minutes enough: with one token a word the model has to find
  the color among many tokens first, and goes to either block (`benchmarks/demo_words.py`).
- The prompt for this demo is `PROMPT`: the sentence comes last, so that the first action number is predicted from it.
- Pictures are normalized with mean 1: the world's white table becomes zero, and its red, green and blue become
  linearly independent.
- Weights start larger than Transformers' 0.02 (`initializer_range`), about 1 / sqrt(width), and positions of patches
  larger still (`position_scale`): at 0.02 a network this narrow attends almost uniformly at first. Not ablated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..errors import VLAActionsError

PROMPT = " {instruction}"
"""The demo's prompt. The space keeps the sentence apart from the line break before it, so that it is one token."""


@dataclass(frozen=True)
class TinyTraining:
    """How the tiny model learns to reach; the numbers go straight into `TrainingArguments`.

    AdamW, linear schedule, float32, loss on the action tokens and `</s>` alone, all weights trained, one action a call.
    The demonstrations are recorded with noise: what is carried out is the expert's action plus `noise`, what is
    written down is the expert's own (DART). What `hf-vla demo` measured on unseen seeds of "reach", two blocks:

    =====  ======  ========  =======  =============  ===================
    .      --seed  episodes  success  blank picture  swapped instruction
    =====  ======  ========  =======  =============  ===================
    FULL   0       50        100 %    2 %            2 %
    QUICK  0       30        77 %     3 %            17 %
    QUICK  1       30        67 %     3 %            23 %
    =====  ======  ========  =======  =============  ===================

    With one token a word instead of one a sentence, FULL ends at 50 % success and follows a swapped instruction as
    often (52 %; `benchmarks/demo_words.py`): it has learned to go to a block, not to which.

    Attributes:
        num_episodes: Demonstrations, each about 3.5 steps.
        noise: Standard deviation in meters added to x and y (a third of it to z) of what is carried out.
        batch_size: Steps a batch.
        max_steps: Optimizer steps.
        learning_rate: Peak of the schedule.
        warmup_steps: Part of the steps spent warming up (below 1 it is a ratio, as in `TrainingArguments`).
        adam_beta2: AdamW's second decay.
        weight_decay: On matrices only.
        max_grad_norm: Gradient clipping.
    """

    num_episodes: int = 4000
    noise: float = 0.015
    batch_size: int = 32
    max_steps: int = 3500
    learning_rate: float = 7e-4
    warmup_steps: float = 0.05
    adam_beta2: float = 0.98
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


FULL = TinyTraining()
"""The demo's setting."""
QUICK = TinyTraining(num_episodes=2000, max_steps=900, learning_rate=1e-3)
"""Enough to be well above chance; for continuous integration."""

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_ALPHABET = ["▁", *map(chr, range(0x21, 0x7F))]
_WORD = r"▁?[A-Za-z]+|▁?[0-9]+|▁|[^▁A-Za-z0-9]"


class TinyVLMError(VLAActionsError):
    """Sizes of the tiny model that do not fit each other."""


@dataclass(frozen=True)
class TinyVLMSize:
    """Sizes of the tiny model; the defaults are those the demo trains.

    Attributes:
        image_size: Edge of the square picture, pixels.
        patch_size: Edge of a patch, pixels; (image_size / patch_size)² image tokens.
        vision_dim: Width of the vision tower.
        vision_layers: Depth of the vision tower.
        text_dim: Width of the language model.
        text_layers: Depth of the language model.
        num_heads: Attention heads of both.
        initializer_range: Standard deviation of the language model's and projector's first weights.
        position_scale: Factor on the first position embeddings of the patches.
        mlp_ratio: Hidden width of the feed-forward layers over the width of the layer.
    """

    image_size: int = 48
    patch_size: int = 16
    vision_dim: int = 64
    vision_layers: int = 2
    text_dim: int = 96
    text_layers: int = 2
    num_heads: int = 4
    initializer_range: float = 0.08
    position_scale: float = 5.0
    mlp_ratio: int = 2

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise TinyVLMError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        for width in (self.vision_dim, self.text_dim):
            if width % (2 * self.num_heads):
                raise TinyVLMError(f"width {width} is not a multiple of 2 x {self.num_heads} heads.")

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one picture in the language model's sequence."""
        return (self.image_size // self.patch_size) ** 2


def build_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 2000, split_words: bool = False
) -> PreTrainedTokenizerFast:
    """Train a Llama-style tokenizer (BPE, bytes as fallback, `▁` for spaces, `<s>` in front).

    Every sentence of a small corpus becomes one token (one token a word with `split_words`). Any other text still
    encodes, piece by piece or byte by byte, and decodes to itself.

    Args:
        texts: The corpus, for example every prompt of the demo.
        vocab_size: Upper bound of learned tokens (the 256 bytes and the special tokens come on top).
        split_words: Keep words (and numbers, and signs) apart.

    Returns:
        A fast tokenizer with `<unk>` 0, `<s>` 1, `</s>` 2, bytes 3..258, and last `<pad>` and `<image>`; pads left.
    """
    core = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if split_words:
        core.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=_ALPHABET, show_progress=False)
    core.train_from_iterator((line for text in texts for line in text.splitlines()), trainer)

    # The trainer knows no bytes: put them in front of what it learned, as Llama does.
    learned = json.loads(core.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *_BYTES, *words])}
    merges = [(left, right) for left, right in learned["merges"]]
    core.model = BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_vlm(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, *, size: TinyVLMSize | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build a tiny LLaVA (CLIP vision tower, Llama text model) with random weights, and its processor.

    Args:
        tokenizer: From `build_tokenizer`. Action tokens, if any, are added afterwards.
        seed: Seed of the weights; the caller's random state is left as it was.
        size: Widths and depths; the demo's unless given.

    Returns:
        Model and processor; both save and load through `AutoModelForImageTextToText` and `AutoProcessor`.
    """
    size = size or TinyVLMSize()
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    vision = CLIPVisionConfig(
        hidden_size=size.vision_dim,
        intermediate_size=size.mlp_ratio * size.vision_dim,
        projection_dim=size.vision_dim,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.num_heads,
        image_size=size.image_size,
        patch_size=size.patch_size,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_dim,
        intermediate_size=size.mlp_ratio * size.text_dim,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=512,
        initializer_range=size.initializer_range,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=size.num_image_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # patches without CLIP's class token
        **special,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if "vision_tower" in name and name.endswith("position_embedding.weight"):
                parameter.mul_(size.position_scale)
    edge = {"height": size.image_size, "width": size.image_size}
    image_processor = CLIPImageProcessorPil(size=edge, crop_size=edge, image_mean=[1.0] * 3, image_std=[0.5] * 3)
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=size.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops again
    )
    return model, processor
