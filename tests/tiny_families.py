"""Tiny random models of every family, as they come from the Hub: native classes, no action tokens yet, offline.

`FAMILIES[model_type](seed=0, *, tie=None, spare_rows=0)` gives (model, processor), for text-only models (model,
tokenizer). `TOKENIZER_STYLES[style](texts=None, extra=())` gives a tokenizer trained on a few sentences.

What is real: classes, special tokens and their ids in the configurations, chat templates, image tokens in the prompt,
tied or untied embeddings, padding sides. What is not: sizes, weights, and the order of rare special tokens.
"""

import json

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    GemmaTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from hf_vla_actions.demo.tiny_vlm import build_tokenizer
from hf_vla_actions.models.pil_processors import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
from hf_vla_actions.models.pil_processors import SmolVLMProcessor as SmolVLMPictures

WIDTH = 32
LAYERS = 2
STD = 0.2
"""Of the first weights; with Transformers' 0.02 a picture hardly changes the logits of so narrow a model."""

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_ALPHABET = ["▁", "\n", *map(chr, range(0x21, 0x7F))]


def default_texts():
    # Imported late, so that tests.tiny can use this module.
    from tiny import INSTRUCTIONS

    from hf_vla_actions import ActionConfig

    prompt = ActionConfig.__dataclass_fields__["prompt"].default
    return [*INSTRUCTIONS, *(prompt.format(instruction=i) for i in INSTRUCTIONS)]


# --- tokenizers -----------------------------------------------------------------------------------------------------


def _learn(texts, normalizer, pre_tokenizer, alphabet, size):
    """The tokens and merges that BPE learns."""
    core = Tokenizer(models.BPE())
    if normalizer is not None:
        core.normalizer = normalizer
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + size, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(default_texts() if texts is None else texts, trainer)
    learned = json.loads(core.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    return words, [tuple(pair) for pair in learned["merges"]]


def llama_tokenizer(texts=None, extra=()):
    """Byte fallback, Prepend + Replace; `<s>` in front, pads left."""
    tokenizer = build_tokenizer(default_texts() if texts is None else texts)
    return _with_special(tokenizer, extra)


def gpt2_tokenizer(texts=None, extra=(), **special):
    """Byte-level BPE; `<|endoftext|>` is bos and eos, nothing is put in front, no pad token."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words, merges = _learn(texts, None, pre, sorted(pre_tokenizers.ByteLevel.alphabet()), 150)
    vocab = {token: index for index, token in enumerate([*words, "<|endoftext|>"])}
    return _with_special(GPT2Tokenizer(vocab=vocab, merges=merges, **special), extra)


def gemma_tokenizer(texts=None, extra=(), **special):
    """Byte fallback, spaces replaced, nothing prepended; `<bos>` in front, pads left; the end of a turn is a token."""
    words, merges = _learn(texts, normalizers.Replace(" ", "▁"), None, _ALPHABET, 150)
    head = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {token: index for index, token in enumerate([*head, *_BYTES, *words])}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, **special)
    return _with_special(tokenizer, ["<start_of_turn>", "<end_of_turn>", *extra])


def qwen_tokenizer(texts=None, extra=()):
    """Byte-level BPE after NFC; no bos, `<|im_end|>` is eos, `<|endoftext|>` pad; special tokens behind the rest."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words, merges = _learn(texts, normalizers.NFC(), pre, sorted(pre_tokenizers.ByteLevel.alphabet()), 150)
    vocab = {token: index for index, token in enumerate(words)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    vision = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    return _with_special(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision, *extra])


def _with_special(tokenizer, tokens):
    if tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


TOKENIZER_STYLES = {
    "llama": llama_tokenizer,
    "gpt2": gpt2_tokenizer,
    "gemma": gemma_tokenizer,
    "qwen": qwen_tokenizer,
}

# --- chat templates: the text that the real ones make of pictures and sentences ---------------------------------------

_PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}TEXT{% endif %}{% endfor %}{% endif %}"
)


def _template(before, role, image, text, after, end, ask):
    parts = _PARTS.replace("IMAGE", image).replace("TEXT", text)
    return (
        f"{before}{{% for m in messages %}}{role}{parts}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{ask}{{% endif %}}{end}"
    )


_TEXT = "{{ part['text'] }}"
LLAVA_TEMPLATE = _template(
    "",
    "{{ m['role'] | upper }}: ",
    "<image>\n",
    _TEXT,
    " {% if m['role'] == 'assistant' %}</s>{% endif %}",
    "",
    "ASSISTANT:",
)
_FIRST_IS_IMAGE = "{% if m['content'] is not string and m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
SMOLVLM_TEMPLATE = _template(
    "<|im_start|>",
    "{{ m['role'] | capitalize }}" + _FIRST_IS_IMAGE,
    "<image>",
    _TEXT,
    "<end_of_utterance>\n",
    "",
    "Assistant:",
)
GEMMA3_TEMPLATE = _template(
    "{{ bos_token }}",
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n",
    "<start_of_image>",
    "{{ part['text'] | trim }}",
    "<end_of_turn>\n",
    "",
    "<start_of_turn>model\n",
)
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_QWEN = (
    "<|im_start|>{{ m['role'] }}\n",
    "<|vision_start|><|image_pad|><|vision_end|>",
    _TEXT,
    "<|im_end|>\n",
    "",
    "<|im_start|>assistant\n",
)
QWEN2_VL_TEMPLATE = _template("{% if messages[0]['role'] != 'system' %}" + _SYSTEM + "{% endif %}", *_QWEN)
QWEN3_VL_TEMPLATE = _template("", *_QWEN)

