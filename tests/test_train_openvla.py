"""Fine-tuning OpenVLA checkpoints: the original's training sequence, its recipe, and what is saved."""

import copy
import json
import logging
import shutil

import numpy as np
import openvla_golden as og
import pytest
import torch
from forked import run_ranks
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_train import SEVEN, arguments, write_dataset
from tiny import NAMES, picture, save_native_llava

from hf_vla_actions import AutoModelForActionPrediction, NormStats, OpenVLAConfig, OpenVLAForActionPrediction
from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.errors import CheckpointError, TrainingError
from hf_vla_actions.models import load_model
from hf_vla_actions.models.openvla.policy import close_prompt
from hf_vla_actions.train import RECIPES, ActionCollator, LoraArguments, add_lora
from hf_vla_actions.train.__main__ import main
from hf_vla_actions.train.arguments import DataArguments, ModelArguments
from hf_vla_actions.train.collator import action_loss
from hf_vla_actions.train.lora import add_lora as add_lora_to
from hf_vla_actions.train.recipes import asked_recipe
from hf_vla_actions.train.setup import _check_openvla, load_policy, open_dataset

INSTRUCTION = "Move the RED block"
FEW = ["--use_cpu", "--max_steps", "2", "--per_device_train_batch_size", "2", "--save_strategy", "no"]
FEW += ["--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "robot", episodes=3, steps=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "openvla"
    folder.mkdir()
    return og.write_hub_folder(folder, og.tiny_config(), og.tiny_model().state_dict())


def command(base, robot, out, *more):
    return ["--model_name_or_path", str(base), "--dataset", str(robot), "--output_dir", str(out), *FEW, *SEVEN, *more]


def load(base, robot, **options):
    model_args = ModelArguments(model_name_or_path=str(base), **options.pop("model", {}))
    data_args = DataArguments(dataset=str(robot), **options)
    return load_policy(model_args, data_args, open_dataset(data_args), 0)


@pytest.fixture(scope="module")
def policy(base, robot):
    return load(base, robot)[0].eval()


@pytest.fixture(scope="module")
def samples(robot):
    chunks = ChunkDataset(LeRobotDataset(robot), 1)
    found = [chunks[0], chunks[5]]
    found[1]["instruction"] = INSTRUCTION
    return found


def collate(policy, samples):
    return ActionCollator(policy.prompts, "robot")(samples)


def test_sequence_is_prompt_lone_space_action_and_end(policy, samples):
    batch = collate(policy, samples)
    inputs = policy.prepare([s["images"] for s in samples], [s["instruction"] for s in samples])
    ids, mask = close_prompt(inputs["input_ids"], inputs["attention_mask"], 32000)
    assert torch.equal(batch["input_ids"][:, :-8], ids)
    assert torch.equal(batch["attention_mask"][:, :-8], mask)
    assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
    assert batch["input_ids"][:, -9].tolist() == [29871, 29871]
    assert batch["input_ids"][:, -1].tolist() == [2, 2]
    assert torch.equal(batch["labels"], batch["input_ids"][:, -8:])
    text = policy.processor.tokenizer.decode(ids[1], skip_special_tokens=True)
    assert text.strip() == f"In: What action should the robot take to {INSTRUCTION.lower()}?\nOut:"
    # Edges and ids as the original has them, written out.
    stats = policy.action_config.stats("robot")
    for row, sample in enumerate(samples):
        low, high = np.asarray(stats.q01), np.asarray(stats.q99)
        x = np.where(stats.mask, 2 * (sample["actions"][0] - low) / np.where(high > low, high - low, 1) - 1, 0)
        x = np.where(stats.mask, np.where(high > low, x, 0), sample["actions"][0])
        expected = 32000 - np.digitize(np.clip(x, -1, 1), np.linspace(-1, 1, 256))
        assert batch["labels"][row, :7].tolist() == expected.tolist()


def test_loss_is_that_of_the_native_model(policy, samples):
    batch = collate(policy, samples)
    labels, _, keep = (batch.pop(name) for name in ("labels", "sample_ids", "logits_to_keep"))
    full = torch.cat([torch.full((2, batch["input_ids"].shape[1] - 8), -100), labels], dim=1)
    with torch.no_grad():
        found = action_loss(policy(**batch, logits_to_keep=keep), labels)
        expected = policy(**batch, labels=full).loss
    torch.testing.assert_close(found, expected, rtol=0, atol=og.LOSS)


def test_logits_in_training_are_those_of_generate(policy, samples):
    inputs = policy.prepare([s["images"] for s in samples], [s["instruction"] for s in samples])
    inputs["input_ids"], inputs["attention_mask"] = close_prompt(inputs["input_ids"], inputs["attention_mask"], 32000)
    options = {"max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = policy.generate(**inputs, **options)
    tokens = out.sequences[:, -7:]
    batch = collate(policy, samples)
    batch["input_ids"][:, -8:-1] = tokens
    for name in ("labels", "sample_ids"):
        batch.pop(name)
    with torch.no_grad():
        logits = policy(**batch).logits
    assert logits.shape[1] == 9
    torch.testing.assert_close(logits[:, :7], torch.stack(out.logits, dim=1), rtol=0, atol=1e-4)


def test_checkpoint_keeps_its_tokens_and_gains_a_robot(base, robot, policy):
    before, config = json.loads((base / "config.json").read_text())["norm_stats"], policy.action_config
    assert config.vocabulary.to_ids(np.array([0, 255])).tolist() == [31999, 31744]
    assert config.tokenizer.grid.scheme == "openvla"
    assert (config.vocabulary.layout, config.horizon, config.chat) == ("tail", 1, False)
    assert [config.space(key).dof for key in ("arm_7", "arm_8", "robot")] == [7, 8, 7]
    assert config.space("robot").names[0] == NAMES[0]
    assert config.cameras == ("observation.images.top",)
    assert {key: policy.norm_stats[key] for key in before} == before, "entries of the checkpoint stay as they were"
    assert NormStats.from_dict(policy.norm_stats)["robot"]["action"] == config.stats("robot")
    rows = LeRobotDataset(robot).actions
    np.testing.assert_allclose(policy.norm_stats["robot"]["action"]["q99"], np.quantile(rows, 0.99, axis=0))
    assert policy.norm_stats["robot"]["action"]["mask"] == [True] * 6 + [False]


def test_checkpoint_without_statistics_gets_those_of_the_dataset(base, robot, tmp_path):
    config = {k: v for k, v in og.tiny_config().items() if k != "norm_stats"}
    og.write_hub_folder(tmp_path, config, load_file(base / "model.safetensors"))
    policy, key = load(tmp_path, robot)
    assert set(policy.norm_stats) == set(policy.action_config.norm_stats) == {key} == {"robot"}
    assert policy.action_config.space().names[-1] == "gripper"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"action_layout": "append"}}, "tail"),
        ({"model": {"n_bins": 128}}, "256"),
        ({"model": {"spare_from": 100}}, "31744"),
        ({"model": {"prompt": "Q: {instruction}"}}, "--prompt"),
        ({"horizon": 4}, "--horizon 1"),
        ({"norm_mode": "bounds"}, "q01 and q99"),
        ({"unnorm_key": "arm_7"}, "another --unnorm_key"),
    ],
)
def test_options_that_contradict_the_checkpoint_raise(base, robot, options, message):
    with pytest.raises(TrainingError, match=message):
        load(base, robot, **options)


