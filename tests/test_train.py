import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from forked import run_ranks
from tiny import INSTRUCTIONS, NAMES, picture, save_native_llava, tiny_llama, tiny_llava, tiny_tokenizer

from hf_vla_actions import AutoModelForActionPrediction
from hf_vla_actions.data import ChunkDataset, LeRobotDataset
from hf_vla_actions.data.lerobot_writer import LeRobotWriter
from hf_vla_actions.errors import TrainingError, VLAActionsError
from hf_vla_actions.train import ActionCollator, LoraArguments, VLATrainer, VLATrainingArguments, add_lora, fine_tune
from hf_vla_actions.train.__main__ import main
from hf_vla_actions.train.arguments import DataArguments, ModelArguments
from hf_vla_actions.train.collator import action_loss
from hf_vla_actions.train.run import check_same_config
from hf_vla_actions.train.setup import chunk_datasets, load_policy, open_dataset, split_episodes

LOW = np.array([-0.02, -0.03, -0.02, 0.0, -0.1, -0.2, 0.0])
HIGH = np.array([0.02, 0.03, 0.02, 0.0, 0.1, 0.2, 1.0])
SEVEN = [
    "--action_units",
    *["m", "m", "m", "rad", "rad", "rad", "none"],
    "--action_kind",
    "delta",
    "--action_frame",
    "base",
]


def write_dataset(folder, *, episodes=4, steps=6, names=NAMES, gripper=(0.0, 1.0)):
    rng = np.random.default_rng(0)
    with LeRobotWriter(
        folder, fps=5, robot_type="test", action_names=names, image_shapes={"top": (48, 48, 3)}
    ) as writer:
        for episode in range(episodes):
            actions = rng.uniform(LOW, HIGH, (steps, 7))[:, : len(names)]
            if "gripper" in names:
                actions[:, -1] = np.where(actions[:, -1] > 0.5, gripper[1], gripper[0])
            frames = [picture(100 * episode + step) for step in range(steps)]
            writer.add_episode(INSTRUCTIONS[episode % 2], actions, {"top": frames})
    return folder


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "robot")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return save_native_llava(tmp_path_factory.mktemp("base") / "llava", seed=3)


@pytest.fixture
def chunks(dataset_folder):
    return ChunkDataset(LeRobotDataset(dataset_folder), 2)


def arguments(folder, **kwargs):
    options = {"use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no"}
    return VLATrainingArguments(output_dir=str(folder), **{**options, "disable_tqdm": True, **kwargs})


@pytest.mark.parametrize("make", [tiny_llava, tiny_llama])
def test_prompt_in_training_is_the_prompt_in_use(make, chunks):
    policy = make(horizon=2)
    samples = [chunks[0], chunks[7], chunks[13]]
    batch = ActionCollator(policy.prompts)(samples)
    images = [s["images"] for s in samples] if make is tiny_llava else None
    inputs = policy.prepare(images, [s["instruction"] for s in samples])
    length = inputs["input_ids"].shape[1]
    for name, value in inputs.items():
        expected = batch[name][:, :length] if value.ndim == 2 else batch[name]
        assert torch.equal(expected, value), name
    assert torch.equal(
        batch["input_ids"][:, length:-1], torch.tensor(policy.action_config.encode([s["actions"] for s in samples]))
    )


def test_labels_are_action_tokens_and_the_closing_token_only(chunks):
    policy = tiny_llava(horizon=2)
    vocabulary = policy.action_config.vocabulary
    batch = ActionCollator(policy.prompts)([chunks[4], chunks[5]])
    assert batch["labels"].shape == (2, 15)
    assert batch["labels"][:, -1].tolist() == [vocabulary.end_token_id] * 2
    vocabulary.to_codes(batch["labels"][0, :14].numpy())
    assert (batch["labels"][1, 7:14] == -100).all(), "the step past the episode's end is no target"
    assert (batch["labels"][1, :7] != -100).all()
    assert batch["sample_ids"].tolist() == [[0, 4], [0, 5]]


