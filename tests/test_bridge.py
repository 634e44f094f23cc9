"""The main job on real data: 20 episodes of a WidowX from BridgeData V2."""

import json

import numpy as np
import pytest
from forked import run_ranks
from test_train import SEVEN
from tiny import save_native_llava

from hf_vla_actions import AutoModelForActionPrediction
from hf_vla_actions.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_native_llava(tmp_path_factory.mktemp("bridge") / "base", seed=3)


@pytest.fixture(scope="module")
def bridge(shared):
    return str(shared / "data/bridge_sample")


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_real_batch_can_be_overfitted_but_not_without_its_pictures(base, bridge, tmp_path, shuffled):
    script = [str(__file__).replace("test_bridge.py", "overfit.py")]
    done = run_ranks([*script, str(base), bridge, str(tmp_path / "out"), str(int(shuffled))], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "out/action_metrics.json").read_text())
    assert metrics["world_size"] == 2
    if shuffled:
        # Given the true x, the rest of the action can be recalled without a picture; x itself cannot.
        assert metrics["train_token_accuracy"] < 0.95
        assert metrics["train_token_accuracy/x"] < 0.6
    else:
        assert metrics["train_token_accuracy"] >= 0.95


def test_the_command_line_trains_and_predicts_on_real_episodes(base, bridge, tmp_path, capsys):
    out = str(tmp_path / "policy")
    argv = [
        "--model_name_or_path",
        str(base),
        "--dataset",
        bridge,
        "--output_dir",
        out,
        "--cameras",
        "image_0",
        "--use_cpu",
    ]
    argv += ["--use_peft", "--lora_r", "8", "--max_steps", "4", "--eval_fraction", "0.2", "--skip_first", "1", *SEVEN]
    argv += ["--save_strategy", "no", "--per_device_train_batch_size", "4"]
    done = run_ranks(["-m", "hf_vla_actions.train", *argv], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    policy = AutoModelForActionPrediction.from_pretrained(out)
    assert sorted(policy.action_config.norm_stats) == ["bridge_sample"]
    assert policy.action_config.space().gripper.dim == "gripper"

    predict = [
        "predict",
        "--policy",
        out,
        "--dataset",
        bridge,
        "--cameras",
        "image_0",
        "--episode",
        "1",
        "--step",
        "4",
    ]
    assert main([*predict, "--constraints", "Range(x, -0.002, 0.002); Fix(gripper, open)"]) == 0
    table = capsys.readouterr().out
    assert "turn lever" in table or "put" in table or "flip" in table
    rows = {line.split()[1]: line.split() for line in table.splitlines() if line.startswith("   0")}
    assert -0.002 <= float(rows["x"][4]) <= 0.002
    assert float(rows["gripper"][4]) == 1.0
    demonstrated = [float(row[-1]) for row in rows.values()]
    from hf_vla_actions.data import LeRobotDataset

    dataset = LeRobotDataset(bridge)
    np.testing.assert_allclose(demonstrated, dataset.actions[dataset.episodes[1].start + 4], atol=6e-6)