def test_two_cameras_without_a_choice_raise(base, tmp_path):
    from hf_vla_actions.data.lerobot_writer import LeRobotWriter

    shapes = {name: (48, 48, 3) for name in ("top", "wrist")}
    with LeRobotWriter(
        tmp_path / "two", fps=5, robot_type="t", action_names=["x", "y"], image_shapes=shapes
    ) as writer:
        frames = [picture(step) for step in range(4)]
        writer.add_episode("go", np.random.default_rng(0).uniform(-1, 1, (4, 2)), {"top": frames, "wrist": frames})
    with pytest.raises(TrainingError, match="sees one picture"):
        load(base, tmp_path / "two")
    policy, _ = load(base, tmp_path / "two", cameras=["wrist"])
    assert policy.action_config.cameras == ("observation.images.wrist",)


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_training_ends_where_uninterrupted_training_does(lora, base, robot, tmp_path):
    more = ["--save_strategy", "steps", "--save_steps", "1", "--learning_rate", "0.01"]
    more += ["--recipe", "openvla-lora" if lora else "openvla-full"]
    more += ["--lora_r", "2"] if lora else []
    assert main(command(base, robot, tmp_path / "whole", *more)) == 0
    shutil.copytree(tmp_path / "whole/checkpoint-1", tmp_path / "parts/checkpoint-1")
    assert main(command(base, robot, tmp_path / "parts", *more, "--resume_from_checkpoint", "true")) == 0
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    whole, parts = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    first = load_file(tmp_path / "whole/checkpoint-1" / name)
    assert any(not torch.equal(whole[key], first[key]) for key in whole)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, msg=key)


