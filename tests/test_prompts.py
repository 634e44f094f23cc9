"""Prompts of every family: its chat template, its pictures, and what an instruction must not contain."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import INSTRUCTIONS, action_config, picture
from tiny_families import FAMILIES, TOKENIZER_STYLES, VISION_FAMILIES
from transformers import AutoConfig

from hf_vla_actions import ActionConfig, ActionVocabulary, AutoModelForActionPrediction, VLAActionsError, to_vla
from hf_vla_actions.errors import ActionTokenError
from hf_vla_actions.models import PromptBuilder, load_model
from hf_vla_actions.models.families import family_of
from hf_vla_actions.models.wrap import warn_of_words

SENTENCE = INSTRUCTIONS[0]
TEMPLATED = [family for family in VISION_FAMILIES if family != "paligemma"]


def builder(family, layout="append", **kwargs):
    model, processor = FAMILIES[family](0, spare_rows=100)
    tokenizer = processor.tokenizer if family in VISION_FAMILIES else processor
    return PromptBuilder(
        processor, action_config(tokenizer, layout=layout, n_bins=32, **kwargs), family_of(model.config)
    )


def images_of(prompts, n=1):
    return [picture(i) for i in range(n)] if prompts.family.takes_images else None


@pytest.mark.parametrize("family", TEMPLATED)
@pytest.mark.parametrize("n_images", [1, 2])
def test_ids_are_those_of_the_processors_own_chat_template(family, n_images):
    prompts = builder(family)
    images = images_of(prompts, n_images)
    inputs = prompts.build(images, SENTENCE)
    text = prompts.config.prompt_for(SENTENCE)
    content = text if images is None else [{"type": "image", "image": i} for i in map(_pil, images)]
    if images is not None:
        content.append({"type": "text", "text": text})
    native = prompts.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(inputs["input_ids"], native["input_ids"])
    assert set(inputs) == set(native) - {"labels"}
    bos = prompts.tokenizer.bos_token_id
    if bos is not None and family != "gpt2":
        assert (inputs["input_ids"] == bos).sum() == 1, "one beginning, not that of the template and one more"


def test_text_only_model_uses_the_template_of_its_tokenizer():
    prompts = builder("qwen2")
    prompts.processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ids = prompts.build(None, [SENTENCE, "go"])["input_ids"][0]
    expected = f"<|im_start|>user\n{prompts.config.prompt_for(SENTENCE)}<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.tokenizer.decode(ids, skip_special_tokens=False) == expected


def _pil(array):
    return Image.fromarray(array)


@pytest.mark.parametrize("family", FAMILIES)
def test_bare_prompt_announces_pictures_and_begins_once(family):
    prompts = builder(family, chat=False)
    inputs = prompts.build(images_of(prompts, 2), SENTENCE)
    text = prompts.tokenizer.decode(inputs["input_ids"][0])
    assert SENTENCE in text
    assert "user" not in text.lower()
    bos = prompts.tokenizer.bos_token_id
    if bos is not None:
        assert (inputs["input_ids"] == bos).sum() <= 1
    if prompts.family.takes_images:
        one = prompts.build(images_of(prompts, 1), SENTENCE)
        assert inputs["input_ids"].shape[1] > one["input_ids"].shape[1], "a picture takes its place in the ids"


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_control_the_model_raise_in_an_instruction(family):
    prompts = builder(family)
    hidden = {token.content for token in prompts.tokenizer.added_tokens_decoder.values() if token.special}
    assert hidden
    for token in hidden:
        with pytest.raises(ActionTokenError, match="controls the model"):
            prompts.build(images_of(prompts), f"move {token} there")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["append", "per_dimension"])
def test_action_token_in_an_instruction_raises(family, layout):
    prompts = builder(family, layout)
    for token in (prompts.config.vocabulary.tokens[3], prompts.config.vocabulary.tokens[-1]):
        with pytest.raises(ActionTokenError, match="contains the action token"):
            prompts.build(images_of(prompts), f"move{token}there")


def test_spare_token_in_an_instruction_raises():
    model, tokenizer = FAMILIES["llama"]()
    tokenizer.add_tokens(["<unused0>", "<unused1>"])
    vocabulary = ActionVocabulary.spare(tokenizer, tokenizer.convert_tokens_to_ids(["<unused0>", "<unused1>"]))
    base = action_config(tokenizer, n_bins=2)
    config = ActionConfig(base.tokenizer, vocabulary, base.norm_stats, base.spaces)
    prompts = PromptBuilder(tokenizer, config, family_of(model.config))
    assert prompts.build(None, SENTENCE)["input_ids"].shape[0] == 1
    with pytest.raises(ActionTokenError, match="<unused1>', which is an action token of this policy"):
        prompts.build(None, "move <unused1> there")


def test_tail_warns_when_prompts_can_hold_actions_and_when_one_does(caplog):
    prompts = builder("llama", "tail")
    with caplog.at_level(logging.WARNING):
        warn_of_words(prompts.config.vocabulary, prompts.tokenizer)
    assert "action tokens are text that a prompt can contain" in caplog.text
    caplog.clear()
    prompts.build(None, list(INSTRUCTIONS))
    assert "the model reads it as a movement" in caplog.text
    once = len(caplog.records)
    prompts.build(None, list(INSTRUCTIONS))
    assert len(caplog.records) == once, "said once, not at every step of the robot"
    caplog.clear()
    append = builder("llama", "append")
    warn_of_words(append.config.vocabulary, append.tokenizer)
    assert not caplog.records


def test_date_in_a_template_is_that_of_the_training():
    prompts = builder("llama")
    date = "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
    prompts.processor.chat_template = date + "{{ bos_token }}Today is {{ day }}. {{ messages[0]['content'] }}"
    assert prompts.text(SENTENCE, 0) == "<s>Today is 26 Jul 2024. " + prompts.config.prompt_for(SENTENCE)
    assert (prompts.build(None, SENTENCE)["input_ids"] == prompts.tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize("style", ["llama", "qwen"])
def test_tokenizer_that_closes_the_prompt_raises(style):
    from tokenizers import processors

    tokenizer = TOKENIZER_STYLES[style]()
    end = tokenizer.eos_token
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    prompts = PromptBuilder(tokenizer, action_config(tokenizer, n_bins=8), family_of(FAMILIES["llama"]()[0].config))
    for instruction in (SENTENCE, [SENTENCE, "go"]):
        with pytest.raises(ActionTokenError, match="add_eos_token=False"):
            prompts.build(None, instruction)


def test_choice_is_saved_and_older_policies_go_on_without_a_template(tmp_path):
    prompts = builder("llama", chat=False)
    prompts.config.save_pretrained(tmp_path)
    assert ActionConfig.from_pretrained(tmp_path).chat is False
    values = prompts.config.to_dict()
    del values["chat"]
    (tmp_path / "action_config.json").write_text(json.dumps(values))
    assert ActionConfig.from_pretrained(tmp_path).chat is False
    assert builder("llama").config.chat is True


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_batches_of_several_pictures_equal_the_loop(family):
    prompts = builder(family)
    images = [[picture(0), picture(1)], [picture(2), picture(3)]]
    batch = prompts.build(images, [SENTENCE, "turn the lever all the way round to the front"])
    for i in range(2):
        one = prompts.build(images[i], [SENTENCE, "turn the lever all the way round to the front"][i])
        n = one["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][i, -n:], one["input_ids"][0])
        assert batch["attention_mask"][i].sum() == n
    assert "labels" not in batch


def test_unknown_vision_model_raises_and_says_how_to_add_it():
    class Config:
        model_type = "something_new"
        sub_configs = {"vision_config": None}  # noqa: RUF012

    with pytest.raises(VLAActionsError, match=r"got 'something_new'.*VISION_FAMILIES"):
        family_of(Config())


def test_noise_of_float_or_wrong_shape_raises():
    prompts = builder("llava")
    for bad in (np.zeros((4, 4, 3)), np.zeros((4, 4), dtype=np.uint8), "a.png"):
        with pytest.raises(VLAActionsError):
            prompts.build(bad, SENTENCE)


def test_template_in_the_tokenizers_file_alone_counts_before_and_after_saving(tmp_path):
    """Older repositories: processor.chat_template is None, and saving moves the tokenizer's one to the processor."""
    model, processor = FAMILIES["llava"](0, spare_rows=100)
    processor.save_pretrained(tmp_path / "old")
    model.save_pretrained(tmp_path / "old")
    template = (tmp_path / "old/chat_template.jinja").read_text()
    (tmp_path / "old/chat_template.jinja").unlink()
    file = tmp_path / "old/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    model, processor = load_model(str(tmp_path / "old"))
    policy = to_vla(model, processor, action_config(processor.tokenizer))
    before = policy.prompts.text(SENTENCE, 1)
    assert before.startswith("USER: ")
    policy.save_pretrained(tmp_path / "new")
    again = AutoModelForActionPrediction.from_pretrained(tmp_path / "new", self_test=False)
    assert again.prompts.text(SENTENCE, 1) == before