def test_loss_is_that_of_the_native_model(chunks):
    policy = tiny_llava(horizon=2)
    batch = ActionCollator(policy.prompts)([chunks[0], chunks[11], chunks[13]])
    labels, _ = batch.pop("labels"), batch.pop("sample_ids")
    keep = batch.pop("logits_to_keep")
    full = torch.cat([torch.full((3, batch["input_ids"].shape[1] - 15), -100), labels], dim=1)
    with torch.no_grad():
        expected = policy(**batch, labels=full).loss
        found = action_loss(policy(**batch, logits_to_keep=keep), labels)
        halved = action_loss(policy(**batch, logits_to_keep=keep), labels, 2 * (labels != -100).sum())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(halved, expected / 2)


@pytest.mark.parametrize("make", [tiny_llava, tiny_llama])
def test_full_fine_tuning_learns_a_batch_saves_and_loads(make, chunks, tmp_path):
    policy = make(horizon=2)
    few = torch.utils.data.Subset(chunks, [0, 8])
    args = arguments(
        tmp_path / "out", max_steps=150, learning_rate=3e-3, lr_scheduler_type="constant", freeze_vision=True
    )
    vision = {n: p.clone() for n, p in policy.named_parameters() if "vision_tower" in n}
    _, metrics = fine_tune(policy, few, args)
    assert metrics["train_token_accuracy"] >= 0.95
    assert metrics["train_l1/x"] < 0.002
    assert {"train_gripper_accuracy", "train_token_accuracy/yaw", "train_l1_normalized/z"} <= set(metrics)
    assert all(torch.equal(p, vision[n]) for n, p in policy.named_parameters() if n in vision)
    again = AutoModelForActionPrediction.from_pretrained(tmp_path / "out")
    sample = chunks[0]
    images = sample["images"] if make is tiny_llava else None
    inputs = again.prepare(images, sample["instruction"])
    np.testing.assert_array_equal(again.predict_action(**inputs), policy.eval().predict_action(**inputs))
    saved = json.loads((tmp_path / "out/action_metrics.json").read_text())
    assert saved["train_token_accuracy"] == metrics["train_token_accuracy"]


def test_lora_trains_adapters_of_the_language_model_and_the_new_rows_only(chunks, tmp_path):
    policy = tiny_llava(horizon=2)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    model, _ = fine_tune(
        policy, chunks, arguments(tmp_path / "out", learning_rate=1e-2), lora=LoraArguments(use_peft=True, lora_r=4)
    )
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name or "trainable_tokens" in name for name in trainable)
    assert not [name for name in trainable if "vision_tower" in name or "projector" in name]
    assert len([name for name in trainable if "trainable_tokens" in name]) == 2, "input and output rows"
    new = torch.tensor(policy.action_config.vocabulary.token_ids.tolist())
    merged = model.merge_and_unload()
    for layer, name in (
        (merged.get_input_embeddings(), "embed_tokens.weight"),
        (merged.get_output_embeddings(), "lm_head.weight"),
    ):
        old = next(value for key, value in before.items() if key.endswith(name))
        changed = (layer.weight != old).any(dim=1).nonzero()[:, 0]
        assert set(changed.tolist()) <= set(new.tolist())
        assert len(changed) > 0


