"""Options in files, and the record that a training leaves."""

import json

import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import SEVEN, write_dataset
from tiny import save_native_llava

from hf_vla_actions.config import ActionConfig
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.train.__main__ import main, parse
from hf_vla_actions.train.config_file import take_config
from hf_vla_actions.train.record import training_record
from hf_vla_actions.train.summary import summary_of
from hf_vla_actions.train.throughput import Throughput

KNOWN = ["model_name_or_path", "dataset", "output_dir", "lora_r", "cameras", "learning_rate", "chat", "use_cpu"]
CONTENT = {
    "model_name_or_path": "m",
    "dataset": "d",
    "output_dir": "o",
    "use_cpu": True,
    "use_peft": True,
    "chat": False,
    "lora_r": 8,
    "cameras": ["a", "b"],
    "learning_rate": 1e-3,
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "unnorm_key": None,
    "warmup_steps": 3,
    "gripper": "-1",
}


def write(folder, content, name):
    text = json.dumps(content) if name.endswith("json") else yaml.safe_dump(content, sort_keys=False)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("name", ["c.yaml", "c.yml", "c.json"])
def test_a_file_says_what_the_command_line_would(name, tmp_path):
    asked = parse([write(tmp_path, CONTENT, name)])
    assert (asked.lora.lora_r, asked.lora.use_peft, asked.model.chat) == (8, True, False)
    assert (asked.data.cameras, asked.data.unnorm_key, asked.data.gripper) == (["a", "b"], None, "-1")
    assert (asked.args.learning_rate, asked.args.warmup_steps) == (1e-3, 3)
    assert asked.args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert asked.config_file.content["cameras"] == ["a", "b"]
    said = {key for key, value in CONTENT.items() if value is not None}
    assert set(asked.options) == said


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(tmp_path):
    path = write(tmp_path, {**CONTENT, "recipe": "robovlms-lora"}, "c.yaml")
    asked = parse([path, "--lora_r", "2", "--cameras", "c", "--chat"])
    assert (asked.lora.lora_r, asked.data.cameras, asked.model.chat) == (2, ["c"], True)
    assert (asked.args.learning_rate, asked.lora.lora_alpha, asked.data.horizon) == (1e-3, 16, 10)


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\nlora-r: 3\n")
    asked = parse(
        [str(tmp_path / "c.yaml"), "--model_name_or_path", "m", "--dataset", "d", "--output_dir", "o", "--use_cpu"]
    )
    assert (asked.args.learning_rate, asked.lora.lora_r) == (1e-4, 3)


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("lora_rank: 3", "c.yaml", "lora_r"),
        ('{"lora_r": 1, "lora_r": 2}', "c.json", "twice"),
        ("lora_r: 1\nlora_r: 2", "c.yaml", "twice"),
        ("- lora_r", "c.yaml", "list"),
        ("", "c.yaml", "NoneType"),
        ("{", "c.json", "cannot be read"),
        ("a: [", "c.yaml", "cannot be read"),
        ("lora_r: 1", "c.toml", "ends in"),
        ("dataset: 2020-01-01", "c.yaml", "quotes"),
        ("lora_r: three", "c.yaml", "invalid int"),
        ("lora_r: true", "c.yaml", "invalid int"),
        ("recipe: openvla", "c.yaml", "invalid choice"),
    ],
)
def test_files_that_say_nothing_useful_raise(text, name, message, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    argv = ["--model_name_or_path", "m", "--dataset", "d", "--output_dir", "o", "--use_cpu"]
    assert main([str(tmp_path / name), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_rank", "3"], "'lora_r'"),
        (["--nonsense_beyond_any=3"], "--help"),
        (["stray"], "stray"),
        (["--lora_r", "0"], "rank of at least 1"),
        (["--load_in_4bit"], "--use_peft"),
        (["--bf16", "--fp16"], "bf16"),
    ],
)
def test_options_that_are_not_possible_raise(argv, message, capsys):
    base = ["--model_name_or_path", "m", "--dataset", "d", "--output_dir", "o", "--use_cpu"]
    assert main([*base, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(TrainingError, match="cannot be read"):
        take_config([str(tmp_path / "none.yaml")], KNOWN)


@given(
    st.dictionaries(
        st.sampled_from(["dataset", "learning_rate", "cameras"]),
        st.one_of(
            st.text("ab -=:'\"\\{}[]#", min_size=1), st.lists(st.text("abc", min_size=1), min_size=1), st.none()
        ),
    )
)
@settings(max_examples=50, deadline=None)
def test_arguments_hold_the_values_of_the_file(tmp_path_factory, content):
    path = write(tmp_path_factory.mktemp("c"), content, "c.yaml")
    argv, _ = take_config([path, "--lora_r", "1"], KNOWN)
    expected = []
    for name, value in content.items():
        if isinstance(value, list):
            expected += [f"--{name}", *value]
        elif value is not None:
            expected.append(f"--{name}={value}")
    assert argv == [*expected, "--lora_r", "1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    write_dataset(folder / "robot", episodes=3, steps=4)
    save_native_llava(folder / "llava", seed=3)
    content = {"use_peft": True, "recipe": "robovlms-lora", "horizon": 2, "hub_token": "secret-of-mine", "lora_r": 64}
    argv = ["--model_name_or_path", str(folder / "llava"), "--dataset", str(folder / "robot"), "--use_cpu", *SEVEN]
    argv += ["--output_dir", str(folder / "out"), "--max_steps", "3", "--save_strategy", "no", "--logging_steps", "1"]
    argv += ["--lora_alpha", "8", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    assert main([write(folder, content, "c.yaml"), *argv]) == 0
    return folder


def test_the_record_says_what_was_trained(trained):
    text = (trained / "out/training.json").read_text()
    record = json.loads(text)
    options = record["options"]
    assert (record["recipe"], record["steps"], record["world_size"], record["batch_size"]) == (
        "robovlms-lora",
        3,
        1,
        4,
    )
    assert (record["dataset"], record["unnorm_key"], record["seed"]) == (str(trained / "robot"), "robot", 42)
    assert record["learning_rate"] == 2e-5
    assert (options["lora_r"], options["lora_alpha"], options["horizon"]) == (64, 8, 2), "yours over the file over it"
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["transformers"] == transformers.__version__
    assert record["config_file"]["content"]["horizon"] == 2
    assert "secret-of-mine" not in text
    assert "n_bins" in options, "of the recipe"
    assert "output_dir" not in options
    assert options["action_units"] == ["m", "m", "m", "rad", "rad", "rad", "none"]


def test_the_record_holds_what_was_said_even_where_it_is_the_default(trained, tmp_path):
    asked = parse(
        [
            "--output_dir",
            str(tmp_path),
            "--dataset",
            "d",
            "--model_name_or_path",
            "m",
            "--gripper_open",
            "1",
            "--use_cpu",
        ]
    )
    groups = [asked.model, asked.data, asked.lora, asked.args]
    record = training_record(asked.options, groups, recipe=None, config_file=None, steps=1, unnorm_key="d")
    assert record["options"]["gripper_open"] == 1.0
    assert "gripper_closed" not in record["options"]


def test_the_last_lines_say_how_well_it_predicts(trained):
    config = ActionConfig.from_pretrained(trained / "out")
    metrics = {"eval_token_accuracy": 0.25, "eval_l1/x": 0.0125, "eval_l1/gripper": 0.5, "train_l1/x": float("nan")}
    names = config.space("robot").names
    assert summary_of(metrics, config, ["robot"]) == (
        f"held-out episodes, each token told those before: 25.0% of the tokens, {names[0]} off by 0.0125 m, "
        f"{names[6]} off by 0.5\n"
    )
    mixed = {f"eval_robot_{name.removeprefix('eval_')}": value for name, value in metrics.items()}
    assert summary_of(mixed, config, ["robot", "robot"]).startswith("held-out episodes of robot, each")
    said = json.loads((trained / "out/action_metrics.json").read_text())
    text = summary_of(said, config, ["robot"])
    assert text.startswith("a sample of what it saw")
    assert text.count(" off by ") == len(names)


def test_an_old_record_does_not_outlive_its_weights(trained, tmp_path):
    from hf_vla_actions.train.run import OWN_FILES

    assert "training.json" in OWN_FILES


def test_throughput_is_what_the_clock_says(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("hf_vla_actions.train.throughput.time.perf_counter", lambda: now[0])
    clock = Throughput()
    clock.on_train_begin(None, None, None)
    for wait, work, samples in ((50.0, 50.0, 4), (1.0, 3.0, 4), (3.0, 1.0, 2)):
        with clock.waiting():
            now[0] += wait
        clock.count(samples)
        now[0] += work
        clock.on_step_end(None, None, None)
        now[0] += 100.0  # an evaluation
        if samples == 4 and wait == 1.0:
            assert clock.numbers(2, since_shown=True) == {"samples_per_second": 2.0, "data_wait": 0.25}
    assert clock.numbers() == {"samples_per_second": 0.75, "data_wait": 0.5}, "without the first step"
    assert clock.numbers(since_shown=True) == {"samples_per_second": 0.5, "data_wait": 0.75}
    assert Throughput().numbers() == {}


def test_a_dataset_that_is_slow_is_told_of(trained, tmp_path, caplog):
    import time

    from test_train import arguments
    from tiny import tiny_llava

    from hf_vla_actions.data import ChunkDataset, LeRobotDataset
    from hf_vla_actions.train import fine_tune

    class Slow(ChunkDataset):
        def __getitem__(self, index):
            time.sleep(0.05)
            return super().__getitem__(index)

    chunks = Slow(LeRobotDataset(trained / "robot"), 2)
    logged = []

    class Keep(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            logged.append(logs)

    args = arguments(tmp_path / "out", max_steps=3, logging_steps=1)
    fine_tune(tiny_llava(horizon=2), chunks, args, callbacks=[Keep()])
    lines = [entry for entry in logged if "loss" in entry]
    assert "data_wait" not in lines[0], "the first step is not counted"
    # The last batch is there before its step: accelerate looks one batch ahead.
    assert lines[1]["data_wait"] > 0.2
    assert 0 < lines[1]["samples_per_second"] < 20
    assert "--dataloader_num_workers" in caplog.text
