"""A continuous head on every family of models: same features in training and in use, saved and loaded, constrained."""

import json

import numpy as np
import pytest
import torch
from tiny import INSTRUCTIONS, SPACE, STATS, picture
from tiny_families import FAMILIES
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hf_vla_actions import ActionConfig, ActionStats, AutoModelForActionPrediction, NormStats, VLAActionsError, to_vla
from hf_vla_actions.constraints import Context, Range, Rate
from hf_vla_actions.errors import ActionSpaceError, CheckpointError
from hf_vla_actions.heads import (
    DiffusionConfig,
    FlowMatchingConfig,
    ParallelConfig,
    RecurrentConfig,
    RegressionConfig,
)
from hf_vla_actions.models import save_adapter
from hf_vla_actions.models.head_files import HEAD_FILE
from hf_vla_actions.models.predict import report as report_text
from hf_vla_actions.runtime import AsyncPolicy, Overlap, RealTimeChunking
from hf_vla_actions.train.arguments import LoraArguments
from hf_vla_actions.train.lora import add_lora

HORIZON = 3
LONG = "push the green block onto the plate and then move to the red block"


def config(head=None, *, horizon=HORIZON, proprio=None, **kwargs):
    entry = {"action": STATS} | ({} if proprio is None else {"proprio": proprio})
    return ActionConfig(
        None, None, NormStats({"my_robot": entry}), {"my_robot": SPACE}, horizon=horizon, head=head, **kwargs
    )