@pytest.mark.parametrize("tie", [False, True])
def test_adapter_loads_on_a_fresh_base_with_identical_logits_and_merges(
    tie, chunks, tmp_path, dataset_folder, base_folder
):
    if tie:
        policy = tiny_llama(horizon=2, tie=True)
        policy.save_pretrained(tmp_path / "base")
        base, images = tmp_path / "base", None
    else:
        base, images = base_folder, chunks[3]["images"]
    model_args = ModelArguments(model_name_or_path=str(base))
    data_args = DataArguments(dataset=str(dataset_folder), horizon=2)
    torch.manual_seed(1)
    policy, key = load_policy(model_args, data_args, open_dataset(data_args), 0)
    lora = LoraArguments(use_peft=True, lora_r=4, lora_dropout=0.1)
    args = arguments(tmp_path / "out", learning_rate=1e-2, max_steps=4)
    model, _ = fine_tune(policy, chunks, args, lora=lora, unnorm_key=key)
    model.eval()
    size = os.path.getsize(tmp_path / "out/adapter_model.safetensors")
    rows = policy.get_input_embeddings().weight.shape[0] * policy.config.get_text_config().hidden_size
    assert size < rows * 4 * 2, "the full embedding matrices are not in the adapter"

    torch.manual_seed(2)  # other random rows for the new tokens of the fresh base
    again = AutoModelForActionPrediction.from_pretrained(tmp_path / "out")
    inputs = again.prepare(images, INSTRUCTIONS[0])
    tokens = torch.tensor(policy.action_config.vocabulary.token_ids[[3, 200, 7]].tolist())[None]
    inputs = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(again(**inputs).logits, expected)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    alone = AutoModelForActionPrediction.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(alone(**inputs).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["lora_A", "token_adapter"])
def test_adapter_with_a_lost_weight_raises(kind, chunks, tmp_path):
    from safetensors.torch import load_file, save_file

    base = tiny_llava(horizon=2)
    base.save_pretrained(tmp_path / "base")
    policy = AutoModelForActionPrediction.from_pretrained(tmp_path / "base")
    fine_tune(policy, chunks, arguments(tmp_path / "out"), lora=LoraArguments(use_peft=True, lora_r=4))
    file = tmp_path / "out/adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if kind in name))
    save_file(weights, file)
    with pytest.raises(VLAActionsError, match="does not fit its base"):
        AutoModelForActionPrediction.from_pretrained(tmp_path / "out")


def test_resumed_training_ends_where_uninterrupted_training_does(chunks, tmp_path):
    def run(folder, steps, **kwargs):
        torch.manual_seed(0)
        policy = tiny_llava(horizon=2)
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3, **kwargs}
        args = arguments(folder, **options)
        if steps < 6:
            from transformers import TrainerCallback

            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, **_):
                    control.should_training_stop = state.global_step >= steps

            fine_tune(policy, chunks, args, callbacks=[Stop()])
        else:
            fine_tune(policy, chunks, args)
        return policy.state_dict()

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    assert (tmp_path / "parts/checkpoint-3/action_config.json").is_file(), "every checkpoint is a policy"
    resumed = run(tmp_path / "parts", 6, resume_from_checkpoint="true")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_loss_that_is_not_finite_raises_and_names_the_samples(chunks, tmp_path):
    policy = tiny_llava(horizon=2)
    few = torch.utils.data.Subset(chunks, [2, 9])
    with torch.no_grad():
        policy.get_output_embeddings().weight[:] = float("inf")
    with pytest.raises(TrainingError, match=r"\(0, 2\).*weights were not changed") as caught:
        fine_tune(policy, few, arguments(tmp_path / "out"))
    assert "(1, 3)" in str(caught.value)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_held_out_episodes_are_whole_and_stay_out_of_the_statistics(dataset_folder, base_folder):
    args = DataArguments(dataset=str(dataset_folder), horizon=2, eval_fraction=0.25)
    dataset = open_dataset(args)
    train, held_out = split_episodes(dataset, 0.25, seed=0)
    assert sorted(train + held_out) == [0, 1, 2, 3]
    assert len(held_out) == 1
    train_chunks, eval_chunks = chunk_datasets(dataset, args, 2, seed=0)
    assert {c["episode"] for c in eval_chunks} == set(held_out)
    assert {c["episode"] for c in train_chunks} == set(train)
    policy, key = load_policy(ModelArguments(model_name_or_path=str(base_folder)), args, dataset, seed=0)
    rows = np.concatenate([dataset.actions[e.start : e.stop] for e in dataset.episodes if e.index in train])
    np.testing.assert_allclose(policy.action_config.stats(key).q99, np.quantile(rows, 0.99, axis=0))
    assert policy.action_config.stats(key).mask.tolist() == [True] * 6 + [False]