# --- models ---------------------------------------------------------------------------------------------------------


def _create(cls, config, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).eval()


def _special(tokenizer, tie):
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": tie,
    }


def _text(tokenizer, spare_rows, tie, **more):
    """Arguments that the text models share."""
    return {
        "vocab_size": len(tokenizer) + spare_rows,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "initializer_range": STD,
        **_special(tokenizer, tie),
        **more,
    }


def _siglip(image_size, patch_size, **more):
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
        **more,
    }


def _id(tokenizer, token):
    index = tokenizer.convert_tokens_to_ids(token)
    assert index not in (None, tokenizer.unk_token_id), token
    return index


def llava(seed=0, *, tie=None, spare_rows=0):
    """CLIP + Llama; 4 image tokens; untied."""
    tokenizer, tie = llama_tokenizer(), bool(tie)
    vision = CLIPVisionConfig(**_siglip(28, 14), projection_dim=WIDTH, initializer_range=STD, initializer_factor=5.0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text(tokenizer, spare_rows, tie)),
        image_token_index=_id(tokenizer, "<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
        **_special(tokenizer, tie),
    )
    edge = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=edge, crop_size=edge),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _create(LlavaForConditionalGeneration, config, seed), processor


_IDEFICS = (
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)


def _idefics_parts(spare_rows, tie):
    # The first SmolVLM is an Idefics3 with this tokenizer.
    tokenizer = gpt2_tokenizer(
        extra=_IDEFICS, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|im_end|>"
    )
    text = LlamaConfig(**_text(tokenizer, spare_rows, tie))
    shared = {"text_config": text, "image_token_id": _id(tokenizer, "<image>"), "scale_factor": 2}
    images = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 56}, "do_image_splitting": False}
    return tokenizer, {**shared, **_special(tokenizer, tie)}, images


def idefics3(seed=0, *, tie=None, spare_rows=0):
    """SigLIP + Llama; 4 image tokens between fake and global ones; untied."""
    tokenizer, shared, images = _idefics_parts(spare_rows, bool(tie))
    config = Idefics3Config(vision_config={**_siglip(56, 14), "initializer_range": STD}, **shared)
    images = Idefics3ImageProcessorPil(**images)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE)
    return _create(Idefics3ForConditionalGeneration, config, seed), processor


def smolvlm(seed=0, *, tie=None, spare_rows=0):
    """SigLIP + Llama; as Idefics3, with a processor of our own where torchvision is missing; untied."""
    tokenizer, shared, images = _idefics_parts(spare_rows, bool(tie))
    config = SmolVLMConfig(vision_config={**_siglip(56, 14), "initializer_range": STD}, **shared)
    images = SmolVLMImageProcessorPil(**images)
    processor = SmolVLMPictures(images, tokenizer, image_seq_len=4, chat_template=SMOLVLM_TEMPLATE)
    return _create(SmolVLMForConditionalGeneration, config, seed), processor


def paligemma(seed=0, *, tie=None, spare_rows=0):
    """SigLIP + Gemma; 4 image tokens in front; tied; the processor adds 1152 tokens and has no chat template."""
    tokenizer, tie = gemma_tokenizer(), True if tie is None else tie
    edge = {"height": 28, "width": 28}
    images = SiglipImageProcessorPil(size=edge, image_seq_length=4)
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tokenizer)
    text = {"model_type": "gemma", "head_dim": 16, **_text(tokenizer, spare_rows, tie)}
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **_siglip(28, 14, vision_use_head=False)},
        text_config=text,
        image_token_index=_id(tokenizer, "<image>"),
        vocab_size=len(tokenizer) + spare_rows,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        **_special(tokenizer, tie),
    )
    return _create(PaliGemmaForConditionalGeneration, config, seed), processor


