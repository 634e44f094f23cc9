import pytest
import torch
from PIL import Image
from tiny_families import FAMILIES, TEXT_FAMILIES, TOKENIZER_STYLES, VISION_FAMILIES
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from hf_vla_actions.models.pil_processors import PIL_PROCESSORS, load_pil_processor

SENTENCE = "move to the red block"


def flat(shade):
    return Image.new("RGB", (48, 48), (shade, shade, shade))


def prompt_of(processor, sentence=SENTENCE):
    if processor.chat_template is None:
        return f"{processor.image_token}{sentence}"
    parts = [{"type": "image"}, {"type": "text", "text": sentence}]
    return processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)


def inputs_of(processor, picture):
    prompt = prompt_of(processor)
    own = processor.tokenizer.bos_token is None or not prompt.startswith(processor.tokenizer.bos_token)
    return processor(images=[[picture]], text=[prompt], add_special_tokens=own, return_tensors="pt")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def reload(model_type, folder):
    config_type = AutoModelForImageTextToText if model_type in VISION_FAMILIES else AutoModelForCausalLM
    model, info = config_type.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    if model_type in PIL_PROCESSORS:
        return model, load_pil_processor(folder, model.config)
    return model, (AutoProcessor if model_type in VISION_FAMILIES else AutoTokenizer).from_pretrained(folder)


@pytest.mark.parametrize("model_type", VISION_FAMILIES)
def test_vision_family(model_type, tmp_path):
    state = torch.get_rng_state()
    model, processor = FAMILIES[model_type]()
    assert torch.equal(state, torch.get_rng_state())
    assert model.config.model_type == model_type
    assert model.num_parameters() < 300_000
    inputs = inputs_of(processor, flat(0))
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(model.config.image_token_id) == 4
    assert SENTENCE in processor.tokenizer.decode(ids)
    assert ids.count(processor.tokenizer.bos_token_id) <= 1
    black, white = logits(model, inputs), logits(model, inputs_of(processor, flat(255)))
    assert (black - white)[0, -1].abs().max() > 0.1
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] == len(ids) + 3

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = reload(model_type, tmp_path)
    other = inputs_of(reader, flat(0))
    assert list(other) == list(inputs)
    assert all(torch.equal(other[name], inputs[name]) for name in inputs)
    assert reader.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert prompt_of(reader) == prompt_of(processor)
    assert torch.equal(logits(again, other), black)


# What a family's processor says of a token that is generated: PaliGemma's 1 is "sees what is before it only", and 1 is
# "belongs to a picture" everywhere else.
TYPE_OF_NEW_TOKENS = {"paligemma": 1}


@pytest.mark.parametrize("model_type", VISION_FAMILIES)
def test_one_pass_over_an_answer_is_its_generation(model_type):
    """How an answer has to be appended, so that training sees what generation does."""
    model, processor = FAMILIES[model_type]()
    inputs = dict(inputs_of(processor, flat(90)))
    inputs.pop("labels", None)  # PaliGemma's
    out = model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    length = inputs["input_ids"].shape[1]
    new = out.sequences[:, length:]
    whole = inputs | {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            types = torch.full_like(new, TYPE_OF_NEW_TOKENS.get(model_type, 0))
            whole[name] = torch.cat([inputs[name], types], dim=1)
    for training in (False, True):
        model.train(training)
        assert torch.allclose(logits(model, whole)[:, length - 1 : -1], torch.stack(out.logits, 1), atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", VISION_FAMILIES)
def test_batch_is_the_loop(model_type, side):
    model, processor = FAMILIES[model_type]()
    own = model_type != "gemma3"  # whose template begins with the token that its tokenizer adds, too
    texts = [prompt_of(processor, sentence) for sentence in ("go", SENTENCE, "turn the lever, then push it")]
    images = [[flat(shade)] for shade in (0, 90, 255)]
    arguments = {"return_tensors": "pt", "add_special_tokens": own}
    batch = processor(images=images, text=texts, padding=True, padding_side=side, **arguments)
    batch.pop("labels", None)
    together = logits(model, batch)
    for k in range(3):
        real = batch["attention_mask"][k].bool()
        single = processor(images=[images[k]], text=[texts[k]], **arguments)
        single.pop("labels", None)
        assert torch.equal(batch["input_ids"][k][real], single["input_ids"][0])
        assert torch.allclose(together[k][real], logits(model, single)[0], atol=1e-4)


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
def test_text_family(model_type, tmp_path):
    model, tokenizer = FAMILIES[model_type]()
    assert model.num_parameters() < 300_000
    inputs = tokenizer([SENTENCE], return_tensors="pt")
    assert tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True).strip() == SENTENCE
    out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, reader = reload(model_type, tmp_path)
    other = reader([SENTENCE], return_tensors="pt")
    assert torch.equal(other["input_ids"], inputs["input_ids"])
    assert reader.get_vocab() == tokenizer.get_vocab()
    assert torch.equal(logits(again, other), logits(model, inputs))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_tie_and_spare_rows(model_type, tie):
    model, processor = FAMILIES[model_type](seed=1, tie=tie, spare_rows=7)
    tokenizer = processor.tokenizer if model_type in VISION_FAMILIES else processor
    rows, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert rows.shape[0] == head.shape[0] == len(tokenizer) + 7
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert (rows.data_ptr() == head.data_ptr()) == tie
    text = model.config.get_text_config()
    assert text.vocab_size == rows.shape[0]
    assert model.config.eos_token_id is not None
    assert text.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("model_type", FAMILIES)
def test_seed_decides_the_weights(model_type):
    weights = [FAMILIES[model_type](seed)[0].get_input_embeddings().weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("style", TOKENIZER_STYLES)
def test_tokenizer_style(style, tmp_path):
    tokenizer = TOKENIZER_STYLES[style](["open the drawer", "close it"])
    for text in ("open the drawer", "Größe 7\nnew line", "a  b"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        front = ids[:1] == [tokenizer.bos_token_id]
        assert front == (style in ("llama", "gemma"))
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