def make(family="llava", head=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    model, processor = FAMILIES[family](seed)
    head = RegressionConfig(HORIZON, 7) if head is None else head
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2 has some
            module.p = 0.0
    return to_vla(model, processor, config(horizon=head.horizon, head=head, **kwargs)).eval()


def look(policy, sentences, seeds=(0, 1, 2)):
    images = [picture(seed) for seed in seeds[: len(sentences)]] if policy.prompts.family.takes_images else None
    return policy.prepare(images, sentences)


def opened(policy, scale=0.2):
    """A denoiser begins with gates that are closed, and hears nothing."""
    with torch.no_grad():
        for p in policy.action_head.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * scale)
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_each_prompt_alone_in_training_and_in_use(family):
    policy = make(family)
    sentences = [INSTRUCTIONS[0], LONG]
    whole = policy.features(**look(policy, sentences)).slots
    for row, sentence in enumerate(sentences):
        alone = policy.features(**look(policy, [sentence], (row,))).slots
        torch.testing.assert_close(whole[row : row + 1], alone, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(policy.train().features(**look(policy, sentences)).slots, whole)
    assert (whole[0] - whole[1]).abs().max() > 1e-3
    assert policy.eval().check_reads_instruction() > 0
    if policy.prompts.family.takes_images:
        assert policy.check_sees_image() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_reaches_head_slots_and_model(family):
    policy = make(family).train()
    inputs = look(policy, [INSTRUCTIONS[0], LONG])
    chunks = torch.randn(2, HORIZON, 7, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    mask = torch.tensor([[True] * HORIZON, [True, False, False]])
    out = policy(**inputs, normalized=chunks, action_pad_mask=mask)
    out.loss.backward()
    assert policy.action_head.slot_embeddings.grad.abs().sum() > 0
    inner = [p for n, p in policy.named_parameters() if "action_head" not in n and p.grad is not None]
    assert sum(p.grad.abs().sum() for p in inner) > 0
    other = chunks.clone()
    other[1, 1:] = 0.9
    torch.testing.assert_close(policy(**inputs, normalized=other, action_pad_mask=mask).loss, out.loss)
    twice = int(mask.sum()) * 7 * 2  # this batch is half of a step
    torch.testing.assert_close(
        policy(**inputs, normalized=chunks, action_pad_mask=mask, n_items=twice).loss, out.loss / 2
    )


@pytest.mark.parametrize("family", ["llava", "paligemma", "gemma3", "qwen2_vl", "gpt2"])
def test_saved_and_loaded_it_acts_the_same_and_plain_transformers_reads_the_model(family, tmp_path):
    policy = make(family)
    inputs = look(policy, [INSTRUCTIONS[0]])
    before = policy.predict_action(**inputs)
    policy.save_pretrained(tmp_path)
    loaded = AutoModelForActionPrediction.from_pretrained(tmp_path)
    assert loaded.action_config == policy.action_config
    np.testing.assert_array_equal(loaded.predict_action(**inputs), before)
    auto = AutoModelForImageTextToText if policy.prompts.family.takes_images else AutoModelForCausalLM
    plain, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(plain).__name__ == type(policy).__name__


def test_a_checkpoint_without_its_head_raises(tmp_path):
    policy = make()
    policy.save_pretrained(tmp_path)
    (tmp_path / HEAD_FILE).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="holds no action_head"):
        AutoModelForActionPrediction.from_pretrained(tmp_path)
    (tmp_path / HEAD_FILE).write_bytes((tmp_path / "elsewhere").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="does not fit the head"):
        AutoModelForActionPrediction.from_pretrained(tmp_path)


def test_a_lora_adapter_trains_and_carries_the_head_and_leaves_its_layers_alone(tmp_path):
    policy = make()
    model, processor = FAMILIES["llava"](0)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    policy.config._name_or_path = policy.name_or_path = str(tmp_path / "base")
    peft = add_lora(policy, LoraArguments(use_peft=True, lora_r=4, lora_alpha=8))
    trained = {name for name, p in peft.named_parameters() if p.requires_grad}
    assert not [name for name in trained if "action_head" in name and "lora_" in name]
    assert {f"base_model.model.action_head.{n}" for n, _ in policy.action_head.named_parameters()} <= trained
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.02)
    peft.eval()
    inputs = look(policy, [INSTRUCTIONS[0]])
    before = peft.predict_action(**inputs)
    save_adapter(peft, tmp_path / "adapter")
    loaded = AutoModelForActionPrediction.from_pretrained(tmp_path / "adapter")
    np.testing.assert_array_equal(loaded.predict_action(**inputs), before)
    merged = loaded.merge_and_unload()
    np.testing.assert_allclose(merged.predict_action(**inputs), before, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForActionPrediction.from_pretrained(tmp_path / "merged")
    np.testing.assert_array_equal(again.predict_action(**inputs), merged.predict_action(**inputs))


def test_constraints_hold_and_what_was_moved_is_said():
    policy = make(limits=[Range("z", -0.01, 0.01)])
    inputs = look(policy, [INSTRUCTIONS[0], LONG])
    free = policy.predict_action(**inputs, return_dict=True)
    asked = float(np.median(free.actions[:, :, 0]))
    out = policy.predict_action(**inputs, constraints=[Range("x", asked, 1.0)], return_dict=True)
    assert (out.actions[:, :, 0] >= asked).all()
    assert (np.abs(out.actions[:, :, 2]) <= 0.01).all()
    np.testing.assert_allclose(out.actions - out.moved, (free.actions - free.moved), atol=1e-12)
    assert out.moved[..., 0].any()
    report = out.confidence
    blame = report.blame[str(Range("x", asked, 1.0))]
    np.testing.assert_allclose(blame, np.maximum(asked - report.decoded[..., 0], 0), atol=1e-12)
    assert set(report.blame) == {str(Range("x", asked, 1.0)), str(Range("z", -0.01, 0.01))}
    assert f"was broken in {(blame > 1e-9).sum()} of {blame.size} steps" in report.summary()
    json.dumps(report.to_dict(), allow_nan=False)
    assert report_text(out, SPACE) == report.summary()  # of `hf-vla predict --report`
    here = Context(last_action=np.zeros(7))
    known = policy.predict_action(**inputs, constraints=[Rate("x", 0.001)], context=here, return_dict=True).confidence
    first = np.abs(known.decoded[:, 0, 0]) - 0.001
    np.testing.assert_allclose(known.blame[str(Rate("x", 0.001))][:, 0], np.maximum(first, 0), atol=1e-9)
    each = [[Range("x", asked, 1.0)], [Range("y", -1.0, 1.0)]]
    apart = policy.predict_action(**inputs, constraints=each, return_dict=True).confidence
    assert np.isnan(apart.blame[str(Range("x", asked, 1.0))][1]).all()
    np.testing.assert_array_equal(apart.blame[str(Range("x", asked, 1.0))][0], blame[0])
    with pytest.raises(VLAActionsError, match="probabilities of tokens"):
        policy.predict_action(**inputs, mode="mask")
    with pytest.raises(ActionSpaceError, match="nothing"):
        policy.predict_action(**inputs, constraints=[Range("nothing", 0, 1)])


def test_a_robot_with_fewer_dimensions_is_padded_and_trimmed():
    policy = make(head=RegressionConfig(HORIZON, 10))
    chunk = policy.action_config.normalize(np.zeros((1, HORIZON, 7)))
    assert chunk.shape == (1, HORIZON, 10)
    assert not chunk[..., 7:].any()
    assert policy.predict_action(**look(policy, [LONG])).shape == (1, HORIZON, 7)
    said = np.arange(30.0).reshape(1, HORIZON, 10) / 30
    np.testing.assert_array_equal(policy.action_config.unnormalize(said)[0], said[..., :7])
    with pytest.raises(VLAActionsError, match="the head only 5"):
        config(RegressionConfig(HORIZON, 5))


def test_the_state_is_read_and_normalized():
    proprio = ActionStats(mean=[0.0] * 3, std=[2.0] * 3, mode="normal")
    policy = make(head=RegressionConfig(HORIZON, 7, 4), proprio=proprio)
    images, sentence = picture(0), INSTRUCTIONS[0]
    here, there = (
        policy.predict_action(**policy.prepare(images, sentence, state)) for state in ([0, 0, 0], [1, 2, 3])
    )
    assert np.abs(here - there).max() > 0
    np.testing.assert_array_equal(policy.action_config.normalize_proprio([2.0, 4.0, 6.0]), [1, 2, 3, 0])
    seen = policy.prepare(images, sentence, [1, 2, 3])
    for state in (np.array([[1.0, 2.0, 3.0]]), torch.tensor([[1, 2, 3]], dtype=torch.bfloat16)):
        np.testing.assert_array_equal(policy.predict_action(**{**seen, "proprio": state}), there)
    with pytest.raises(VLAActionsError, match="reads the robot's state"):
        policy.prepare(images, sentence)
    action = policy.policy()({"images": images, "instruction": sentence, "proprio": np.zeros(3)})
    np.testing.assert_array_equal(action, here[0, 0])
    with pytest.raises(VLAActionsError, match="proprio statistics"):
        config(RegressionConfig(HORIZON, 7, 4))


def test_what_does_not_belong_together_raises():
    model, processor = FAMILIES["llava"](0)
    with pytest.raises(VLAActionsError, match="there is neither"):
        to_vla(model, processor, config())
    apart, whole = RegressionConfig(HORIZON, 7), config(RegressionConfig(HORIZON, 7))
    assert to_vla(model, processor, config(), head=apart).action_config == whole
    model, processor = FAMILIES["llava"](0)
    with pytest.raises(VLAActionsError, match="another head already"):
        to_vla(model, processor, config(RegressionConfig(HORIZON, 7)), RegressionConfig(HORIZON, 7, hidden=3))
    with pytest.raises(VLAActionsError, match="chunks of 2"):
        config(RegressionConfig(2, 7))
    policy = make()
    with pytest.raises(VLAActionsError, match="no action tokens"):
        policy.action_config.encode(np.zeros((HORIZON, 7)))


def with_answer(policy, inputs, answer):
    """The prompts with words that the model is to say behind them."""
    n = answer.shape[1]
    inputs = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer], 1)}
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
    labels = inputs["input_ids"].clone()
    labels[:, :-n] = -100
    return inputs, labels


