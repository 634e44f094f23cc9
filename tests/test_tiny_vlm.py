import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vla_actions.demo.tiny_vlm import TinyVLMError, TinyVLMSize, build_tokenizer, build_vlm
from hf_vla_actions.demo.world import COLORS, INSTRUCTIONS

SENTENCES = [text.format(color=color) for text in INSTRUCTIONS.values() for color in COLORS]
PROMPTS = [f"<image>\nIn: What action should the robot take to {sentence}?\nOut:" for sentence in SENTENCES]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(SENTENCES)


@pytest.fixture
def built():
    return build_vlm(build_tokenizer(SENTENCES), seed=0)


def batch(processor):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (48, 48, 3), dtype=np.uint8) for _ in range(2)]
    return processor(images=pictures, text=[PROMPTS[0], PROMPTS[-1]], padding=True, return_tensors="pt")


def test_layout_is_that_of_llama(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.padding_side == "left"
    assert tokenizer("move").input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("text", [SENTENCES[0], PROMPTS[0].removeprefix("<image>\n"), "Grüße, 12 cafés!", "a\nb  c"])
def test_any_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_sentences_of_the_corpus_are_one_token_or_one_a_word():
    whole, words = build_tokenizer(SENTENCES), build_tokenizer(SENTENCES, split_words=True)
    assert whole.tokenize("move to the red block") == ["▁move▁to▁the▁red▁block"]
    assert words.tokenize("move to the red block") == ["▁move", "▁to", "▁the", "▁red", "▁block"]
    assert len({tuple(whole(sentence).input_ids) for sentence in SENTENCES}) == len(SENTENCES)


def test_image_becomes_one_token_a_patch(built):
    model, processor = built
    inputs = batch(processor)
    image_tokens = (inputs.input_ids == model.config.image_token_id).sum(-1)
    assert image_tokens.tolist() == [TinyVLMSize().num_image_tokens] * 2
    assert inputs.pixel_values.shape == (2, 3, 48, 48)


def test_pictures_of_another_size_are_fitted(built):
    _, processor = built
    picture = np.zeros((96, 64, 3), dtype=np.uint8)
    assert processor(images=[picture], text=["<image>a"], return_tensors="pt").pixel_values.shape == (1, 3, 48, 48)


def test_same_seed_same_weights_and_the_random_state_stays(tokenizer):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, other = (build_vlm(tokenizer, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_saves_and_loads_identically_through_the_auto_classes(built, tmp_path):
    model, processor = built
    processor.tokenizer.add_tokens([AddedToken("<act_000>", normalized=False, special=False)])
    model.resize_token_embeddings(len(processor.tokenizer))
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs, again = batch(processor), batch(AutoProcessor.from_pretrained(tmp_path))
    for key in inputs:
        assert torch.equal(inputs[key], again[key])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**again).logits)


def test_generates_without_torchvision(built):
    model, processor = built
    inputs = batch(processor)
    out = model.eval().generate(**inputs, max_new_tokens=7, min_new_tokens=7, do_sample=False)
    assert out.shape[1] - inputs.input_ids.shape[1] == 7


def test_sizes_that_do_not_fit_raises():
    with pytest.raises(TinyVLMError, match="patch_size"):
        TinyVLMSize(image_size=50, patch_size=12)
    with pytest.raises(TinyVLMError, match="heads"):
        TinyVLMSize(text_dim=100, num_heads=8)