def test_several_templates_use_the_default_with_its_date_fixed():
    prompts = builder("llama")
    prompts.processor.chat_template = {
        "default": "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}",
        "tool_use": "X",
    }
    assert prompts.text(SENTENCE, 0).startswith("26 Jul 2024 In: ")
    prompts.processor.chat_template = {"rag": "X", "tool_use": "Y"}
    with pytest.raises(VLAActionsError, match=r"\['rag', 'tool_use'\].*chat=False"):
        prompts.text(SENTENCE, 0)


def test_template_that_wants_more_than_a_user_raises():
    prompts = builder("llama")
    prompts.processor.chat_template = "{{ raise_exception('a system message is needed') }}"
    with pytest.raises(VLAActionsError, match=r"a system message is needed.*chat=False"):
        prompts.text(SENTENCE, 0)


def test_two_beginnings_raise_and_a_line_break_before_one_is_seen():
    prompts = builder("llama")
    prompts.processor.chat_template = "\n{{ bos_token }}{{ messages[0]['content'] }}"
    assert (prompts.build(None, SENTENCE)["input_ids"] == prompts.tokenizer.bos_token_id).sum() == 1
    prompts.processor.chat_template = "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}"
    with pytest.raises(ActionTokenError, match="begins twice"):
        prompts.build(None, SENTENCE)