def test_command_trains_and_a_trained_policy_gains_a_second_robot(dataset_folder, base_folder, tmp_path):
    common = [
        "--use_cpu",
        "--max_steps",
        "1",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "true",
        "--eval_fraction",
        "0.25",
    ]
    first = [
        "--model_name_or_path",
        str(base_folder),
        "--dataset",
        str(dataset_folder),
        "--output_dir",
        str(tmp_path / "a"),
    ]
    assert main([*first, *common, *SEVEN, "--horizon", "2"]) == 0
    config = AutoModelForActionPrediction.from_pretrained(tmp_path / "a").action_config
    space = config.space("robot")
    assert space.units == ("m", "m", "m", "rad", "rad", "rad", None)
    assert space.delta == (True,) * 6 + (False,)
    assert (space.frame, space.rate_hz, space.gripper.dim) == ("base", 5.0, "gripper")
    assert "eval_token_accuracy" in json.loads((tmp_path / "a/action_metrics.json").read_text())
    second = ["--model_name_or_path", str(tmp_path / "a"), "--dataset", str(dataset_folder), "--unnorm_key", "other"]
    assert main([*second, "--output_dir", str(tmp_path / "b"), *common, "--horizon", "2"]) == 0
    both = AutoModelForActionPrediction.from_pretrained(tmp_path / "b").action_config
    assert sorted(both.norm_stats) == ["other", "robot"]
    assert both.vocabulary == config.vocabulary


def command_line(model, dataset, out):
    return ["--model_name_or_path", str(model), "--dataset", str(dataset), "--output_dir", str(out)]


