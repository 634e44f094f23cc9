"""A policy with a head where it is not alone: other threads, compiled, wrapped again, quantized, on statistics it cannot serve."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from test_head_policies import GENERATIVE, HORIZON, LONG, config, look, make
from tiny import SPACE, picture, tiny_llava
from tiny_families import FAMILIES

from hf_vla_actions import ActionConfig, ActionStats, AutoModelForActionPrediction, NormStats, VLAActionsError, to_vla
from hf_vla_actions.constraints import Range
from hf_vla_actions.heads import (
    DiffusionConfig,
    FlowMatchingConfig,
    ParallelConfig,
    RecurrentConfig,
    RegressionConfig,
)
from hf_vla_actions.models.features import slots_at_the_end


def test_words_of_another_thread_are_left_alone():
    policy = make("llama")
    inputs = look(policy, [LONG])
    said = {}

    def speak():
        with torch.no_grad():
            said["now"] = policy(**inputs).logits

    speak()
    alone = said.pop("now")
    with slots_at_the_end(policy.get_input_embeddings(), policy.action_head):
        thread = threading.Thread(target=speak)
        thread.start()
        thread.join()
        with torch.no_grad():
            here = policy(**inputs).logits
    assert torch.equal(said["now"], alone)
    assert not torch.equal(here, alone)


def test_a_compiled_model_tells_words_from_actions():
    policy = make("llama")
    inputs = look(policy, [LONG])
    before = policy.predict_action(**inputs)
    ids = inputs["input_ids"]
    longer = torch.cat([ids, ids[:, -1:].expand(-1, HORIZON)], dim=1)  # as many as with the head's embeddings
    with torch.no_grad():
        words = policy(longer).logits
        policy.get_input_embeddings().compile(backend="eager")
        for _ in range(2):
            assert torch.equal(policy(longer).logits, words)
            np.testing.assert_array_equal(policy.predict_action(**inputs), before)


def test_a_model_that_passes_the_learned_embeddings_by_raises():
    head = make("llama").action_head
    ran = slots_at_the_end(torch.nn.Embedding(2, 32), head)
    with pytest.raises(VLAActionsError, match="without the head's learned embeddings"), ran:
        pass


def test_a_policy_that_is_wrapped_again_keeps_its_head():
    policy = make()
    inputs = look(policy, [LONG])
    before = policy.predict_action(**inputs)
    limited = dataclasses.replace(policy.action_config, limits=[Range("x", -1.0, 1.0)])
    again = to_vla(policy, policy.processor, limited)
    np.testing.assert_array_equal(again.predict_action(**inputs), before)
    np.testing.assert_array_equal(
        to_vla(policy, policy.processor, config(), policy.action_head).predict_action(**inputs), before
    )
    other = to_vla(policy, policy.processor, config(RegressionConfig(HORIZON, 7, hidden=8)))
    assert np.abs(other.predict_action(**inputs) - before).max() > 0
    native = FAMILIES["llava"](0)[0]
    assert type(policy).__mro__[3] is type(native)


def test_a_policy_that_goes_back_to_tokens_loses_its_head(tmp_path):
    policy = tiny_llava()
    tokens = policy.action_config
    head = FlowMatchingConfig(tokens.horizon, 7, width=16, depth=1, n_heads=2, steps=2)
    to_vla(policy, policy.processor, dataclasses.replace(tokens, head=head))
    to_vla(policy, policy.processor, tokens)
    assert not [name for name in policy.state_dict() if "action_head" in name]
    assert policy.predict_action(**policy.prepare(picture(0), LONG)).shape == (1, tokens.horizon, 7)


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"num_beams": 3}, {"num_return_sequences": 2}, {"noises": torch.zeros(1)}]
)
def test_options_that_a_head_would_not_hear_of_raise(options):
    policy = make("llama")
    with pytest.raises(VLAActionsError, match=f"no use for .'{next(iter(options))}'"):
        policy.predict_action(**look(policy, [LONG]), **options)
    with pytest.raises(VLAActionsError, match="no use for"):
        policy.policy(**options)({"images": None, "instruction": LONG})
    with pytest.raises(VLAActionsError, match="action_pad_mask"):
        policy(
            **look(policy, [LONG]),
            normalized=torch.zeros(1, HORIZON, 7),
            pad_mask=torch.ones(1, HORIZON, dtype=torch.bool),
        )


@pytest.mark.parametrize("kind", GENERATIVE)
def test_guidance_by_constraints_that_are_kept_changes_nothing(kind):
    policy = make("llama", head=GENERATIVE[kind])
    with torch.no_grad():  # it begins at zero
        policy.action_head.network.chunk.readout.bias.add_(torch.tensor([0.1, -0.2, 0, 0, 0, 0, 0.3]))
    noise = torch.randn(1, HORIZON, 7, generator=torch.Generator().manual_seed(3))
    asked = {"constraints": [Range("x", -1.0, 1.0)], "noise": noise, "return_dict": True}
    free, guided = (policy.predict_action(**look(policy, [LONG]), **asked, guidance=g) for g in (None, "constraints"))
    np.testing.assert_allclose(guided.normalized, free.normalized, atol=1e-5)
    assert ((np.abs(free.normalized[..., 6]) > 0.01) & (np.abs(free.normalized[..., 6]) < 0.99)).any()


MEAN, STD = np.array([0, 0, 0, 0, 0, 0, 0.9]), np.array([0.05] * 6 + [0.3])  # a gripper that is mostly open
Z_SCORES = ActionStats(mean=MEAN, std=STD, mode="normal")


def z_scores(head, space=SPACE):
    return ActionConfig(None, None, NormStats({"r": {"action": Z_SCORES}}), {"r": space}, horizon=HORIZON, head=head)


@pytest.mark.parametrize(
    "head", [DiffusionConfig(HORIZON, 7), ParallelConfig(HORIZON, 7), RecurrentConfig(HORIZON, 7)]
)
def test_a_head_that_would_stop_short_of_z_scores_raises(head):
    with pytest.raises(VLAActionsError, match="would stop short"):
        z_scores(head)


def test_heads_that_reach_z_scores_take_them():
    for head in (DiffusionConfig(HORIZON, 7, clip=5.0), DiffusionConfig(HORIZON, 7, clip=None)):
        assert z_scores(head).head == head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gripper_dim": 6}, r"gripper_values=\(-3, 0.333333\)"),  # 0.9 - 0.3 counts as open: it would never close
        ({"gripper_dim": 6, "gripper_values": (0.0, 1.0)}, "open and closed"),
        ({"gripper_dim": 6, "gripper_values": (-4.0, 0.5)}, None),
        ({"gripper_dim": 6, "gripper_values": (-3.0, 4.0)}, "open and closed"),  # its middle lies above both
        ({"gripper_dim": 5}, "its gripper in dimension 6"),
        ({"gripper_dim": 6, "gripper_values": (-3.0, 1 / 3)}, None),
    ],
)
def test_a_gripper_that_would_not_become_what_the_head_says_raises(options, message):
    head = RegressionConfig(HORIZON, 7, **options)
    if message is None:
        assert z_scores(head).head == head
        return
    with pytest.raises(VLAActionsError, match=message):
        z_scores(head)


def test_a_quantized_model_is_saved_with_its_head_beside_it(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    policy = make("llama")
    policy.save_pretrained(tmp_path / "whole")
    small = AutoModelForActionPrediction.from_pretrained(
        tmp_path / "whole", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    assert type(small.action_head.mlp[1]) is torch.nn.Linear
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForActionPrediction.from_pretrained(tmp_path / "small")
    inputs = look(policy, [LONG])
    np.testing.assert_array_equal(again.predict_action(**inputs), small.predict_action(**inputs))
    assert "action_head.slot_embeddings" in small.state_dict()


def test_a_state_that_is_given_is_what_is_saved(tmp_path):
    policy = make("llama")
    other = make("llama", seed=1)
    policy.save_pretrained(tmp_path, state_dict=other.state_dict())
    loaded = AutoModelForActionPrediction.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in other.state_dict().items())


def test_half_precision_of_a_training_does_not_reach_the_memory_of_an_lstm():
    torch.manual_seed(0)
    head = RecurrentConfig(HORIZON, 7, window=2, hidden=8, layers=1).build(32)
    from hf_vla_actions.heads import Features

    seen = Features(torch.zeros(2, 1, 32), slots=torch.randn(2, 1, 32), past=torch.randn(2, 1, 1, 32))
    with torch.autocast("cpu", torch.bfloat16):
        within = head.remember(seen)
    assert torch.equal(within, head.remember(seen))
