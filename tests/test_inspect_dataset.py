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


def test_mean_and_std_of_the_same_data_are_no_problem_and_those_of_others_are(robot, tmp_path, capsys):
    own = ActionStats.compute(LeRobotDataset(robot).actions, mode="normal")
    for name, mean, std, wrong in (
        ("own", own.mean, own.std, []),
        ("moved", own.mean + 1.5 * own.std * (np.arange(7) == 1), own.std, [1]),
        ("scaled", own.mean, own.std * [0.2, 1, 4, 1, 1, 1, 1], [0, 2]),
    ):
        path = tmp_path / f"{name}.json"
        NormStats({"robot": {"action": ActionStats(mean=mean, std=std, mode="normal")}}).save(path, "hf_vla")
        main(["inspect", robot, "--stats", str(path), "--json"])
        report = json.loads(capsys.readouterr().out)
        assert [f"{NAMES[i]!r} has mean" in " ".join(report["problems"]) for i in range(7)] == [
            i in wrong for i in range(7)
        ]
        assert not any("of other data" in text for text in report["problems"]) or wrong
        assert {d["clipped"] for d in report["dimensions"]} == {0.0}
        assert any("by mean and std" in note for note in report["notes"])


def test_statistics_of_a_file_without_names_need_no_name(robot, tmp_path, capsys):
    wide = ActionStats.from_ranges([-10.0] * 7, [10.0] * 7)
    (tmp_path / "alone.json").write_text(json.dumps({"action": wide.to_dict(), "num_transitions": 5}))
    (tmp_path / "scalars.json").write_text(json.dumps({"norm_min": -10.0, "norm_max": 10.0}))
    for name in ("alone", "scalars"):
        for key in ([], ["--unnorm_key", "any"]):
            assert main(["inspect", robot, "--stats", str(tmp_path / f"{name}.json"), "--json", *key]) in (0, 1)
            first = json.loads(capsys.readouterr().out)["dimensions"][0]
            assert [first["low"], first["high"]] == [-10.0, 10.0]
    two = NormStats({"a": {"action": wide}, "b": {"action": wide}}).save(tmp_path / "two.json")
    assert main(["inspect", robot, "--stats", str(two)]) == 2
    assert "unnorm_key is needed" in capsys.readouterr().err
    assert main(["inspect", robot, "--stats", str(two), "--unnorm_key", "c"]) == 2
    assert "'c' is not among" in capsys.readouterr().err


def test_the_figure_is_drawn(robot, tmp_path):
    figure = tmp_path / "numbers.png"
    main(["inspect", robot, "--figure", str(figure)])
    assert np.asarray(Image.open(figure).convert("L")).std() > 10
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.png"]


def test_a_declaration_that_does_not_fit_raises(robot, capsys):
    assert main(["inspect", robot, "--action_names", "x", "y"]) == 2
    assert "2 action_names" in capsys.readouterr().err
