"""Every family with every layout in every operation."""

import pytest
import torch
from matrix import LAYOUTS, OPERATIONS, execute, make, only_compiled, save_load, train_lora
from tiny import picture
from tiny_families import FAMILIES


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled_is_left():
    yield
    only_compiled.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cell(family, layout, operation):
    execute(family, layout, operation)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_and_untied_embeddings(family, tie):
    policy = make(family, "append", tie)
    assert (policy.get_output_embeddings().weight is policy.get_input_embeddings().weight) == tie
    train_lora(family, "append", tie)
    save_load(family, "append", tie)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_no_token_uses_can_never_be_produced(family):
    policy = make(family, "append", tie=False)
    ids = policy.action_config.vocabulary.token_ids
    with torch.no_grad():
        weight = policy.get_output_embeddings().weight
        assert weight.shape[0] > ids.max() + 1
        weight[ids.max() + 1 :] = 100.0 * weight[ids].abs().max()
    images = [picture(0)] * 2 if policy.prompts.family.takes_images else None
    inputs = policy.prepare(images, ["go", "go there"])
    for mode in ("project", "transport", "mask"):
        for options in ({}, {"do_sample": True}, {"num_beams": 3}):
            out = policy.predict_action(**inputs, mode=mode, return_dict=True, **options)
            policy.action_config.vocabulary.to_codes(out.token_ids)
