import json

import numpy as np
import pytest
from PIL import Image

from hf_vla_actions import AutoModelForActionPrediction
from hf_vla_actions.cli import main
from hf_vla_actions.data import LeRobotDataset
from hf_vla_actions.demo.demonstrations import SPACE, write_lerobot_dataset
from hf_vla_actions.demo.judge import text_table
from hf_vla_actions.demo.run import DemoSettings, prove_checkpoint, run_demo
from hf_vla_actions.demo.tiny_vlm import TinyTraining
from hf_vla_actions.demo.world import WorldError
from hf_vla_actions.errors import CheckpointError, VLAActionsError
from hf_vla_actions.models.generation import MODES

SMALL = DemoSettings(TinyTraining(num_episodes=20, max_steps=4), judged=3, max_steps=3)


def test_the_whole_path_runs_and_limits_hold_whatever_was_learned(tmp_path):
    text = run_demo(tmp_path / "demo", SMALL)
    results = json.loads((tmp_path / "demo/results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    bound = [row for name, row in rows.items() if name.startswith("limits")]
    assert len(bound) == len(MODES)
    assert all(row["violations"] == 0 for row in bound)
    assert rows["random actions"]["violations"] > 0, "limits that nobody would break prove nothing"
    assert {"picture blanked", "instruction swapped", "random actions"} < set(rows)
    assert "limits kept by 'transport'" in text
    assert "came back as it was" in text
    with Image.open(tmp_path / "demo/figure.png") as figure:
        assert np.asarray(figure.convert("L")).std() > 10
    with Image.open(tmp_path / "demo/rollout.gif") as movie:
        assert movie.n_frames > 3
    with pytest.raises(VLAActionsError, match="not empty"):
        run_demo(tmp_path / "demo", SMALL)


def test_quick_demo_learns_to_look_and_to_read(tmp_path, capsys):
    assert main(["demo", "--quick", "--output_dir", str(tmp_path / "demo")]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "demo/results.json").read_text())["rows"]}
    free = rows["free"]["success"]
    assert free >= 0.4
    for control in ("picture blanked", "instruction swapped", "random actions"):
        assert rows[control]["success"] <= free - 0.2, control
    assert all(row["violations"] == 0 for name, row in rows.items() if name.startswith("limits"))
    assert "success" in capsys.readouterr().out


def test_demonstrations_are_a_real_dataset_that_says_what_the_expert_wanted(tmp_path):
    dataset = LeRobotDataset(
        write_lerobot_dataset(tmp_path / "data", episodes=9, tasks=("reach", "detour", "push"), seed=3)
    )
    assert len(dataset.episodes) == 9
    assert dataset.action_names == list(SPACE.names)
    assert dataset.fps == SPACE.rate_hz
    assert {text.split()[0] for text in dataset.instructions} == {"move", "go", "push"}
    # Without noise the recorded action is what happened.
    for episode in dataset.episodes:
        states = dataset.states[episode.start : episode.stop]
        moved = np.diff(states[:, :3], axis=0)
        if episode.instruction.startswith("move"):
            np.testing.assert_allclose(dataset.actions[episode.start : episode.stop - 1, :3], moved, atol=1e-6)


def test_noise_disturbs_what_happens_and_not_what_is_written(tmp_path):
    clean, noisy = (
        LeRobotDataset(write_lerobot_dataset(tmp_path / name, episodes=5, seed=1, noise=noise, progress=False))
        for name, noise in (("clean", 0.0), ("noisy", 0.01))
    )
    assert {*np.round(clean.actions[:, :3].ravel(), 6)} >= {*np.round(noisy.actions[:, :3].ravel(), 6)}
    moved = np.diff(noisy.states[noisy.episodes[0].start : noisy.episodes[0].stop, :2], axis=0)
    assert np.abs(moved - noisy.actions[: len(moved), :2]).max() > 1e-3


def test_impossible_recordings_raise_and_leave_nothing(tmp_path):
    with pytest.raises(WorldError, match="at least one episode"):
        write_lerobot_dataset(tmp_path / "a", episodes=0)
    with pytest.raises(WorldError, match="fly"):
        write_lerobot_dataset(tmp_path / "b", episodes=1, tasks=("fly",))
    with pytest.raises(WorldError, match="too rarely"):
        write_lerobot_dataset(tmp_path / "c", episodes=2, noise=10.0)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_come_back_is_noticed_raises(tmp_path):
    from tiny import picture, sharpen, tiny_llava

    policy = sharpen(tiny_llava())
    policy.save_pretrained(tmp_path)
    obs = {"images": picture(0), "instruction": "move to the red block"}
    prove_checkpoint(policy, tmp_path, obs)
    other = sharpen(AutoModelForActionPrediction.from_pretrained(tmp_path), seed=1)
    with pytest.raises(CheckpointError, match="does not come back"):
        prove_checkpoint(other, tmp_path, obs)


def test_table_names_every_row():
    from hf_vla_actions.demo.judge import Row

    text = text_table([Row("a", 0.5, 2, None, 0.25), Row("b", 1.0, 2, 3.5, 0.0)])
    assert "25.0%" in text
    assert "3.5" in text
