"""`hf-vla inspect` on the folder of a dataset."""

import json

import numpy as np
import pytest
from PIL import Image
from test_train import NAMES, write_dataset

from hf_vla_actions import ActionStats, NormStats
from hf_vla_actions.cli import main
from hf_vla_actions.data import LeRobotDataset


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    return str(write_dataset(tmp_path_factory.mktemp("inspected") / "robot", episodes=6))


def test_a_dataset_is_told_from_a_checkpoint_and_described(robot, capsys):
    status = main(["inspect", robot, "--action_units", "m", "m", "m", "rad", "rad", "rad", "none"])
    said = capsys.readouterr().out
    dataset = LeRobotDataset(robot)
    assert f"6 episodes, {dataset.n_frames} frames at {dataset.fps:g} Hz" in said
    row = next(line for line in said.splitlines() if line.split()[:1] == [NAMES[0]]).split()
    low, high = np.quantile(dataset.actions[:, 0], [0.01, 0.99])
    assert row[1] == "m"
    assert [float(row[i]) for i in (3, 5)] == [pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3)]
    assert status == int("PROBLEM" in said)


def test_the_report_is_the_same_as_json_wherever_the_options_stand(robot, capsys):
    main(["inspect", robot, "--json"])
    first = json.loads(capsys.readouterr().out)
    main(["inspect", "--json", robot])
    assert json.loads(capsys.readouterr().out) == first
    assert [d["name"] for d in first["dimensions"]] == list(NAMES)


def test_statistics_of_another_robot_are_a_problem_and_exit_1(robot, tmp_path, capsys):
    narrow = ActionStats.from_ranges([-1e-4] * 6 + [0], [1e-4] * 6 + [1], mask=[True] * 6 + [False])
    path = NormStats({"other": {"action": narrow}}).save(tmp_path)
    assert main(["inspect", robot, "--stats", str(path)]) == 1
    assert "of other data" in capsys.readouterr().out


def test_the_figure_is_drawn(robot, tmp_path):
    figure = tmp_path / "numbers.png"
    main(["inspect", robot, "--figure", str(figure)])
    assert np.asarray(Image.open(figure).convert("L")).std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.png"]


def test_a_declaration_that_does_not_fit_raises(robot, capsys):
    assert main(["inspect", robot, "--action_names", "x", "y"]) == 2
    assert "2 action_names" in capsys.readouterr().err
