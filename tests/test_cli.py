import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import write_dataset
from tiny import picture, sharpen, tiny_llama, tiny_llava

from hf_vla_actions.cli import COMMANDS, main
from hf_vla_actions.constraints import Fix, InSet, Range
from hf_vla_actions.constraints.text import parse_constraints
from hf_vla_actions.errors import ConstraintError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    sharpen(tiny_llava(horizon=2)).save_pretrained(folder / "policy")
    write_dataset(folder / "robot", episodes=2)
    Image.fromarray(picture(0)).save(folder / "frame.png")
    return folder


def test_command_is_installed_and_lists_its_rooms():
    done = subprocess.run(
        [sys.executable, "-m", "hf_vla_actions.cli", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    for name in COMMANDS:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_is_complete_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert "--" in text


def test_unknown_command_raises_exit_status_2(capsys):
    assert main(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.parametrize(
    "missing", ["import some_package_that_nobody_has", "import some_package_that_nobody_has.part"]
)
def test_only_foreign_packages_are_to_be_installed(missing, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "room_of_a_test.py").write_text(missing)
    monkeypatch.setitem(COMMANDS, "fly", ("room_of_a_test", ""))
    assert main(["fly"]) == 2
    assert "needs the package 'some_package_that_nobody_has'" in capsys.readouterr().err
    monkeypatch.setitem(COMMANDS, "fly", ("hf_vla_actions.no_such_part", ""))
    with pytest.raises(ModuleNotFoundError, match="hf_vla_actions"):
        main(["fly"])


def column(text, name):
    """(horizon, dof) of one column of the printed table."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("step"))
    index = lines[head].split().index(name)
    return np.array([float(line.split()[index]) for line in lines[head + 1 :]]).reshape(-1, 7)


@pytest.mark.parametrize("mode", ["project", "transport", "mask"])
def test_predict_prints_free_and_bound_actions_beside_the_demonstration(place, capsys, mode):
    argv = [
        "predict",
        "--policy",
        str(place / "policy"),
        "--dataset",
        str(place / "robot"),
        "--episode",
        "1",
        "--step",
        "2",
    ]
    assert main([*argv, "--mode", mode, "--constraints", "Range(x, 0.002, 0.006); Fix(gripper, closed)"]) == 0
    text = capsys.readouterr().out
    free, bound, shown = (column(text, name) for name in ("free", mode, "demonstrated"))
    assert free.shape == bound.shape == shown.shape == (2, 7)
    assert ((bound[:, 0] >= 0.002) & (bound[:, 0] <= 0.006)).all()
    assert (bound[:, 6] == 0).all()
    assert (free[:, 0] != bound[:, 0]).any()


def test_predict_on_a_picture_and_on_text_alone(place, capsys):
    argv = ["predict", "--image", str(place / "frame.png"), "--instruction", "move to the red block"]
    assert main([*argv, "--policy", str(place / "policy")]) == 0
    assert column(capsys.readouterr().out, "free").shape == (2, 7)
    sharpen(tiny_llama()).save_pretrained(place / "text")
    assert main([*argv, "--policy", str(place / "text")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nowhere"], "nowhere"),
        ([], "either --dataset or --image"),
        (["--image", "frame.png"], "needs --instruction"),
        (["--image", "no.png", "--instruction", "go"], "no picture"),
        (["--dataset", "robot", "--episode", "9"], "episode 9"),
        (["--dataset", "robot", "--step", "99"], "step 99"),
        (["--dataset", "robot", "--cameras", "wrist"], "wrist"),
        (["--dataset", "robot", "--unnorm_key", "mine"], "my_robot"),
        (["--dataset", "robot", "--constraints", "Fix(x, 0.1)"], "needs at least 4 steps"),
        (["--dataset", "robot", "--constraints", "Range(xx, 0, 1)"], "xx"),
        (["--dataset", "robot", "--constraints", "Rnge(x, 0, 1)"], "Range"),
    ],
)
def test_predict_refuses_in_one_line_raises(place, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    assert main(["predict", "--policy", "policy", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_constraints_are_read_as_written():
    found = parse_constraints(
        "Range(x, -0.005, high=0.005, steps=[0, 1]); InSet(y, [0.0, 1e-2]); Fix('gripper', open);"
    )
    assert found == [Range("x", -0.005, 0.005, steps=[0, 1]), InSet("y", [0.0, 0.01]), Fix("gripper", "open")]


def test_policy_in_a_folder_that_does_not_exist_raises_without_asking_the_hub(capsys):
    assert main(["predict", "--policy", "./nowhere", "--image", "a.png", "--instruction", "go"]) == 2
    assert "there is no folder ./nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "Range", "Range(x", "open('f')", "Range(x, __import__('os'))", "Range(x, 1, 2, 3, 4, 5)", "1 + 1"]
)
def test_anything_else_is_refused_and_nothing_is_executed_raises(text):
    with pytest.raises(ConstraintError):
        parse_constraints(text)


def test_predict_refuses_a_policy_that_does_not_look_unless_told_to(tmp_path, capsys):
    policy = tiny_llava()
    with torch.no_grad():
        for parameter in policy.model.multi_modal_projector.parameters():
            parameter.zero_()
    policy.save_pretrained(tmp_path / "blind")
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    argv = ["predict", "--policy", str(tmp_path / "blind"), "--image", str(tmp_path / "a.png"), "--instruction", "go"]
    assert main(argv) == 2
    assert "picture does not change what this policy does" in capsys.readouterr().err
    assert main([*argv, "--no_self_test"]) == 0