@pytest.mark.parametrize("insulate", [False, True])
def test_words_and_actions_in_one_forward(insulate):
    policy = opened(make(head=FlowMatchingConfig(HORIZON, 7, width=16, depth=1, n_heads=2)), 0.1).train()
    prompts = look(policy, [INSTRUCTIONS[0], LONG])
    chunks = torch.zeros(2, HORIZON, 7)

    def learn(answer, **options):
        inputs, labels = with_answer(policy, prompts, torch.tensor([answer, answer]))
        policy.zero_grad()
        torch.manual_seed(1)
        out = policy(**inputs, labels=labels, normalized=chunks, insulate=insulate, **options)
        out.loss.backward()
        return out, policy.get_input_embeddings().weight.grad.clone()

    out, both = learn([40, 41], action_weight=3.0)
    assert sum(p.grad.abs().sum() for p in policy.action_head.parameters() if p.grad is not None) > 0
    torch.testing.assert_close(out.loss, out.language_loss + 3.0 * out.action_loss)
    other, _ = learn([50, 60], action_weight=3.0)
    torch.testing.assert_close(other.action_loss, out.action_loss)  # the head does not see the answer
    labels = with_answer(policy, prompts, torch.tensor([[40, 41]] * 2))[1]
    words = torch.nn.functional.cross_entropy(out.logits[:, -3:-1].flatten(0, 1), labels[:, -2:].flatten())
    torch.testing.assert_close(out.language_loss, words)
    _, language_only = learn([40, 41], action_weight=0.0)
    assert torch.equal(both, language_only) == insulate


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_vl", "llama"])
def test_an_expert_reads_the_cache_of_each_prompt_alone(family, tmp_path):
    head = FlowMatchingConfig(HORIZON, 7, width=16, depth=2, n_heads=4, attend="cache", steps=2)
    policy = make(family, head)
    assert policy.action_config.head.n_layers == policy.config.get_text_config().num_hidden_layers
    opened(policy)
    noise = torch.randn(2, HORIZON, 7, generator=torch.Generator().manual_seed(3))
    whole = policy.predict_action(**look(policy, [INSTRUCTIONS[0], LONG]), noise=noise)
    for row, sentence in enumerate([INSTRUCTIONS[0], LONG]):
        alone = policy.predict_action(**look(policy, [sentence], (row,)), noise=noise[row : row + 1])
        np.testing.assert_allclose(alone, whole[row : row + 1], atol=1e-4)
    other = policy.predict_action(**look(policy, [INSTRUCTIONS[0]], (1,)), noise=noise[1:])
    assert np.abs(other - whole[1:]).max() > 1e-6
    policy.save_pretrained(tmp_path)
    loaded = AutoModelForActionPrediction.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.predict_action(**look(policy, [LONG], (1,)), noise=noise[1:]), alone)