def launch(arguments, *, processes):
    """`accelerate launch` on CPU through gloo; plain `--cpu --num_processes 2` would silently run one process."""
    tests = os.path.dirname(__file__)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": tests}
    flags = ["--multi_gpu"] if processes > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return subprocess.run(
        [*command, "-m", "hf_vla_actions.train", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_alone(arguments, *, processes):
    return run_ranks(["-m", "hf_vla_actions.train", *arguments], processes=processes)


def test_two_processes_train_as_one_with_twice_the_batch(dataset_folder, base_folder, tmp_path):
    found = {}
    for processes, batch in ((1, 4), (2, 2)):
        out = tmp_path / f"out{processes}"
        start = launch if processes > 1 else run_alone
        done = start(
            [
                "--model_name_or_path",
                str(base_folder),
                "--dataset",
                str(dataset_folder),
                "--output_dir",
                str(out),
                "--per_device_train_batch_size",
                str(batch),
                "--max_steps",
                "3",
                "--logging_steps",
                "1",
                "--use_cpu",
                "--save_strategy",
                "steps",
                "--save_steps",
                "3",
                "--horizon",
                "2",
                "--use_peft",
                "--lora_r",
                "4",
                "--seed",
                "5",
            ],
            processes=processes,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        metrics = json.loads((out / "action_metrics.json").read_text())
        history = json.loads((out / "checkpoint-3/trainer_state.json").read_text())["log_history"]
        found[processes] = (metrics["world_size"], [entry["loss"] for entry in history if "loss" in entry])
    assert (found[1][0], found[2][0]) == (1, 2)
    np.testing.assert_allclose(found[1][1], found[2][1], rtol=2e-3)


def refusals(dataset_folder, base_folder, tmp_path):
    model = ["--model_name_or_path", str(base_folder)]
    data, out = ["--dataset", str(dataset_folder)], ["--output_dir", str(tmp_path / "out")]
    (tmp_path / "full").mkdir(exist_ok=True)
    (tmp_path / "full/old.txt").write_text("keep me")
    return [
        ([*model, "--dataset", str(tmp_path / "nowhere"), *out], "nowhere"),
        ([*model, *data, *out, "--cameras", "wrist"], "wrist"),
        ([*model, *data, *out, "--action_names", "x", "y"], "2 action_names"),
        ([*model, *data, *out, "--action_units", "m", "m"], "units has 2 entries for 7"),
        ([*model, *data, *out, "--action_key", "actoin"], "actoin"),
        ([*model, *data, *out, "--horizon", "0"], "horizon"),
        ([*model, *data, *out, "--eval_fraction", "0.99"], "nothing is left"),
        ([*model, *data, *out, "--eval_fraction", "1.5"], "eval_fraction"),
        ([*model, *data, *out, "--gripper", "claw"], "claw"),
        ([*model, *data, *out, "--prompt", "go"], "instruction"),
        ([*model, *data, *out, "--use_peft", "--lora_target_modules", "nothing"], "LoRA"),
        (["--model_name_or_path", str(tmp_path), *data, *out], "no model"),
        ([*model, *data, "--output_dir", str(tmp_path / "full")], "not empty"),
        ([*model, *data, *out, "--resume_from_checkpoint", "true"], "no checkpoint to resume"),
        ([*model, *data], "output_dir"),
    ]


@pytest.mark.parametrize("case", range(15))
def test_wrong_options_end_in_one_line_with_nothing_written_raises(
    case, dataset_folder, base_folder, tmp_path, capsys
):
    argv, message = refusals(dataset_folder, base_folder, tmp_path)[case]
    assert main([*argv, "--use_cpu", "--max_steps", "1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists() or not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["old.txt"]


def test_nan_in_the_actions_ends_in_one_line(base_folder, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = write_dataset(tmp_path / "robot")
    file = folder / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    rows = np.array(table["action"].to_pylist(), dtype=np.float32)
    rows[8, 2] = np.nan
    column = table.schema.get_field_index("action")
    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 7)
    pq.write_table(table.set_column(column, table.schema.field(column), values), file)
    argv = command_line(base_folder, folder, tmp_path / "out")
    assert main([*argv, "--use_cpu"]) == 2
    error = capsys.readouterr().err
    assert "not finite" in error
    assert "episode 1 step 2" in error
    assert not (tmp_path / "out").exists()


def test_add_lora_on_named_layers():
    model = add_lora(tiny_llava(), LoraArguments(use_peft=True, lora_r=2, lora_target_modules=["q_proj", "v_proj"]))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"q_proj", "v_proj"}
    with_vision = add_lora(tiny_llava(), LoraArguments(use_peft=True, lora_r=2, lora_vision=True))
    assert any("vision_tower" in name and "lora_" in name for name, _ in with_vision.named_parameters())


def test_trainer_divides_by_every_label(chunks, tmp_path):
    policy = tiny_llava(horizon=2)
    trainer = VLATrainer(policy, arguments(tmp_path / "out"), train_dataset=chunks)
    batch = ActionCollator(policy.prompts)([chunks[4], chunks[5], chunks[6]])
    assert int(trainer._get_num_items_in_batch([batch], torch.device("cpu"))) == int((batch["labels"] != -100).sum())


def test_collator_travels_to_worker_processes_that_are_started_anew(chunks):
    collator = ActionCollator(tiny_llava(horizon=2).prompts)
    again = pickle.loads(pickle.dumps(collator))
    assert torch.equal(again([chunks[0]])["input_ids"], collator([chunks[0]])["input_ids"])


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 0.08), (0.0, 100.0)])
def test_gripper_that_contradicts_the_declared_convention_raises(low, high, tmp_path, base_folder, capsys):
    folder = write_dataset(tmp_path / "robot", gripper=(low, high))
    argv = command_line(base_folder, folder, tmp_path / "out")
    argv += ["--use_cpu", "--max_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true"]
    assert main(argv) == 2
    assert "--gripper_open" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # Said as it is, both states come back exactly.
    assert main([*argv, "--gripper_open", str(high), "--gripper_closed", str(low)]) == 0
    config = AutoModelForActionPrediction.from_pretrained(tmp_path / "out").action_config
    actions = np.zeros((2, 1, 7))
    actions[0, 0, 6], actions[1, 0, 6] = low, high
    assert config.decode(config.encode(actions))[1][:, 0, 6].tolist() == [low, high]


def test_a_new_run_over_an_old_one_is_what_loads(chunks, tmp_path):
    out = tmp_path / "out"
    first = tiny_llava(horizon=2)
    first.save_pretrained(tmp_path / "base")
    first = AutoModelForActionPrediction.from_pretrained(tmp_path / "base")
    fine_tune(
        first, chunks, arguments(out, save_strategy="steps", save_steps=1), lora=LoraArguments(use_peft=True, lora_r=2)
    )
    with pytest.raises(TrainingError, match="not empty"):
        fine_tune(tiny_llava(horizon=2), chunks, arguments(out))
    policy = tiny_llava(horizon=2, seed=5)
    fine_tune(policy, chunks, arguments(out, overwrite_output_dir=True))
    assert not list(out.glob("adapter*")) + list(out.glob("checkpoint-*"))
    again = AutoModelForActionPrediction.from_pretrained(out)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_folder_with_an_adapter_and_a_whole_model_raises(tmp_path):
    tiny_llava().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(VLAActionsError, match="both an adapter and a whole model"):
        AutoModelForActionPrediction.from_pretrained(tmp_path)


def test_resume_with_changed_options_raises(dataset_folder, base_folder, tmp_path, capsys):
    argv = command_line(base_folder, dataset_folder, tmp_path / "o")
    argv += ["--use_cpu", "--max_steps", "2", "--save_steps", "1", "--disable_tqdm", "true"]
    assert main(argv) == 0
    resume = [*argv, "--resume_from_checkpoint", "true", "--max_steps", "3"]
    assert main([*resume, "--norm_mode", "bounds"]) == 2
    assert "['norm_stats']" in capsys.readouterr().err
    assert main([*resume, "--prompt", "do {instruction}"]) == 2
    assert "['prompt']" in capsys.readouterr().err
    assert main(resume) == 0


def test_adapter_training_resumes(chunks, tmp_path):
    lora = LoraArguments(use_peft=True, lora_r=2)

    def run(folder, steps, **kwargs):
        torch.manual_seed(0)
        options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        args = arguments(folder, max_steps=steps, **options, **kwargs)
        model, _ = fine_tune(tiny_llava(horizon=2), chunks, args, lora=lora)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", 4, resume_from_checkpoint="true")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_options_that_a_trained_policy_cannot_change_raise(dataset_folder, tmp_path):
    tiny_llava(horizon=2).save_pretrained(tmp_path / "policy")
    data_args = DataArguments(dataset=str(dataset_folder))
    dataset = open_dataset(data_args)

    def load(model_options=None, **data_options):
        model_args = ModelArguments(model_name_or_path=str(tmp_path / "policy"), **(model_options or {}))
        return load_policy(model_args, DataArguments(dataset=str(dataset_folder), **data_options), dataset, 0)

    for model_options, data_options in (
        ({"prompt": "do {instruction}"}, {}),
        ({"n_bins": 64}, {}),
        ({"action_layout": "tail"}, {}),
        ({"chat": False}, {}),
        ({}, {"horizon": 3}),
    ):
        with pytest.raises(TrainingError, match="leave the option out"):
            load(model_options, **data_options)
    with pytest.raises(TrainingError, match="other statistics under 'my_robot'"):
        load(unnorm_key="my_robot")
    policy, key = load(unnorm_key="second")
    assert (key, policy.action_config.horizon) == ("second", 2)
    policy.save_pretrained(tmp_path / "policy")
    load(unnorm_key="second")
    with pytest.raises(TrainingError, match="other action space under 'second'"):
        load(unnorm_key="second", action_frame="tcp")


@pytest.mark.parametrize(("change", "accepted"), [(1e-13, True), (1e-6, False)])
def test_checkpoints_whose_statistics_were_rounded_otherwise_go_on(change, accepted, dataset_folder, tmp_path):
    options = DataArguments(dataset=str(dataset_folder), unnorm_key="again")
    tiny_llava(horizon=2).save_pretrained(tmp_path / "policy")
    dataset, model_args = open_dataset(options), ModelArguments(model_name_or_path=str(tmp_path / "policy"))
    policy, key = load_policy(model_args, options, dataset, 0)
    config = policy.action_config
    policy.save_pretrained(tmp_path / "policy")
    path = tmp_path / "policy" / "action_config.json"
    content = json.loads(path.read_text())
    mean = content["norm_stats"][key]["action"]["mean"]
    content["norm_stats"][key]["action"]["mean"] = [value * (1 + change) for value in mean]
    path.write_text(json.dumps(content))
    for go_on in (
        lambda: check_same_config(config, str(tmp_path / "policy")),
        lambda: load_policy(model_args, options, dataset, 0),
    ):
        if accepted:
            go_on()
        else:
            with pytest.raises(TrainingError, match=r"norm_stats|other statistics under 'again'"):
                go_on()


@pytest.mark.parametrize("spelled", [["--learning_rate=1e-4"], ["--learning_rate", "1e-4"], []])
def test_learning_rate_that_was_given_is_used(spelled, dataset_folder, base_folder, tmp_path):
    argv = command_line(base_folder, dataset_folder, tmp_path / "o")
    argv += [
        "--use_cpu",
        "--max_steps",
        "1",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "true",
        "--use_peft",
        "--lora_r",
        "2",
    ]
    argv += [
        "--lr_scheduler_type",
        "constant",
        "--logging_steps",
        "1",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
    ]
    assert main([*argv, *spelled]) == 0
    history = json.loads((tmp_path / "o/checkpoint-1/trainer_state.json").read_text())["log_history"]
    assert history[0]["learning_rate"] == pytest.approx(1e-4 if spelled else 5e-4)


def test_adapter_finds_its_base_from_another_folder_and_never_asks_the_hub_for_a_path(chunks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llava(horizon=2).save_pretrained("base")
    policy = AutoModelForActionPrediction.from_pretrained("base")
    fine_tune(policy, chunks, arguments("out"), lora=LoraArguments(use_peft=True, lora_r=2))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    AutoModelForActionPrediction.from_pretrained(tmp_path / "out")
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(VLAActionsError, match="where it is no more"):
        AutoModelForActionPrediction.from_pretrained(tmp_path / "out")


def test_number_of_cameras_is_part_of_the_policy(dataset_folder, base_folder):
    data_args = DataArguments(dataset=str(dataset_folder))
    policy, _ = load_policy(ModelArguments(model_name_or_path=str(base_folder)), data_args, open_dataset(data_args), 0)
    assert policy.action_config.cameras == ("observation.images.top",)
    policy.prepare([picture(0)], INSTRUCTIONS[0])
    with pytest.raises(VLAActionsError, match="1 picture"):
        policy.prepare([picture(0), picture(1)], INSTRUCTIONS[0])


def test_tokenizer_without_a_pad_token_still_makes_batches():
    from tiny import action_config
    from transformers import LlamaForCausalLM

    from hf_vla_actions import to_vla

    policy = tiny_llama()
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    again = to_vla(LlamaForCausalLM(policy.config), tokenizer, action_config(tokenizer))
    assert again.predict_action(**again.prepare(None, [INSTRUCTIONS[0], "go"])).shape == (2, 1, 7)
