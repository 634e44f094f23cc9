"""Transformers' PI0 as a policy, with a tiny random model: native classes, native prompts, no torchvision."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_train import write_dataset
from tiny import INSTRUCTIONS, SPACE, picture
from tiny_families import _create, _id, _siglip, _special, _text, gemma_tokenizer
from transformers import AutoModelForImageTextToText, PI0Config, PI0ForConditionalGeneration
from transformers.models.pi0.processing_pi0 import PI0Processor

from hf_vla_actions import ActionConfig, ActionStats, AutoModelForActionPrediction, NormStats, VLAActionsError, to_vla
from hf_vla_actions.constraints import Range
from hf_vla_actions.errors import CheckpointError
from hf_vla_actions.heads import FlowMatchingConfig, HeadError, NativeFlowConfig, SoftPrefix, head_config_from_dict
from hf_vla_actions.models import save_adapter
from hf_vla_actions.models.head_collator import HeadCollator
from hf_vla_actions.models.head_files import HEAD_FILE
from hf_vla_actions.models.pi0_processor import PI0ImageProcessorPil
from hf_vla_actions.train.__main__ import main
from hf_vla_actions.train.arguments import LoraArguments
from hf_vla_actions.train.freeze import Frozen, freeze_parts
from hf_vla_actions.train.lora import add_lora

HORIZON, WIDE, EDGE = 5, 12, 28
LONG = "push the green block onto the plate and then move to the red block"
MEAN, STD = np.linspace(-0.1, 0.1, 7), np.linspace(0.05, 0.2, 7)
STATE_MEAN, STATE_STD = [0.5, -0.5, 0.0], [1.0, 2.0, 0.5]
STATE = np.array([0.2, 0.4, -0.6])


def native(seed=0, **statistics):
    """A PI0 of two layers, chunks of 5 x 12, pictures of 28 x 28, and its processor."""
    tokenizer = gemma_tokenizer()
    pictures = PI0ImageProcessorPil(
        size={"max_height": EDGE, "max_width": EDGE}, pad_size={"height": EDGE, "width": EDGE}, image_seq_length=4
    )
    if not statistics:
        statistics = {
            "actions_mean": MEAN.tolist(),
            "actions_std": STD.tolist(),
            "state_mean": STATE_MEAN,
            "state_std": STATE_STD,
        }
    processor = PI0Processor(pictures, tokenizer, max_state_dim=WIDE, chunk_size=HORIZON, **statistics)
    text = {"model_type": "gemma", "head_dim": 16, **_text(tokenizer, 0, True)}
    vlm = {
        "model_type": "paligemma",
        "vision_config": {"model_type": "siglip_vision_model", **_siglip(EDGE, 14, vision_use_head=False)},
        "text_config": text,
        "projection_dim": 32,
        "image_token_id": _id(tokenizer, "<image>"),
        **_special(tokenizer, True),
    }
    dit = {**text, "hidden_size": 16, "intermediate_size": 32}
    config = PI0Config(vlm_config=vlm, dit_config=dit, chunk_size=HORIZON, max_state_dim=WIDE, max_action_dim=WIDE)
    model = _create(PI0ForConditionalGeneration, config, seed)
    with torch.no_grad():  # with Transformers' first weights hardly anything reaches the velocity of so small a model
        for layer in (*model.embed_action_time.children(), model.action_out_proj):
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(15)
    return model, processor


def statistics(proprio=True):
    entry = {"action": ActionStats(mean=MEAN, std=STD, mode="normal")}
    if proprio:
        entry["proprio"] = ActionStats(mean=STATE_MEAN, std=STATE_STD, mode="normal")
    return NormStats({"robot": entry})


SIZES = {"horizon": HORIZON, "dof": WIDE, "proprio_dim": WIDE}


def make(seed=0, proprio=True, **changes):
    sizes = SIZES if proprio else {**SIZES, "proprio_dim": None}
    config = ActionConfig.preset("pi0-transformers").config(statistics(proprio), {"robot": SPACE}, **sizes, **changes)
    return to_vla(*native(seed), config).eval()


def noise_of(rows, seed=0):
    return torch.randn(rows, HORIZON, WIDE, generator=torch.Generator().manual_seed(seed))


def tensors(inputs):
    """What the native methods take: the state normalized and filled up, all else as it is."""
    inputs = dict(inputs)
    state = (inputs.pop("proprio") - torch.tensor(STATE_MEAN)) / torch.tensor(STATE_STD)
    return {**inputs, "state": torch.nn.functional.pad(state, (0, WIDE - 3)).float()}


@pytest.mark.parametrize("steps", [None, 3])
def test_it_says_what_the_models_own_sampling_says_in_real_units(steps):
    policy = make()
    inputs = policy.prepare([picture(0), picture(1)], [INSTRUCTIONS[0], LONG], proprio=STATE)
    noise = noise_of(2)
    out = policy.predict_action(**inputs, noise=noise, num_steps=steps, return_dict=True)
    wanted = policy.sample_actions(**tensors(inputs), noise=noise, num_steps=steps)[..., :7].double().numpy()
    np.testing.assert_allclose(out.normalized, wanted, atol=1e-6)
    real = wanted * STD + MEAN
    np.testing.assert_allclose(out.actions[..., :6], real[..., :6], atol=1e-6)
    assert set(np.unique(out.actions[..., 6])) <= {0.0, 1.0}  # the space has a binary gripper
    assert np.abs(wanted).max() > 0.5
    assert not np.allclose(policy.predict_action(**inputs, noise=noise_of(2, 1)), out.actions)


def test_its_prompts_are_those_of_the_native_processor():
    policy = make()
    inputs = policy.prepare(picture(0), INSTRUCTIONS[0], proprio=STATE)
    told = policy.processor(images=[[picture(0)]], text=[INSTRUCTIONS[0]], state=STATE[None])
    real = told["attention_mask"].bool()
    assert torch.equal(inputs["input_ids"], told["input_ids"][real][None])
    torch.testing.assert_close(inputs["pixel_values"], told["pixel_values"])
    torch.testing.assert_close(tensors(inputs)["state"], told["state"])
    noise = noise_of(1)
    padded = policy.sample_actions(**told, noise=noise)  # 48 places, padded on the right
    torch.testing.assert_close(policy.sample_actions(**tensors(inputs), noise=noise), padded, atol=1e-5, rtol=1e-5)


def test_a_wide_picture_keeps_its_shape_and_is_filled_up_below():
    wide = np.full((10, 56, 3), 255, dtype=np.uint8)
    pixels = PI0ImageProcessorPil()(wide, return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape) == (1, 3, 224, 224)
    assert (pixels[:, :, :40] == 1).all()
    assert (pixels[:, :, 40:] == 0).all()
    assert (PI0ImageProcessorPil()(0 * wide[:, :10], return_tensors="pt")["pixel_values"] == -1).all()


def test_a_batch_is_its_rows_also_with_different_numbers_of_pictures():
    policy = make()
    entries, sentences = [[picture(0)], [picture(1), picture(2)]], [LONG, INSTRUCTIONS[0]]
    noise = noise_of(2)
    whole = policy.predict_action(**policy.prepare(entries, sentences, proprio=STATE), noise=noise)
    for row in range(2):
        alone = policy.prepare(entries[row], sentences[row], proprio=STATE)
        one = policy.predict_action(**alone, noise=noise[row : row + 1])
        np.testing.assert_allclose(whole[row : row + 1], one, atol=1e-5)


def test_the_loss_is_the_models_own_where_all_numbers_are_real():
    policy = make().train()
    inputs = tensors(policy.prepare([picture(0), picture(1)], [INSTRUCTIONS[0], LONG], proprio=STATE))
    state = inputs.pop("state")
    chunks = noise_of(2, 5)
    torch.manual_seed(3)
    out = policy(**inputs, normalized=chunks, normalized_proprio=state)
    torch.manual_seed(3)
    noise = torch.randn(2, HORIZON, WIDE)
    time = 0.999 * torch.rand(2) ** (1 / 1.5) + 0.001
    wanted = policy(**inputs, state=state, noise=noise, timestep=time, actions=chunks).loss
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    for part in (
        policy.model.vlm.vision_tower,
        policy.model.vlm.language_model,
        policy.model.dit,
        policy.action_out_proj,
    ):
        assert sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None) > 0
    policy.zero_grad()
    policy(**inputs, normalized=chunks, normalized_proprio=state, insulate=True).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.model.vlm.parameters())
    assert policy.action_out_proj.weight.grad.any()


def test_it_learns_from_the_collators_batch_and_padding_changes_nothing():
    policy = make().train()
    real = np.zeros(HORIZON, dtype=bool)
    real[:3] = True
    sample = {"images": [picture(0)], "instruction": LONG, "proprio": STATE, "episode": 0, "step": 0}
    samples = [{**sample, "actions": np.tile(MEAN + STD, (HORIZON, 1)), "action_pad_mask": real} for _ in range(2)]
    batch = HeadCollator(policy.prompts)(samples)
    batch = {name: value for name, value in batch.items() if name not in ("actions", "sample_ids", "proprio")}
    assert not batch["action_pad_mask"][..., 7:].any()
    other = batch["normalized"].clone()
    other[:, 3:] = 9.0
    found = []
    for chunks in (batch["normalized"], other):
        torch.manual_seed(0)
        found.append(policy(**{**batch, "normalized": chunks}).loss)
    torch.testing.assert_close(*found)
    optimizer, losses = torch.optim.AdamW(policy.parameters(), lr=3e-3), []
    for _ in range(10):
        torch.manual_seed(0)
        loss = policy(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_saved_and_loaded_it_acts_the_same_and_plain_transformers_reads_it(tmp_path):
    policy = make()
    inputs = policy.prepare(picture(0), INSTRUCTIONS[0], proprio=STATE)
    before = policy.predict_action(**inputs, noise=noise_of(1))
    policy.save_pretrained(tmp_path)
    assert not (tmp_path / HEAD_FILE).exists()
    loaded = AutoModelForActionPrediction.from_pretrained(tmp_path)  # its self tests run
    assert loaded.action_config == policy.action_config
    assert type(loaded.action_config.head) is NativeFlowConfig
    again = loaded.prepare(picture(0), INSTRUCTIONS[0], proprio=STATE)
    np.testing.assert_array_equal(loaded.predict_action(**again, noise=noise_of(1)), before)
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(plain) is PI0ForConditionalGeneration
    torch.testing.assert_close(
        plain.sample_actions(**tensors(inputs), noise=noise_of(1)),
        policy.sample_actions(**tensors(inputs), noise=noise_of(1)),
    )
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["image_processor"]["image_processor_type"] == "PI0ImageProcessor"


def test_a_native_checkpoint_brings_its_own_statistics_or_says_what_is_missing(tmp_path):
    model, processor = native()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    policy = AutoModelForActionPrediction.from_pretrained(tmp_path, self_test=False)
    inputs = policy.prepare(picture(0), INSTRUCTIONS[0], proprio=STATE)
    real = model.sample_actions(**tensors(inputs), noise=noise_of(1))[..., :7].double().numpy() * STD + MEAN
    np.testing.assert_allclose(policy.predict_action(**inputs, noise=noise_of(1)), real, atol=1e-6)
    bare = PI0Processor(processor.image_processor, processor.tokenizer, max_state_dim=WIDE, chunk_size=HORIZON)
    bare.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no .'actions_mean'.*pass config="):
        AutoModelForActionPrediction.from_pretrained(tmp_path)
    told = ActionConfig.preset("pi0-transformers").config(statistics(), **SIZES)
    policy = AutoModelForActionPrediction.from_pretrained(tmp_path, config=told, self_test=False)
    np.testing.assert_allclose(policy.predict_action(**inputs, noise=noise_of(1)), real, atol=1e-6)


def test_a_model_that_sees_no_picture_fails_its_self_test():
    policy = make()
    assert policy.check_sees_image() > 0
    assert policy.check_reads_instruction() > 0
    with torch.no_grad():
        policy.model.vlm.multi_modal_projector.linear.weight.zero_()
    with pytest.raises(VLAActionsError, match="the picture does not change"):
        policy.check_sees_image()
    assert policy.check_reads_instruction() > 0


def test_constraints_hold_and_guidance_moves_less():
    policy = make(limits=[Range("z", -0.01, 0.01)])
    inputs = policy.prepare(picture(0), INSTRUCTIONS[0], proprio=STATE)
    noise, asked = noise_of(1), [Range("x", 0.02, 0.03)]
    out = policy.predict_action(**inputs, noise=noise, constraints=asked, return_dict=True)
    assert ((out.actions[..., 0] >= 0.02) & (out.actions[..., 0] <= 0.03)).all()
    assert (np.abs(out.actions[..., 2]) <= 0.01).all()
    assert out.moved[..., 0].any()
    guided = policy.predict_action(**inputs, noise=noise, constraints=asked, guidance="constraints", return_dict=True)
    assert np.abs(guided.moved[..., [0, 2]]).max() < 1e-6
    held = SoftPrefix(torch.full((HORIZON, WIDE), 0.3), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    free = policy.predict_action(**inputs, noise=noise, return_dict=True).normalized[0, :2]
    drawn = policy.predict_action(**inputs, noise=noise, guidance=held, return_dict=True).normalized[0, :2]
    assert np.abs(drawn[:, 3:6] - 0.3).mean() < np.abs(free[:, 3:6] - 0.3).mean()


def test_its_chunks_are_carried_out_in_order():
    policy = make()
    obs = {"images": picture(0), "instruction": INSTRUCTIONS[0], "proprio": STATE}
    noise = noise_of(1)
    run = policy.policy(execute_steps=2, noise=noise)
    chunk = policy.predict_action(**policy.prepare(picture(0), INSTRUCTIONS[0], proprio=STATE), noise=noise)[0]
    np.testing.assert_allclose([run(obs) for _ in range(4)], [*chunk[:2], *chunk[:2]], atol=1e-9)


def test_a_state_of_fewer_numbers_is_filled_up_with_zeros():
    narrow = ActionConfig.preset("pi0-transformers").config(
        statistics(), {"robot": SPACE}, **{**SIZES, "proprio_dim": 3}
    )
    policy, wide = to_vla(*native(), narrow).eval(), make()
    inputs = policy.prepare(picture(0), INSTRUCTIONS[0], proprio=STATE)
    np.testing.assert_array_equal(
        policy.predict_action(**inputs, noise=noise_of(1)), wide.predict_action(**inputs, noise=noise_of(1))
    )


def test_without_a_state_it_is_shown_zeros():
    policy = make(proprio=False)
    inputs = policy.prepare(picture(0), INSTRUCTIONS[0])
    wanted = policy.sample_actions(**inputs, state=torch.zeros(1, WIDE), noise=noise_of(1))[..., :7].double()
    found = policy.predict_action(**inputs, noise=noise_of(1), return_dict=True).normalized
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    with pytest.raises(VLAActionsError, match="reads the robot's state"):
        make().prepare(picture(0), INSTRUCTIONS[0])


def test_what_does_not_fit_raises():
    model, processor = native()
    preset = ActionConfig.preset("pi0-transformers")
    with pytest.raises(VLAActionsError, match=r"'horizon': 50.*'horizon': 5"):
        to_vla(model, processor, preset.config(statistics()))
    with pytest.raises(VLAActionsError, match=r"a 'flow' head: use .*pi0-transformers"):
        to_vla(model, processor, ActionConfig.preset("pi0").config(statistics()))
    with pytest.raises(VLAActionsError, match="needs its PI0Processor"):
        to_vla(model, processor.tokenizer, preset.config(statistics(), **SIZES))
    other = PI0Processor(PI0ImageProcessorPil(), gemma_tokenizer())
    with pytest.raises(VLAActionsError, match=r"\[224, 224\] with 256 tokens each, the model reads 28 x 28 with 4"):
        to_vla(model, other, preset.config(statistics(), **SIZES))
    policy = to_vla(model, processor, preset.config(statistics(), **SIZES))
    with pytest.raises(VLAActionsError, match="use predict_action"):
        policy.generate()
    with pytest.raises(VLAActionsError, match=r"tokens of text, and pi0 reads up to 48"):
        policy.prepare(picture(0), " ".join([LONG] * 6), proprio=STATE)
    inputs = policy.prepare(picture(0), INSTRUCTIONS[0], proprio=STATE)
    without_state = {name: value for name, value in inputs.items() if name != "proprio"}
    with pytest.raises(VLAActionsError, match="no output layer for words"):
        policy.learn(noise_of(1), without_state, labels=inputs["input_ids"])
    with pytest.raises(VLAActionsError, match=r"no use for .'state'. here: .*proprio="):
        policy.predict_action(**inputs, state=torch.zeros(1, WIDE))
    with pytest.raises(VLAActionsError, match=r"'pixel_values'.* are missing"):
        policy.predict_action(input_ids=inputs["input_ids"], proprio=inputs["proprio"])


def test_a_native_head_is_saved_as_such_and_built_for_no_other_model():
    config = NativeFlowConfig(50, 32, proprio_dim=32, steps=4)
    assert head_config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(HeadError, match="part of its model"):
        config.build(8)
    for wrong in ({"steps": 0}, {"time": "other"}, {"beta": (2.0, 3.0)}, {"solver": "rk4"}):
        with pytest.raises(HeadError):
            NativeFlowConfig(50, 32, **wrong)
    assert FlowMatchingConfig(50, 32).beside_model
    assert not config.beside_model


def shaken(peft):
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    return peft.eval()


@pytest.mark.parametrize("targets", ["ours", "plain PEFT on a renamed layer"])
def test_an_adapter_comes_back_whole(tmp_path, targets):
    model, processor = native()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    policy = make()
    policy.config._name_or_path = policy.name_or_path = str(tmp_path / "base")
    if targets == "ours":
        peft = add_lora(policy, LoraArguments(use_peft=True, lora_r=4, lora_alpha=8))
        trained = {name for name, p in peft.named_parameters() if p.requires_grad}
        assert any("dit.layers.0" in name and "lora_A" in name for name in trained)
        assert any("action_out_proj.modules_to_save" in name for name in trained)
        assert not any("vision_tower" in name or ("action" in name and "lora_" in name) for name in trained)
    else:
        peft = get_peft_model(policy, LoraConfig(r=4, target_modules=["q_proj", "state_proj"]))
    inputs = policy.prepare(picture(0), INSTRUCTIONS[0], proprio=STATE)
    without = policy.predict_action(**inputs, noise=noise_of(1))
    before = shaken(peft).predict_action(**inputs, noise=noise_of(1))
    assert np.abs(before - without).max() > 1e-3
    save_adapter(peft, tmp_path / "adapter")
    loaded = AutoModelForActionPrediction.from_pretrained(tmp_path / "adapter", self_test=False)
    np.testing.assert_array_equal(loaded.predict_action(**inputs, noise=noise_of(1)), before)
    if targets == "ours":
        merged = loaded.merge_and_unload()
        np.testing.assert_allclose(merged.predict_action(**inputs, noise=noise_of(1)), before, atol=1e-5)


def test_freezing_the_language_model_leaves_the_expert():
    policy = make()
    freeze_parts(policy, Frozen(vision=True, language_model=True))
    trained = {
        name.split(".")[0 if "model." not in name else 1] for name, p in policy.named_parameters() if p.requires_grad
    }
    assert trained == {"dit", "embed_action_time", "action_out_proj"}


def test_the_training_command_trains_it(tmp_path):
    robot = write_dataset(tmp_path / "robot", episodes=2, steps=6)
    model, processor = native()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    words = ["--model_name_or_path", tmp_path / "base", "--dataset", robot, "--output_dir", tmp_path / "out"]
    words += ["--head=native", "--head_options", f"dof={WIDE}", f"--horizon={HORIZON}", "--norm_mode=normal"]
    words += [
        "--max_steps=2",
        "--per_device_train_batch_size=2",
        "--use_cpu",
        "--save_strategy=no",
        "--report_to=none",
    ]
    assert main([str(word) for word in words]) == 0
    policy = AutoModelForActionPrediction.from_pretrained(tmp_path / "out")
    assert policy.action_config.prompt == "{instruction}"
    assert policy.action_config.stats().mode == "normal"
    moved = [not torch.equal(p, old) for p, old in zip(policy.parameters(), model.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    inputs = policy.prepare(picture(0), INSTRUCTIONS[0])
    assert policy.predict_action(**inputs).shape == (1, HORIZON, 7)