def test_weights_that_never_run_do_not_hold_up_several_processes(base, robot, tmp_path):
    argv = command(base, robot, tmp_path / "out", "--recipe", "openvla-full", "--gradient_checkpointing")
    done = run_ranks(["-m", "hf_vla_actions.train", *argv], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out/action_metrics.json").read_text())["world_size"] == 2


def test_oft_checkpoint_raises(robot):
    with pytest.raises(TrainingError, match="OFT"):
        _check_openvla({"oft": {"horizon": 8}}, DataArguments(dataset=str(robot)), LeRobotDataset(robot))


def test_full_recipe_saves_a_checkpoint_of_the_original(base, robot, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "dataset_statistics.json").write_text("{}")  # of an earlier run: it would hide what this one learns
    assert main(command(base, robot, out, "--recipe", "openvla-full", "--overwrite_output_dir")) == 0
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    for name in ("language_model.lm_head.weight", "vision_backbone.featurizer.patch_embed.proj.weight"):
        assert not torch.equal(before[name], after[name]), name
    config = json.loads((out / "config.json").read_text())
    assert set(config["norm_stats"]) == {"arm_7", "arm_8", "robot"}
    assert "auto_map" not in config
    ours = AutoModelForActionPrediction.from_pretrained(out)
    assert ours.action_config.space("robot").units[3] == "rad"
    plain, _ = load_model(str(out))
    inputs = ours.prepare(picture(0), INSTRUCTION)
    action = ours.predict_action(**inputs, unnorm_key="robot")
    assert action.shape == (7,)
    # The original's files know no gripper: six numbers are the same, the seventh is not yet settled.
    np.testing.assert_array_equal(plain.eval().predict_action(**inputs, unnorm_key="robot")[:6], action[:6])
    (out / "action_config.json").unlink()  # the original's files alone say the same
    bare = AutoModelForActionPrediction.from_pretrained(out)
    np.testing.assert_array_equal(bare.predict_action(**inputs, unnorm_key="robot")[:6], action[:6])


@pytest.fixture(scope="module")
def adapter(base, robot, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "out"
    assert main(command(base, robot, out, "--recipe", "openvla-lora", "--lora_r", "4", "--learning_rate", "0.01")) == 0
    return out


def test_adapter_has_the_statistics_and_loads_and_merges(adapter, tmp_path):
    loaded = AutoModelForActionPrediction.from_pretrained(adapter)
    inputs = loaded.prepare(picture(0), INSTRUCTION)
    action = loaded.predict_action(**inputs, unnorm_key="robot")
    assert set(json.loads((adapter / "dataset_statistics.json").read_text())) == {"arm_7", "arm_8", "robot"}
    assert loaded.get_action_stats("robot")["mask"] == [True] * 6 + [False]
    plain = OpenVLAForActionPrediction.from_pretrained(adapter).eval()
    # The original's files know no gripper: six numbers are the same, the seventh is not yet settled.
    np.testing.assert_array_equal(plain.predict_action(**inputs, unnorm_key="robot")[:6], action[:6])
    with torch.no_grad():
        expected = loaded(**inputs).logits
        with loaded.disable_adapter():
            assert (loaded(**inputs).logits - expected).abs().max() > 1e-3, "the adapter does something"
        double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        exact = copy.deepcopy(loaded).double()
        found = exact(**double).logits
        torch.testing.assert_close(exact.merge_and_unload()(**double).logits, found, rtol=0, atol=1e-10)
        merged = loaded.merge_and_unload()
        # Logits of this model reach 13: what is left in float32 is rounding, as between the port and the original.
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=0, atol=og.LOGITS)
        assert (merged(**inputs).logits - expected).abs().mean() < 1e-5
    merged.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "config.json").read_text())["norm_stats"]) == {"arm_7", "arm_8", "robot"}
    alone = AutoModelForActionPrediction.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(alone(**inputs).logits, expected, rtol=0, atol=og.LOGITS)