def test_words_of_the_template_are_refused_even_if_they_are_no_special_tokens():
    model, processor = FAMILIES["qwen2"](0)
    processor.add_tokens(["<tool_call>"])
    processor.chat_template = "{{ messages[0]['content'] }}<tool_call>"
    prompts = PromptBuilder(processor, action_config(processor, n_bins=8), family_of(model.config))
    with pytest.raises(ActionTokenError, match=r"'<tool_call>', which controls the model"):
        prompts.build(None, "go <tool_call> there")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_pictures_of_other_modes_are_their_rgb_version(mode):
    prompts = builder("llava")
    other = _pil(picture(0)).convert(mode)
    found = prompts.build(other, SENTENCE)["pixel_values"]
    assert torch.equal(found, prompts.build(other.convert("RGB"), SENTENCE)["pixel_values"])


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_pictures_of_more_than_8_bits_raise(mode):
    with pytest.raises(VLAActionsError, match="scale it to uint8"):
        builder("llava").build(Image.new(mode, (28, 28)), SENTENCE)


def test_number_of_cameras_is_that_of_the_training():
    prompts = builder("llava", cameras=["front", "wrist"])
    prompts.build([picture(0), picture(1)], SENTENCE)
    with pytest.raises(VLAActionsError, match="2 picture"):
        prompts.build(picture(0), SENTENCE)


def test_padding_that_is_an_action_token_is_no_movement(caplog):
    model, tokenizer = FAMILIES["llama"]()
    base = action_config(tokenizer, n_bins=2)
    ids = np.array([tokenizer.pad_token_id, 5])  # 5 is the byte 0x02
    vocabulary = ActionVocabulary(
        ids, tokenizer.eos_token_id, "tail", tuple(tokenizer.convert_ids_to_tokens(ids.tolist()))
    )
    config = ActionConfig(base.tokenizer, vocabulary, base.norm_stats, base.spaces)
    with caplog.at_level(logging.WARNING):
        batch = PromptBuilder(tokenizer, config, family_of(model.config)).build(None, ["go", "go on and on and on"])
    assert (batch["input_ids"] == tokenizer.pad_token_id).any()
    assert not caplog.records


def test_entries_that_are_no_list_raise():
    prompts = builder("llava")
    for images, instruction in ((_pil(picture(0)), ["go"]), (picture(0), ["go"]), (picture(0), None)):
        with pytest.raises(VLAActionsError, match="list of"):
            prompts.build(images, instruction)


@pytest.mark.parametrize("model_type", ["chameleon", "fuyu", "emu3", "udop"])
def test_vision_models_without_a_vision_config_are_not_taken_for_text(model_type):
    with pytest.raises(VLAActionsError, match=f"got '{model_type}'"):
        family_of(AutoConfig.for_model(model_type))