@pytest.mark.parametrize("attend", ["hidden", "cache"])
@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_an_answer_behind_the_prompt_is_as_if_it_were_not_there(family, attend):
    n_heads = 4 if attend == "cache" else 2
    policy = opened(make(family, FlowMatchingConfig(HORIZON, 7, width=16, depth=2, n_heads=n_heads, attend=attend)))
    prompts = look(policy, [INSTRUCTIONS[0], LONG])
    if "mm_token_type_ids" in prompts:
        prompts["mm_token_type_ids"] = torch.nn.functional.pad(prompts["mm_token_type_ids"], (0, 2))
    inputs, labels = with_answer(policy, prompts, torch.tensor([[40, 41]] * 2))
    if "mm_token_type_ids" in prompts:
        prompts["mm_token_type_ids"] = prompts["mm_token_type_ids"][:, :-2]
    chunks = torch.zeros(2, HORIZON, 7)
    torch.manual_seed(1)
    alone = policy(**prompts, normalized=chunks).action_loss
    torch.manual_seed(1)
    torch.testing.assert_close(policy(**inputs, labels=labels, normalized=chunks).action_loss, alone)


def test_positions_are_those_of_a_prompt_alone():
    policy = make("gpt2", FlowMatchingConfig(HORIZON, 7, width=16, depth=1, n_heads=2))
    prompt = look(policy, [LONG])
    natively = policy(**prompt, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(policy.features(**prompt).hidden, natively)


def test_slots_that_would_read_the_answer_raise():
    policy = make()
    inputs, labels = with_answer(policy, look(policy, [LONG]), torch.tensor([[40]]))
    with pytest.raises(VLAActionsError, match="would read the words"):
        policy(**inputs, labels=labels, normalized=torch.zeros(1, HORIZON, 7))


GENERATIVE = {
    "flow": FlowMatchingConfig(HORIZON, 7, width=16, depth=1, n_heads=2, steps=3),
    "diffusion": DiffusionConfig(HORIZON, 7, width=16, depth=1, n_heads=2, train_steps=20, steps=4),
}
ONE_SHOT = {"parallel": ParallelConfig(HORIZON, 7, n_bins=16)}


@pytest.mark.parametrize("kind", [*GENERATIVE, *ONE_SHOT])
def test_every_head_saves_loads_and_predicts_a_batch_as_the_loop(kind, tmp_path):
    policy = opened(make(head={**GENERATIVE, **ONE_SHOT}[kind]))
    noise = torch.randn(2, HORIZON, 7, generator=torch.Generator().manual_seed(3))
    given = [{"noise": noise[i : i + 1]} if kind in GENERATIVE else {} for i in range(2)]
    whole = policy.predict_action(**look(policy, [INSTRUCTIONS[0], LONG]), **({"noise": noise} if given[0] else {}))
    for row, sentence in enumerate([INSTRUCTIONS[0], LONG]):
        alone = policy.predict_action(**look(policy, [sentence], (row,)), **given[row])
        np.testing.assert_allclose(alone, whole[row : row + 1], atol=1e-5)
    policy.save_pretrained(tmp_path)
    loaded = AutoModelForActionPrediction.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.predict_action(**look(policy, [LONG], (1,)), **given[1]), alone)