def test_adapter_that_lost_a_tensor_raises(adapter, tmp_path):
    for file in adapter.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(adapter / "adapter_model.safetensors")
    state.pop("base_model.model.language_model.lm_head.lora_B.weight")
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="1 weights are missing"):
        AutoModelForActionPrediction.from_pretrained(tmp_path)


def recipe_arguments(name, **changes):
    options = {**RECIPES[name].options(bf16=False), **changes}
    return LoraArguments(**{k: v for k, v in options.items() if k in LoraArguments.__dataclass_fields__})


def test_recipe_adapts_what_the_original_did():
    golden = og.load("golden_lora.json")
    assert sorted(RECIPES["openvla-lora"].lora_target_modules) == golden["adapter_config"]["target_modules"]
    policy = og.build(golden).attach(og.processor(og.build(golden).config))
    model = add_lora(policy, recipe_arguments("openvla-lora", lora_r=golden["adapter_config"]["r"]))
    ours = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert {k: list(v.shape) for k, v in ours.items()} == {
        k: shape for k, (shape, _) in golden["adapter_state_dict"].items()
    }
    config = model.peft_config["default"]
    assert config.init_lora_weights == "gaussian"
    assert (config.lora_alpha, config.lora_dropout, config.bias) == (16, 0.0, "none")
    down = ours["base_model.model.language_model.lm_head.lora_A.weight"]
    assert 0.8 < float(down.std()) * 4 < 1.2, "gaussian: standard deviation 1 / r"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained), "no rows beside the adapter"


def test_recipe_at_full_size_trains_as_many_numbers_as_the_original_reports():
    """finetune.py on openvla-7b logs "trainable params: 110,828,288 || all params: 7,652,065,472"; 878 tensors."""
    recipe = RECIPES["openvla-lora"]
    lora = LoraConfig(r=recipe.lora_r, lora_alpha=recipe.lora_alpha, target_modules=list(recipe.lora_target_modules))
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(OpenVLAConfig())
    model = get_peft_model(model, lora, low_cpu_mem_usage=True)
    assert model.get_nb_trainable_parameters() == (110_828_288, 7_652_065_472)
    assert len(get_peft_model_state_dict(model, save_embedding_layers=False)) == 878


