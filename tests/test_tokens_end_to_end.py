"""FAST and VQ from a dataset to the robot: the command fits and trains, and what it saved predicts the same wherever it lies."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from local_hub import LocalHub
from test_train import NAMES, command_line, write_dataset
from tiny import save_native_llava

from hf_vla_actions import AutoModelForActionPrediction, FASTActionTokenizer, VQActionTokenizer
from hf_vla_actions.cli import main as hf_vla
from hf_vla_actions.data import open_dataset
from hf_vla_actions.hub import inspect_checkpoint
from hf_vla_actions.train.__main__ import main

torch.set_num_threads(1)
FEW = ["--use_cpu", "--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "true"]
FEW += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3"]
HORIZON = ["--horizon", "8"]
SMALL = {"fast": ["--fast_vocab", "400", "--fast_scale", "12"], "vq": ["--vq_steps", "20"]}
# What a process does that knows the Hub only: load, predict, inspect.
ON_THE_HUB = """
import json, sys
import numpy as np
from hf_vla_actions import AutoModelForActionPrediction
from hf_vla_actions.hub import inspect_checkpoint
found = {}
for repository in sys.argv[2:]:
    vla = AutoModelForActionPrediction.from_pretrained(repository, self_test=False)
    picture = np.load(sys.argv[1])
    actions = vla.predict_action(**vla.prepare([picture], "turn lever vertical to front"))
    report = inspect_checkpoint(repository)
    found[repository] = {"actions": actions.tolist(), "problems": report.problems, "kind": report.kind}
    found[repository] |= {"cached": [note for note in report.notes if "cache" in note], "bins": report.tokens.bins}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_native_llava(tmp_path_factory.mktemp("base") / "llava", seed=3)


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "robot", episodes=5, steps=9)


def first_actions(vla, dataset):
    images = [dataset.frame(0, camera) for camera in dataset.cameras]
    return vla.predict_action(**vla.prepare(images, "turn lever vertical to front"))


@pytest.fixture(scope="module")
def bridge_policies(base, shared, tmp_path_factory):
    """FAST as an adapter and VQ in full, trained for two steps on real episodes."""
    folder = tmp_path_factory.mktemp("bridge")
    bridge = shared / "data/bridge_sample"
    common = [*FEW, *HORIZON, "--cameras", "image_0", "--skip_first", "1", "--eval_fraction", "0.2"]
    for name, kind, more in (
        ("fast_lora", "fast", ["--use_peft", "--lora_r", "4"]),
        ("vq", "vq", []),
    ):
        argv = command_line(base, bridge, folder / name)
        assert main([*argv, *common, "--action_tokenizer", kind, *SMALL[kind], *more]) == 0
    return folder


def test_policies_of_real_episodes_come_back_from_their_folder(bridge_policies, shared):
    dataset = open_dataset(shared / "data/bridge_sample", cameras=["image_0"])
    for name in ("fast_lora", "vq"):
        folder = bridge_policies / name
        one, other = (AutoModelForActionPrediction.from_pretrained(folder, self_test=False) for _ in range(2))
        actions = first_actions(one, dataset)
        assert actions.shape == (1, 8, 7)
        np.testing.assert_array_equal(first_actions(other, dataset), actions)
        report = inspect_checkpoint(str(folder))
        assert not report.problems
        metrics = json.loads((folder / "action_metrics.json").read_text())
        wanted = "eval_malformed_chunks" if name != "vq" else "eval_l1/x"
        assert np.isfinite(metrics[wanted])
        config = one.action_config
        stats = config.stats()
        assert isinstance(config.tokenizer, VQActionTokenizer if name == "vq" else FASTActionTokenizer)
        assert stats.mask.tolist() == [True] * 6 + [False]
        if name != "vq":
            assert config.tokenizer.scale == 12
            longest = max(map(len, config.encode(np.stack([dataset.actions[:8], dataset.actions[10:18]]))))
            assert longest <= config.max_tokens() < 56
    # A merged adapter is a whole policy, tokenizer and budget with it.
    adapter = AutoModelForActionPrediction.from_pretrained(bridge_policies / "fast_lora", self_test=False)
    merged = adapter.merge_and_unload()
    merged.save_pretrained(bridge_policies / "merged")
    alone = AutoModelForActionPrediction.from_pretrained(bridge_policies / "merged", self_test=False)
    assert alone.action_config == adapter.action_config
    np.testing.assert_array_equal(first_actions(alone, dataset), first_actions(merged, dataset))