def gemma3(seed=0, *, tie=None, spare_rows=0):
    """SigLIP + Gemma3; 4 soft tokens between begin and end; tied; two ends: `<eos>` and `<end_of_turn>`."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer, tie = gemma_tokenizer(extra_special_tokens=named), True if tie is None else tie
    text = _text(tokenizer, spare_rows, tie, head_dim=16, query_pre_attn_scalar=16, sliding_window=64)
    text["layer_types"] = ["sliding_attention", "full_attention"]
    special = _special(tokenizer, tie)
    special["eos_token_id"] = [tokenizer.eos_token_id, _id(tokenizer, "<end_of_turn>")]
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **_siglip(56, 14, vision_use_head=False)},
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=_id(tokenizer, named["boi_token"]),
        eoi_token_index=_id(tokenizer, named["eoi_token"]),
        image_token_index=_id(tokenizer, named["image_token"]),
        initializer_range=STD,
        **special,
    )
    images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, image_seq_length=4)
    processor = Gemma3Processor(images, tokenizer, chat_template=GEMMA3_TEMPLATE, image_seq_length=4)
    model = _create(Gemma3ForConditionalGeneration, config, seed)
    with torch.no_grad():  # Transformers starts this matrix at zero: no picture would reach the text model
        weight = model.get_parameter("model.multi_modal_projector.mm_input_projection_weight")
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * STD)
    return model, processor


def _qwen_ids(tokenizer):
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    return {f"{name}_token_id": _id(tokenizer, token) for name, token in names.items()}


def _qwen_text(tokenizer, spare_rows, tie, **rope):
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2], **rope}
    text = _text(tokenizer, spare_rows, tie, rope_parameters=rope)
    # As in the checkpoints: there is a bos id although the tokenizer has no bos.
    text["bos_token_id"] = tokenizer.pad_token_id
    return text


def _qwen_vl(model_class, config_class, processor_class, template, vision, text, seed, tie, *, patch_size, tokenizer):
    special = _special(tokenizer, tie)
    special["bos_token_id"] = tokenizer.pad_token_id
    config = config_class(vision_config=vision, text_config=text, **_qwen_ids(tokenizer), **special)
    merged = (2 * patch_size) ** 2
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": merged, "longest_edge": 4 * merged}, patch_size=patch_size, merge_size=2
    )
    return _create(model_class, config, seed), processor_class(images, tokenizer, chat_template=template)


def qwen2_vl(seed=0, *, tie=None, spare_rows=0):
    """4 image tokens for a square picture; untied, as the 7B; multimodal rotary positions."""
    tokenizer, tie = qwen_tokenizer(), bool(tie)
    vision = {"depth": LAYERS, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    vision["initializer_range"] = STD
    text = _qwen_text(tokenizer, spare_rows, tie)
    names = (Qwen2VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLProcessor, QWEN2_VL_TEMPLATE)
    return _qwen_vl(*names, vision, text, seed, tie, patch_size=14, tokenizer=tokenizer)


def qwen2_5_vl(seed=0, *, tie=None, spare_rows=0):
    """As Qwen2-VL, with a vision tower whose first layer sees windows only."""
    tokenizer, tie = qwen_tokenizer(), bool(tie)
    vision = {"depth": LAYERS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 2}
    vision |= {"out_hidden_size": WIDTH, "window_size": 56, "fullatt_block_indexes": [1], "initializer_range": STD}
    text = _qwen_text(tokenizer, spare_rows, tie)
    names = (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, Qwen2_5_VLProcessor, QWEN2_VL_TEMPLATE)
    return _qwen_vl(*names, vision, text, seed, tie, patch_size=14, tokenizer=tokenizer)


def qwen3_vl(seed=0, *, tie=None, spare_rows=0):
    """4 image tokens; tied, as the 4B; picture features also enter the first layer of the text model."""
    tokenizer, tie = qwen_tokenizer(), True if tie is None else tie
    vision = {"depth": LAYERS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_heads": 2}
    vision |= {"out_hidden_size": WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    vision |= {"initializer_range": STD, "patch_size": 16}
    text = _qwen_text(tokenizer, spare_rows, tie, mrope_interleaved=True)
    text["head_dim"] = 16
    names = (Qwen3VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLProcessor, QWEN3_VL_TEMPLATE)
    return _qwen_vl(*names, vision, text, seed, tie, patch_size=16, tokenizer=tokenizer)


def llama(seed=0, *, tie=None, spare_rows=0):
    """Text only; untied."""
    tokenizer = llama_tokenizer()
    return _create(LlamaForCausalLM, LlamaConfig(**_text(tokenizer, spare_rows, bool(tie))), seed), tokenizer


def gpt2(seed=0, *, tie=None, spare_rows=0):
    """Text only; tied; no pad token."""
    tokenizer, tie = gpt2_tokenizer(), True if tie is None else tie
    config = GPT2Config(
        vocab_size=len(tokenizer) + spare_rows,
        n_positions=256,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=2,
        initializer_range=STD,
        **_special(tokenizer, tie),
    )
    return _create(GPT2LMHeadModel, config, seed), tokenizer


def qwen2(seed=0, *, tie=None, spare_rows=0):
    """Text only; tied, as the 0.5B; the configuration has a bos, the tokenizer has none."""
    tokenizer, tie = qwen_tokenizer(), True if tie is None else tie
    text = _text(tokenizer, spare_rows, tie, bos_token_id=tokenizer.pad_token_id)
    return _create(Qwen2ForCausalLM, Qwen2Config(**text), seed), tokenizer


VISION_FAMILIES = {
    "llava": llava,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "paligemma": paligemma,
    "gemma3": gemma3,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}
TEXT_FAMILIES = {"llama": llama, "gpt2": gpt2, "qwen2": qwen2}
FAMILIES = {**VISION_FAMILIES, **TEXT_FAMILIES}