def test_users_options_win_and_are_logged(base, robot, tmp_path, caplog, monkeypatch):
    seen = {}

    def stop(policy, dataset, args, *, lora, **_):
        seen.update(args=args, lora=lora, policy=policy)
        (tmp_path / "out").mkdir()  # as a training leaves it, for its record
        return policy, {}

    monkeypatch.setattr("hf_vla_actions.train.__main__.fine_tune", stop)
    argv = command(
        base, robot, tmp_path / "out", "--recipe=openvla-lora", "--lora_alpha", "8", "--weight-decay", "0.1"
    )
    with caplog.at_level(logging.WARNING):
        assert main(argv) == 0
    args, lora = seen["args"], seen["lora"]
    assert (lora.use_peft, lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (True, 32, 8, 0.0)
    assert (args.learning_rate, args.lr_scheduler_type, args.weight_decay, args.max_grad_norm) == (
        5e-4,
        "constant",
        0.1,
        0,
    )
    assert seen["policy"].dtype == torch.float32
    assert not args.bf16, "on a CPU"
    lines = [record.message for record in caplog.records if record.message.startswith("recipe")]
    assert len(lines) == 3, lines  # and the batch size of these tests
    assert any("lora_alpha=16" in line and "asked for 8" in line for line in lines)


def test_bfloat16_where_the_device_can(monkeypatch):
    monkeypatch.setattr("hf_vla_actions.train.recipes.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for argv, dtype in (([], "bfloat16"), (["--use_cpu"], "float32"), (["--use_cpu", "false"], "bfloat16")):
        options = asked_recipe(["--recipe", "openvla-lora", *argv])[1]
        assert (options["dtype"], options["bf16"]) == (dtype, dtype == "bfloat16")
    assert asked_recipe(["--recipe", "openvla-full"])[1]["bf16"]
    assert "dtype" not in asked_recipe(["--recipe", "openvla-full"])[1], "all weights are trained in float32"
    assert asked_recipe(["--output_dir", "x"]) is None


def test_recipe_on_another_model_raises(robot, tmp_path, capsys):
    llava = save_native_llava(tmp_path / "llava", seed=3)
    assert main(command(llava, robot, tmp_path / "out", "--recipe", "openvla-lora")) == 2
    assert "'openvla'" in capsys.readouterr().err


def test_adapter_and_rows_on_one_layer_raises(policy):
    with pytest.raises(TrainingError, match="lm_head"):
        add_lora_to(policy, LoraArguments(use_peft=True, lora_target_modules=["lm_head", "q_proj"]))


def test_lora_without_the_recipe_trains_the_rows_and_loads(base, robot, tmp_path):
    out = tmp_path / "out"
    assert main(command(base, robot, out, "--use_peft", "--lora_r", "2", "--learning_rate", "0.01")) == 0
    names = set(load_file(out / "adapter_model.safetensors"))
    assert sum("trainable_tokens" in name for name in names) == 2
    assert not any("vision_backbone" in name or "projector" in name for name in names)
    loaded = AutoModelForActionPrediction.from_pretrained(out)
    assert loaded.predict_action(**loaded.prepare(picture(0), INSTRUCTION), unnorm_key="robot").shape == (7,)


def test_training_learns_a_step_and_free_running_prediction_agrees(base, robot, tmp_path):
    from hf_vla_actions.train import fine_tune

    policy, key = load(base, robot)
    chunks = torch.utils.data.Subset(ChunkDataset(LeRobotDataset(robot), 1), [0, 5])
    args = arguments(tmp_path / "out", max_steps=40, learning_rate=3e-3, lr_scheduler_type="constant")
    _, metrics = fine_tune(policy, chunks, args, unnorm_key=key)
    assert metrics["train_token_accuracy"] == 1.0
    again = AutoModelForActionPrediction.from_pretrained(tmp_path / "out")
    for index in (0, 5):
        sample = ChunkDataset(LeRobotDataset(robot), 1)[index]
        action = again.predict_action(**again.prepare(sample["images"], sample["instruction"]), unnorm_key=key)
        _, expected = again.action_config.decode(again.action_config.encode(sample["actions"], key), key)
        np.testing.assert_array_equal(action, expected[0])