def test_policies_come_back_from_the_hub(bridge_policies, base, shared, tmp_path):
    dataset = open_dataset(shared / "data/bridge_sample", cameras=["image_0"])
    np.save(tmp_path / "picture.npy", np.asarray(dataset.frame(0, dataset.cameras[0])))
    folders = {"me/base": base}
    for name in ("fast_lora", "vq"):
        folders[f"me/{name}"] = tmp_path / name
        shutil.copytree(bridge_policies / name, tmp_path / name)
        adapter = tmp_path / name / "adapter_config.json"
        if adapter.is_file():  # as pushed: its base is a repository too
            values = json.loads(adapter.read_text())
            adapter.write_text(json.dumps({**values, "base_model_name_or_path": "me/base"}))
    with LocalHub(folders) as hub:
        names = ["me/fast_lora", "me/vq"]
        done = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB, str(tmp_path / "picture.npy"), *names],
            env={**os.environ, **hub.environment(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=tmp_path / "vq",  # a folder of another name than any repository
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("fast_lora", "vq"):
        here = AutoModelForActionPrediction.from_pretrained(bridge_policies / name, self_test=False)
        there = found[f"me/{name}"]
        np.testing.assert_array_equal(there["actions"], first_actions(here, dataset))
        assert there["problems"] == there["cached"] == []
        assert there["kind"] == ("policy" if name == "vq" else "adapter of a policy")
    bins = [found[f"me/{name}"]["bins"] for name in ("fast_lora", "vq")]
    assert bins == ["none (FAST at scale 12)", "none (VQ, 4 codes a chunk)"]
    for name in ("fast_lora/resolve/main/fast_tokenizer.json", "vq/resolve/main/vq_tokenizer.safetensors"):
        assert any(path.endswith(name) for path in hub.asked), name


def test_forty_four_joints_of_a_humanoid_most_of_them_still(base, shared, tmp_path):
    """LeRobot v2.0; 25 of its 44 dimensions never move."""
    folder = shared / "data/groot_demo_v2/demo_data/robot_sim.PickNPlace"
    assert main([*command_line(base, folder, tmp_path / "out"), *FEW, *HORIZON, "--action_tokenizer", "fast"]) == 0
    vla = AutoModelForActionPrediction.from_pretrained(tmp_path / "out", self_test=False)
    dataset = open_dataset(folder)
    actions = first_actions(vla, dataset)
    assert actions.shape == (1, 8, 44)
    stats = vla.action_config.stats()
    still = stats.constant
    assert still.sum() == 25
    np.testing.assert_array_equal(actions[0][:, still], np.broadcast_to(dataset.actions[0][still], (8, 25)))
    assert vla.action_config.max_tokens() < 8 * 44 / 2
    # Demonstrated chunks fit into the budget, and come back as exactly as the scale says.
    chunks = np.stack([dataset.actions[i : i + 8] for i in range(0, 200, 8)])
    ids = vla.action_config.encode(chunks)
    assert max(map(len, ids)) <= vla.action_config.max_tokens()
    normalized = vla.action_config.decode(ids)[0]
    assert np.abs(normalized - stats.normalize(chunks)).max() < 0.15


def test_a_training_fits_what_the_command_fits(robot, base, tmp_path):
    split = ["--eval_fraction", "0.2", "--seed", "7", "--skip_first", "1"]
    argv = ["fit-fast", "--dataset", str(robot), *HORIZON, "--output", str(tmp_path / "fast"), "--no_table", *split]
    assert hf_vla([*argv, "--vocab_size", "300", "--scale", "8"]) == 0
    common = [*FEW, *HORIZON, *split, "--max_steps", "1"]
    ways = (["fast", "--fast_vocab", "300", "--fast_scale", "8"], [str(tmp_path / "fast")])
    configs = []
    for i, way in enumerate(ways):
        out = tmp_path / f"policy_{i}"
        assert main([*command_line(base, robot, out), *common, "--action_tokenizer", *way]) == 0
        configs.append(AutoModelForActionPrediction.from_pretrained(out, self_test=False).action_config)
    assert configs[0] == configs[1]
    assert configs[0].tokenizer == FASTActionTokenizer.from_pretrained(tmp_path / "fast")


def refused(argv, capsys, message):
    capsys.readouterr()
    assert main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--action_tokenizer", "fast", "--n_bins", "64"], "--n_bins is for bins"),
        (["--action_tokenizer", "vq", "--n_bins", "64"], "--n_bins is for bins"),
        (["--fast_scale", "10"], "--action_tokenizer fast"),
        (["--action_tokenizer", "vq", "--fast_vocab", "300"], "--action_tokenizer fast"),
        (["--action_tokenizer", "fast", "--vq_steps", "10"], "--action_tokenizer vq"),
        (["--action_tokenizer", "fast", "--action_layout", "per_dimension"], "whole chunks"),
        (["--action_layout", "pi0_fast"], "--action_tokenizer fast"),
        (["--action_tokenizer", "fast", "--action_layout", "named"], "belong together"),
        (["--action_tokenizer", "fast", "--named_tokens", "<a{}>"], "belong together"),
        (["--action_tokenizer", "fast", "--fast_vocab", "20"], "--fast_vocab 1024"),
        (["--action_tokenizer", "fast", "--fast_scale", "-1"], "scale"),
        (["--action_tokenizer", "vq", "--vq_steps", "0"], "steps"),
        (["--action_tokenizer", "./nowhere"], "there is no folder ./nowhere"),
        (["--action_tokenizer", "fsat"], "fsat"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_weights_load(
    options, message, base, robot, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    shutil.copy(base / "config.json", tmp_path / "empty")  # its missing weights would be the error otherwise
    argv = command_line(tmp_path / "empty", robot, tmp_path / "out")
    refused([*argv, *FEW, *HORIZON, *options], capsys, message)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def fitted(robot, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    argv = ["--dataset", str(robot), *HORIZON, "--eval_fraction", "0"]
    assert hf_vla(["fit-fast", *argv, "--output", str(folder / "fast"), "--no_table"]) == 0
    small = ["--steps", "5", "--codebook_size", "8", "--n_codebooks", "2", "--hidden", "16"]
    assert hf_vla(["fit-vq", *argv, "--output", str(folder / "vq"), *small]) == 0
    return folder


@pytest.mark.parametrize("kind", ["fast", "vq"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--norm_mode", "bounds"], "normalization bounds_q99, of this training bounds"),
        (["--gripper", "none"], "dimensions that are not normalized [6], of this training []"),
        (["--dataset", "half"], "'x' (m, delta) -0.0"),
        (["--dataset", "narrow"], "dimensions 7, of this training 3"),
    ],
)
def test_tokenizer_of_another_space_is_refused(kind, options, message, fitted, base, robot, tmp_path, capsys):
    if options[0] == "--dataset":  # half: the first three episodes' worth of x is twice as wide
        options, name = [], options[1]
        other = write_dataset(
            tmp_path / name, episodes=5, steps=9, names=("a", "b", "c") if name == "narrow" else NAMES
        )
        if name == "half":
            scale_column(other, 0, 2.0)
            options = ["--action_units", "m", "m", "m", "rad", "rad", "rad", "none", "--action_kind", "delta"]
    else:
        other = robot
    argv = [*command_line(base, other, tmp_path / "out"), *FEW, *HORIZON]
    refused([*argv, "--action_tokenizer", str(fitted / kind), *options], capsys, message)


def scale_column(folder, column, factor):
    """Change the actions of a dataset in place."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in (folder / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        actions = np.array(table["action"].to_pylist())
        actions[:, column] *= factor
        at = table.schema.get_field_index("action")
        values = pa.array(actions.tolist(), type=table.schema.field(at).type)
        pq.write_table(table.set_column(at, table.schema.field(at), values), file)


def test_slightly_other_ranges_are_said_and_used(fitted, base, tmp_path, caplog):
    other = write_dataset(tmp_path / "robot", episodes=5, steps=9)
    scale_column(other, 1, 1.02)
    argv = [*command_line(base, other, tmp_path / "out"), *FEW, *HORIZON, "--action_tokenizer", str(fitted / "fast")]
    assert main(argv) == 0
    assert "ranges that differ by up to 1 %" in caplog.text  # 2 % of a bound, of a range of both


def test_a_trained_policy_keeps_its_tokenizer(fitted, base, robot, tmp_path, capsys):
    first = [*command_line(base, robot, tmp_path / "a"), *FEW, *HORIZON, "--action_tokenizer", str(fitted / "fast")]
    assert main(first) == 0
    again = [*command_line(tmp_path / "a", robot, tmp_path / "b"), *FEW, "--unnorm_key", "other"]
    for options, message in (
        (["--action_tokenizer", "vq"], "another action tokenizer (fast)"),
        (["--action_tokenizer", str(fitted / "vq")], "another action tokenizer (fast)"),
        (["--fast_vocab", "300"], "leave --fast_vocab out"),
        (["--named_tokens", "<a{}>"], "--named_tokens"),
    ):
        refused([*again, *options], capsys, message)
    assert main([*again, "--action_tokenizer", str(fitted / "fast")]) == 0
    config = AutoModelForActionPrediction.from_pretrained(tmp_path / "b", self_test=False).action_config
    assert sorted(config.token_budget) == ["other", "robot"]


def test_the_log_says_what_was_fitted(base, robot, tmp_path, caplog):
    argv = [*command_line(base, robot, tmp_path / "out"), *FEW, *HORIZON, "--action_tokenizer", "fast"]
    assert main(argv) == 0
    for words in (
        "fitting a FAST tokenizer to 45 chunks of 5 episodes",
        "a chunk instead of 56",
        "a chunk of 'robot' may take",
    ):
        assert words in caplog.text
