"""TACO on vocabularies whose dimensions have tokens of their own, and prompts that hold a history of actions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matrix import make
from tiny import action_config, picture, sharpen, tiny_llama, tiny_tokenizer
from transformers import GenerationConfig

from hf_vla_actions import ActionVocabulary, TACOLogitsProcessor, to_vla
from hf_vla_actions.constraints import Fix, Range, Target
from hf_vla_actions.errors import ActionTokenError, ConstraintError

N_BINS, HORIZON, DOF = 32, 2, 7
LIMITS = [Range("x", -0.01, 0.01), Target("y", 0.01, sigma=0.005), Fix("gripper", "open", steps=[1])]


def configs():
    """The same policy with shared tokens and with a block for each dimension."""
    return [
        action_config(tiny_tokenizer(), horizon=HORIZON, layout=layout, n_bins=N_BINS)
        for layout in ("append", "per_dimension")
    ]


@pytest.mark.parametrize("mode", ["mask", "transport", "project"])
@pytest.mark.parametrize("counted", [True, False])
def test_blocks_give_what_shared_tokens_give_on_the_block_of_each_position(mode, counted):
    shared, blocks = configs()
    rng = np.random.default_rng(0)
    rows, prompt = 3, 4
    codes = rng.integers(0, N_BINS, (rows, HORIZON * DOF))
    for position in range(HORIZON * DOF + 1):
        logits = torch.from_numpy(rng.standard_normal((rows, N_BINS)).astype(np.float32))
        found = []
        for config in (shared, blocks):
            table = config.vocabulary.table(DOF)
            ids = np.concatenate([np.full((rows, prompt), 5), config.vocabulary.to_ids(codes)], axis=1)
            scores = torch.from_numpy(rng.standard_normal((rows, table.max() + 10)).astype(np.float32))
            scores[:, config.vocabulary.end_token_id] = 0.5
            scores[:, torch.tensor(table[position % DOF])] = logits
            taco = TACOLogitsProcessor(LIMITS, config, prompt_length=prompt if counted else None, mode=mode)
            out = taco(torch.from_numpy(ids[:, : prompt + position]), scores)
            allowed = [config.vocabulary.end_token_id, *table[position % DOF]]
            others = np.setdiff1d(np.arange(out.shape[1]), allowed)
            assert torch.isneginf(out[:, others]).all(), "a token of another dimension"
            found.append(out[:, allowed])
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert (found[1][:, 0] == 0.5).all(), "after the chunk only the closing token"


def test_rows_at_different_dimensions_get_their_own_blocks():
    # Assisted decoding and finished rows make the trailing runs differ; only 0 and one common length are possible.
    _, config = configs()
    table = config.vocabulary.table(DOF)
    ids = torch.full((2, 6), 5)
    ids[1, 3:] = torch.tensor(table[[0, 1, 2], 4])
    scores = torch.zeros(2, int(table.max()) + 1)
    out = TACOLogitsProcessor([], config)(ids, scores)
    assert torch.isfinite(out[0]).nonzero()[:, 0].tolist() == sorted(table[0].tolist())
    assert torch.isfinite(out[1]).nonzero()[:, 0].tolist() == sorted(table[3].tolist())


def test_space_of_another_size_raises():
    shared, _ = configs()
    vocabulary = ActionVocabulary.per_dimension(tiny_tokenizer(), N_BINS, 3)
    with pytest.raises(ActionTokenError, match="ids for 3 dimensions, the action has 7"):
        replace(shared, vocabulary=vocabulary)


@pytest.fixture(scope="module")
def policy():
    return sharpen(tiny_llama(horizon=HORIZON))


def history(policy, n, rows=1):
    inputs = policy.prepare(None, ["move to the red block"] * rows)
    ids = torch.tensor(policy.action_config.vocabulary.to_ids(np.arange(n))).expand(rows, -1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


@pytest.mark.parametrize("n", [1, 7, 14, 21])
def test_history_of_actions_needs_prompt_length_and_says_so(policy, n):
    inputs = history(policy, n)
    length = inputs["input_ids"].shape[1]
    with pytest.raises(ConstraintError, match=f"prompt_length={length}"):
        policy.generate(
            **inputs, logits_processor=[TACOLogitsProcessor(LIMITS, policy.action_config)], max_new_tokens=20
        )
    taco = TACOLogitsProcessor(LIMITS, policy.action_config, prompt_length=length)
    out = policy.generate(**inputs, logits_processor=[taco], max_new_tokens=20)
    assert out.shape[1] == length + 15
    policy.action_config.decode(out[0, length:-1].numpy())
    np.testing.assert_array_equal(
        policy.predict_action(**inputs, constraints=LIMITS, mode="transport")[0],
        policy.action_config.decode(out[0, length:-1].numpy())[1],
    )


def test_wrong_prompt_length_raises(policy):
    inputs = history(policy, 3)
    for length in (3, inputs["input_ids"].shape[1] - 1):
        with pytest.raises(ConstraintError, match="but the prompt has"):
            policy.generate(
                **inputs,
                logits_processor=[TACOLogitsProcessor([], policy.action_config, prompt_length=length)],
                max_new_tokens=20,
            )


def test_plain_generate_finds_what_can_only_be_history(policy):
    config = policy.action_config
    taco = TACOLogitsProcessor([], config)
    scores = torch.zeros(2, int(config.vocabulary.token_ids.max()) + 1)
    action = int(config.vocabulary.token_ids[3])
    longer = torch.full((2, 20), action)
    with pytest.raises(ConstraintError, match="history of actions"):
        taco(longer, scores)
    uneven = torch.full((2, 6), 5)
    uneven[0, -2:], uneven[1, -3:] = action, action
    with pytest.raises(ConstraintError, match="different number of them in each row"):
        taco(uneven, scores)
    uneven[0, -2:] = 5  # a row that another stopping criterion has ended
    assert torch.isfinite(taco(uneven, scores)[1]).sum() == config.vocabulary.n_codes


def test_draft_of_assisted_decoding_may_be_a_policy(policy):
    draft = sharpen(tiny_llama(horizon=HORIZON, seed=1), seed=1)
    inputs = policy.prepare(None, "move to the red block")
    expected = policy.predict_action(**inputs, constraints=LIMITS, mode="mask")
    found = policy.predict_action(**inputs, constraints=LIMITS, mode="mask", assistant_model=draft)
    np.testing.assert_array_equal(found, expected)


def test_generation_that_is_cut_short_raises(policy):
    inputs = policy.prepare(None, "move to the red block")
    stop = [lambda ids, scores, **_: torch.ones(len(ids), dtype=torch.bool)]
    with pytest.raises(ValueError, match="stopped after 1 of the 14 tokens"):
        policy.predict_action(**inputs, stopping_criteria=stop)


@pytest.mark.parametrize("how", ["positional", "config", "argument"])
def test_speculation_on_a_prompt_that_reads_both_ways_raises(how):
    vla = make("paligemma", "append")
    inputs = vla.prepare(picture(0), "go")
    taco = [TACOLogitsProcessor([], vla.action_config, prompt_length=inputs["input_ids"].shape[1])]
    arguments, options = {
        "positional": ((None, None, taco, None, None, None, vla), {}),
        "config": ((), {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)}),
        "argument": ((), {"assistant_model": vla}),
    }[how]
    with pytest.raises(ValueError, match="reads itself in both directions"):
        vla.generate(*arguments, **inputs, **options)


def test_action_among_the_ends_of_a_text_raises_and_other_ends_stay():
    tokenizer = tiny_tokenizer()
    model = tiny_llama().__class__.__mro__[2](tiny_llama().config)
    config = replace(
        action_config(tokenizer, n_bins=4), vocabulary=ActionVocabulary.spare(tokenizer, [299, 300, 301, 302])
    )
    model.generation_config.eos_token_id = [2, 300]
    with pytest.raises(ValueError, match="an action would end in its middle"):
        to_vla(model, tokenizer, config)
    model.generation_config.eos_token_id = [2, 310]
    assert to_vla(model, tokenizer, config).generation_config.eos_token_id == [2, 310]


def test_generate_batch_raises_because_it_drops_processors(policy):
    with pytest.raises(ValueError, match="generate_batch"):
        policy.generate_batch([[1, 2]], logits_processor=[TACOLogitsProcessor([], policy.action_config)])
