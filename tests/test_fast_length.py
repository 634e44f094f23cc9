"""The budget of tokens of a FAST policy: from the data, saved, kept while generating, and always enough to end."""

import json

import numpy as np
import pytest
import torch
from test_fast import byte_tokenizer
from test_fast_processor import smooth
from tiny import INSTRUCTIONS, SPACE, STATS, sharpen, tiny_tokenizer
from tiny_families import FAMILIES

from hf_vla_actions import (
    ActionConfig,
    ActionVocabulary,
    FASTActionTokenizer,
    FASTLogitsProcessor,
    NormStats,
    UniformActionTokenizer,
    to_vla,
)
from hf_vla_actions.constraints import Fix, Range
from hf_vla_actions.errors import ConstraintError, VLAActionsError
from hf_vla_actions.tokenizers.fast_length import code_budget, fewest_codes, most_codes

HORIZON, DOF = 6, 7


@pytest.fixture(scope="module")
def fast():
    return FASTActionTokenizer.fit(smooth(200, HORIZON, DOF), 200, 10)


def config_of(tokenizer, text=None, **more):
    vocabulary = ActionVocabulary.append(text or tiny_tokenizer(), tokenizer.n_codes)
    stats = NormStats({"my_robot": {"action": STATS}})
    return ActionConfig(tokenizer, vocabulary, stats, {"my_robot": SPACE}, horizon=HORIZON, **more)


@pytest.mark.parametrize("horizon", [1, 2, 6])
def test_the_fewest_codes_are_those_that_the_processor_knows(fast, horizon):
    n = horizon * DOF
    vocabulary = (np.arange(fast.n_codes), fast.n_codes)
    fewest = fewest_codes(fast, n)
    FASTLogitsProcessor(fast, vocabulary, horizon, DOF, max_new_tokens=fewest + 1)
    with pytest.raises(ConstraintError, match=f"takes at least {fewest} tokens"):
        FASTLogitsProcessor(fast, vocabulary, horizon, DOF, max_new_tokens=fewest)


def test_the_published_tokenizer_s_fewest_is_never_more_than_the_processor_s(shared):
    fast_plus = FASTActionTokenizer.from_pretrained(shared / "data/fast_plus")
    vocabulary = (np.arange(fast_plus.n_codes), fast_plus.n_codes)
    for horizon, dof in ((8, 7), (3, 5)):
        with pytest.raises(ConstraintError, match="takes at least"):
            FASTLogitsProcessor(
                fast_plus, vocabulary, horizon, dof, max_new_tokens=fewest_codes(fast_plus, horizon * dof)
            )


def test_a_budget_has_room_for_what_was_seen_and_for_standing_still(fast):
    chunks = smooth(50, HORIZON, DOF, seed=4)
    longest = max(map(len, fast.encode(chunks)))
    assert longest < code_budget(fast, chunks) <= min(HORIZON * DOF, np.ceil(1.25 * longest))
    still = code_budget(fast, np.zeros((1, HORIZON, DOF)))
    assert still < code_budget(fast, chunks)
    for value in np.linspace(-1, 1, 9):  # any constant chunk fits, whatever its dimensions
        constant = np.full((HORIZON, DOF), value) * np.linspace(1, 0.3, DOF)
        assert len(fast.encode(constant)[0]) <= still
    rough = np.random.default_rng(0).uniform(-1, 1, (50, HORIZON, DOF))
    assert code_budget(fast, rough) == HORIZON * DOF, "one code a number always suffices"
    assert code_budget(fast, np.zeros((1, 1, DOF))) == DOF


BYTES = {
    "single bytes": (byte_tokenizer(), 2),
    "one byte a number": (byte_tokenizer(min_token=-40), 1),
    "a token across two numbers": (byte_tokenizer(merges=[(b"\x9a", b"\xc5")]), 2),
    "four bytes a number": (byte_tokenizer(min_token=-0x10000 - 50), 4),
}


@pytest.mark.parametrize("kind", BYTES)
def test_tokenizers_of_bytes_have_room_for_all_bytes(kind):
    tokenizer, each = BYTES[kind]
    most = most_codes(tokenizer, HORIZON, DOF)
    assert most == HORIZON * DOF * each
    chunks = np.random.default_rng(2).uniform(-1, 1, (40, HORIZON, DOF))
    longest = max(map(len, tokenizer.encode(chunks)))
    assert longest <= code_budget(tokenizer, chunks) <= most
    quiet = code_budget(tokenizer, np.zeros((1, HORIZON, DOF)))
    for value in np.linspace(-1, 1, 5):
        assert len(tokenizer.encode(np.full((HORIZON, DOF), value))[0]) <= quiet
    model, text = FAMILIES["llama"](0)
    vla = to_vla(model, text, config_of(tokenizer, text)).eval()
    assert vla.action_config.max_tokens() == most
    said = vla.predict_action(**vla.prepare(None, INSTRUCTIONS[0]), return_dict=True)
    assert (said.token_ids == vla.action_config.vocabulary.end_token_id).any()
    assert config_of(tokenizer, token_budget={"my_robot": quiet}).max_tokens() == quiet


def test_budgets_are_saved_and_old_files_have_none(fast, tmp_path):
    config = config_of(fast, token_budget={"my_robot": 20})
    assert config.max_tokens() == 20
    config.save_pretrained(tmp_path)
    assert ActionConfig.from_pretrained(tmp_path) == config
    values = json.loads((tmp_path / "action_config.json").read_text())
    del values["token_budget"]
    assert ActionConfig.from_dict(values, tmp_path).max_tokens() == HORIZON * DOF


@pytest.mark.parametrize(
    "budget", [{"my_robot": 1}, {"my_robot": 43}, {"my_robot": 9.5}, {"my_robot": True}, {"x": 20}]
)
def test_budgets_that_cannot_be_raise(fast, budget):
    with pytest.raises(VLAActionsError, match="token_budget"):
        config_of(fast, token_budget=budget)


def test_budget_of_bins_raises():
    with pytest.raises(VLAActionsError, match="is for FAST"):
        config_of(UniformActionTokenizer(16), token_budget={"my_robot": 20})


@pytest.mark.parametrize("constraints", [None, [Range("x", 0.01, 0.02), Fix("gripper", "closed")]])
def test_every_chunk_ends_within_its_budget(fast, constraints):
    model, tokenizer = FAMILIES["llama"](0)
    budget = code_budget(fast, 0.1 * smooth(20, HORIZON, DOF))
    config = config_of(fast, tokenizer, token_budget={"my_robot": budget})
    vla = sharpen(to_vla(model, tokenizer, config).eval(), 30)
    inputs = vla.prepare(None, list(INSTRUCTIONS[:2]))
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 9.0, "num_return_sequences": 20}
    out = vla.predict_action(**inputs, constraints=constraints, return_dict=True, **options)
    end = config.vocabulary.end_token_id
    lengths = (out.token_ids == end).argmax(axis=1)
    assert (out.token_ids == end).any(axis=1).all()
    assert lengths.max() <= budget < HORIZON * DOF
    assert lengths.max() > budget / 2, "it is the budget that ends such a model's chunks"