@pytest.mark.parametrize("kind", GENERATIVE)
def test_guidance_by_constraints_leaves_less_to_move(kind):
    policy = make(head=GENERATIVE[kind])
    inputs = look(policy, [LONG])
    noise = torch.randn(1, HORIZON, 7, generator=torch.Generator().manual_seed(3))
    asked = {"constraints": [Range("x", 0.01, 0.02)], "noise": noise, "return_dict": True}
    free, guided = (policy.predict_action(**inputs, **asked, guidance=g) for g in (None, "constraints"))
    for out in (free, guided):
        assert ((out.actions[..., 0] >= 0.01) & (out.actions[..., 0] <= 0.02)).all()
    assert free.moved[..., 0].any()
    np.testing.assert_allclose(guided.moved, 0, atol=1e-6)
    with pytest.raises(VLAActionsError, match="guidance is 'constraints'"):
        policy.predict_action(**inputs, guidance="limits")


def test_a_head_with_a_history_remembers_within_an_episode_only():
    policy = make(head=RecurrentConfig(HORIZON, 7, window=3, hidden=8, layers=1))
    seen = [{"images": picture(seed), "instruction": LONG} for seed in (0, 1, 2, 3)]
    robot = policy.policy(execute_steps=1)
    first = [robot(obs) for obs in seen]
    robot.reset()
    np.testing.assert_array_equal([robot(obs) for obs in seen], first)
    robot.reset()
    assert np.abs(robot(seen[3]) - first[3]).max() > 0
    begin = policy.prepare([seen[0]["images"]] * 3, [LONG] * 3)
    features = policy.features(**begin, past_mask=torch.zeros(1, 2, dtype=torch.bool))  # nothing was before
    normalized = policy.action_head.sample(features).double().numpy()
    np.testing.assert_allclose(policy.action_config.unnormalize(normalized)[1][0, 0], first[0], atol=1e-5)
    window = policy.prepare([obs["images"] for obs in seen[1:]], [LONG] * 3)
    features = policy.features(**window, past_mask=torch.ones(1, 2, dtype=torch.bool))
    normalized = policy.action_head.sample(features).double().numpy()
    np.testing.assert_allclose(policy.action_config.unnormalize(normalized)[1][0, 0], first[3], atol=1e-5)
    with pytest.raises(VLAActionsError, match="execute_steps=1"):
        policy.policy(execute_steps=2)
    with pytest.raises(VLAActionsError, match="steps pass unseen"):
        AsyncPolicy(robot, 10.0, space=SPACE, execute_steps=1)
    with pytest.raises(VLAActionsError, match="execute_steps=1"):
        RealTimeChunking(robot, 2, delay_steps=1)


@pytest.mark.parametrize("kind", ["flow", "regression"])
def test_chunks_go_on_from_each_other_in_real_time(kind):
    config = (
        FlowMatchingConfig(8, 7, width=16, depth=1, n_heads=2, steps=6) if kind == "flow" else RegressionConfig(8, 7)
    )
    policy = make(head=config)
    obs = {"images": picture(0), "instruction": LONG}
    torch.manual_seed(0)
    plain = policy.policy(execute_steps=3)
    first = plain.predict_chunk(obs)
    left = Overlap.of(first[3:], 2)
    torch.manual_seed(1)
    alone = plain.predict_chunk(obs)
    torch.manual_seed(1)
    going_on = plain.predict_chunk(obs, prefix=left)
    bound = policy.policy(constraints=Range("x", -1.0, 1.0), execute_steps=3)
    np.testing.assert_allclose(bound.predict_chunk(obs, prefix=left)[:2], first[3:5], atol=1e-9)
    np.testing.assert_allclose(going_on[:2], first[3:5], atol=1e-9)
    if kind == "flow":
        (guide,) = policy._continuing(left, "my_robot", {})["guidance"]
        np.testing.assert_allclose(guide.weights, [*left.weights, 0, 0, 0], atol=1e-7)
        # the soft part is drawn to the old plan, most where the weight is largest
        gap, free_gap = (np.abs(chunk[2:4, :3] - first[5:7, :3]).mean() for chunk in (going_on, alone))
        assert gap < 0.8 * free_gap
    robot = RealTimeChunking(policy.policy(), execute_steps=3, delay_steps=2)
    actions = np.array([robot(obs) for _ in range(9)])
    assert np.isfinite(actions).all()
    assert len(robot.executed) == 9


def test_z_scores_are_for_heads():
    stats = ActionStats(mean=np.zeros(7), std=np.ones(7), mode="normal")
    head = RegressionConfig(HORIZON, 7)
    made = ActionConfig(None, None, NormStats({"r": {"action": stats}}), {"r": SPACE}, horizon=HORIZON, head=head)
    chunk = np.full((HORIZON, 7), 0.5)
    np.testing.assert_allclose(made.unnormalize(made.normalize(chunk))[0], chunk)
    assert ActionConfig.from_dict(made.to_dict()) == made
