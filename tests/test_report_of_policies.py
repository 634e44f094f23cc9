"""`ActionOutput.confidence`: the report speaks of the very distributions that a policy's tokens were drawn from."""

import numpy as np
import pytest
import torch
from tiny import INSTRUCTIONS, SPACE, STATS, sharpen, tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM

from hf_vla_actions import (
    ActionConfig,
    ActionVocabulary,
    Context,
    TACOLogitsProcessor,
    UniformActionTokenizer,
    to_vla,
)
from hf_vla_actions.constraints import MoveBy, Range, Rate, Speed, Target
from hf_vla_actions.decoding.along import report_on

torch.set_num_threads(1)

SINGLE = [Range("x", -0.01, 0.01), Target("yaw", 0.05, sigma=0.05)]
COUPLED = [*SINGLE, Rate("y", 0.01), Speed(["x", "y", "z"], 0.03), MoveBy("z", 0.01, sigma=0.02)]
KNOWN = Context(pose={"x": 0.0, "y": 0.0, "z": 0.0}, last_action=np.zeros(7))


@pytest.fixture(scope="module", params=["append", "per_dimension"])
def policy(request):
    if request.param == "append":
        return sharpen(tiny_llama(horizon=2), 60)
    tokenizer = tiny_tokenizer()
    vocabulary = ActionVocabulary.per_dimension(tokenizer, 64, 7)  # a block of ids for each dimension
    stats, spaces = {"my_robot": {"action": STATS}}, {"my_robot": SPACE}
    config = ActionConfig(UniformActionTokenizer(64), vocabulary, stats, spaces, horizon=2)
    torch.manual_seed(0)
    return sharpen(to_vla(LlamaForCausalLM(tiny_llama().config), tokenizer, config).eval(), 60)


@pytest.mark.parametrize("constraints", [SINGLE, COUPLED], ids=["single", "coupled"])
@pytest.mark.parametrize("mode", ["mask", "transport", "mixture", "project"])
def test_log_q_is_what_generate_drew_from(policy, mode, constraints):
    inputs = policy.prepare(None, list(INSTRUCTIONS[:2]))
    length = inputs["input_ids"].shape[1]
    taco = TACOLogitsProcessor(constraints, policy.action_config, prompt_length=length, mode=mode, context=KNOWN)
    torch.manual_seed(0)
    out = policy.generate(
        **inputs,
        logits_processor=[taco],
        do_sample=True,
        top_k=0,
        num_return_sequences=6,
        max_new_tokens=14,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        pad_token_id=policy.action_config.vocabulary.end_token_id,
    )
    ids = out.sequences[:, length:]
    drawn = torch.stack([s.double().log_softmax(-1) for s in out.scores], dim=1).gather(-1, ids[..., None])[..., 0]
    values = policy.action_config.decode(ids.numpy())[1]
    report = report_on(taco, out.logits, ids.numpy(), taco.bound.project(values))
    np.testing.assert_allclose(report.log_q.reshape(12, 14), drawn.numpy(), atol=2e-4)
    np.testing.assert_array_equal(report.value, values)
    assert set(report.blame) == {str(c) for c in constraints}


@pytest.mark.parametrize("mode", ["mask", "transport", "mixture", "project"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_predict_action_hands_over_its_report(policy, mode, options):
    inputs = policy.prepare(None, list(INSTRUCTIONS[:2]))
    out = policy.predict_action(**inputs, constraints=COUPLED, context=KNOWN, mode=mode, return_dict=True, **options)
    report = out.confidence
    np.testing.assert_allclose(report.log_prob.sum(axis=(1, 2)), out.log_prob, rtol=1e-4)
    np.testing.assert_array_equal(report.action, out.actions)
    np.testing.assert_allclose(report.value, out.actions - out.moved, atol=1e-12)
    assert (np.isfinite(report.log_weight) == (mode in ("mask", "transport"))).all()
    assert report.mode == mode


def test_a_projected_chunk_has_no_distribution_of_single_numbers(policy):
    inputs = policy.prepare(None, [INSTRUCTIONS[0]])
    options = {"constraints": [Speed(["x", "y", "z"], 0.004)], "context": KNOWN, "return_dict": True}
    report = policy.predict_action(**inputs, **options).confidence
    assert np.isnan(report.mean_after).all()
    np.testing.assert_array_equal(report.moved, np.abs(report.action - report.value))
    assert "x moves by" in report.summary()
    certain = policy.predict_action(**inputs, mode="mask", **options).confidence
    assert np.isfinite(certain.mean_after).all()
    np.testing.assert_array_equal(certain.moved, certain.shift)
