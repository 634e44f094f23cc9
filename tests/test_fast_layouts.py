"""FAST over every layout of action tokens, on real model classes: only whole chunks come out, and they close as they should."""

import numpy as np
import pytest
import torch
from test_fast_processor import smooth
from test_vocabulary import PALIGEMMA_EXTRA
from tiny import INSTRUCTIONS, SPACE, STATS, picture, sharpen
from tiny_families import FAMILIES
from transformers import LogitsProcessorList

from hf_vla_actions import ActionConfig, ActionVocabulary, FASTActionTokenizer, FASTLogitsProcessor, NormStats, to_vla

HORIZON, DOF = 4, 7


@pytest.fixture(scope="module")
def fast():
    return FASTActionTokenizer.fit(smooth(200, HORIZON, DOF), 160, 10)


def vocabulary_of(layout, tokenizer, model, n):
    if layout == "pi0_fast":
        tokenizer.add_tokens(PALIGEMMA_EXTRA)
        return ActionVocabulary.pi0_fast(tokenizer, n)
    if layout == "named":
        return ActionVocabulary.named(tokenizer, n, add=True)
    if layout == "named, other end":
        return ActionVocabulary.named(tokenizer, n, "<a{}>", add=True).ending_with(tokenizer, "|")
    if layout == "spare":
        first = model.get_input_embeddings().weight.shape[0] - n
        return ActionVocabulary.spare(tokenizer, np.arange(first, first + n))
    return getattr(ActionVocabulary, layout)(tokenizer, n)


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        ("pi0_fast", "paligemma"),
        ("named", "qwen2_5_vl"),
        ("named", "qwen3_vl"),
        ("named, other end", "qwen2"),
        ("append", "smolvlm"),
        ("tail", "llama"),
        ("spare", "gpt2"),
    ],
)
def test_generate_gives_whole_chunks_and_closes_them(fast, layout, family):
    model, processor = FAMILIES[family](0, spare_rows=fast.n_codes)
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabulary = vocabulary_of(layout, tokenizer, model, fast.n_codes)
    config = ActionConfig(
        fast, vocabulary, NormStats({"my_robot": {"action": STATS}}), {"my_robot": SPACE}, horizon=HORIZON
    )
    vla = sharpen(to_vla(model, processor, config).eval(), 30)
    sentences = list(INSTRUCTIONS[:2])
    images = [picture(0), picture(1)] if vla.prompts.family.takes_images else None
    inputs = vla.prepare(images, sentences)
    length = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    budget = HORIZON * DOF + 1
    taco = FASTLogitsProcessor(fast, vocabulary, HORIZON, DOF, prompt_length=length, max_new_tokens=budget)
    for options in ({}, {"do_sample": True, "temperature": 5.0}):
        out = vla.generate(
            **inputs, logits_processor=LogitsProcessorList([taco]), max_new_tokens=budget, **options
        ).numpy()
        for row in out[:, length:]:
            end = int(np.flatnonzero(row == vocabulary.end_token_id)[0])  # to_vla made it an end for plain generate()
            codes = vocabulary.to_codes(row[:end])
            assert fast.decode([codes], HORIZON, DOF).shape == (1, HORIZON, DOF)
    # The same through predict_action, whose tokens decode to what it says.
    found = vla.predict_action(**inputs, return_dict=True)
    row = found.token_ids[0]
    codes = vocabulary.to_codes(row[: int(np.flatnonzero(row == vocabulary.end_token_id)[0])])
    np.testing.assert_array_equal(found.normalized[0], fast.decode([codes], HORIZON, DOF)[0])
