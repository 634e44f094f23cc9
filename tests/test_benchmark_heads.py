"""benchmarks/multimodal.py, heads.py and transfusion.py: that they run, count what they say, and show what was measured."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

from hf_vla_actions.evaluate import Rollout

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    for name in ("heads", "transfusion", "tokens"):  # common names: nothing else shall find these
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def world(path):
    return importlib.import_module("multimodal_world")


def straight(world, blocked, aside, max_steps=20):
    """An episode that goes straight on, `aside` meters beside the middle of the wall."""
    setting = world.Setting(blocked=(blocked,), judged=3, max_steps=max_steps)
    first = []

    def predict(observations):
        moves = np.tile([0.0, 0.03], (len(observations), world.HORIZON, 1))
        moves[:, 0, 0] = 0.0 if first else aside
        first.append(True)
        return moves

    (judged,) = world.judge(predict, setting, "straight")
    return judged


def test_the_straight_way_is_blocked_as_far_as_it_says(world):
    for blocked in (0.004, 0.012):
        for side, aside in (("right", 1), ("left", -1)):
            free, stopped = (straight(world, blocked, aside * (blocked + more)) for more in (0.001, -0.001))
            assert free.clean == free.arrived == getattr(free, side) == [0, 1, 2]
            assert not free.touched
            assert stopped.touched == [0, 1, 2]
            assert not stopped.arrived + stopped.clean + stopped.left + stopped.right
    nothing = straight(world, 0.0, 0.0)
    assert nothing.clean == [0, 1, 2]
    assert not nothing.touched


def test_who_slides_along_the_wall_arrives_but_is_not_clean(world):
    calls = []

    def predict(observations):
        calls.append(None)
        moves = np.tile([0.0, 0.03], (len(observations), world.HORIZON, 1))
        moves[:, 0, 0] = 0.01 * (len(calls) == 3)  # after 8 moves at the wall
        return moves

    (judged,) = world.judge(predict, world.Setting(blocked=(0.004,), judged=3), "late")
    assert judged.arrived == judged.touched == judged.right == [0, 1, 2]
    assert not judged.clean


def test_the_edge_of_the_table_is_no_wall(world):
    edge = Rollout(0, actions=[np.array([0.1, 0.0])], poses=[np.array([0.1, 0.0]), np.array([0.15, 0.0])])
    wall = Rollout(0, actions=[np.array([0.1, 0.0])], poses=[np.array([0.0, 0.0]), np.array([0.05, 0.0])])
    assert world.stopped(edge) == 0
    assert world.stopped(wall) == 1


def test_demonstrations_go_round_on_both_sides_and_their_average_does_not(world):
    setting = world.Setting(demonstrations=40)
    shown = world.demonstrate(setting, 0)
    assert set(" ".join(shown.sentences).split()) <= set(world.words(setting))
    told = [sentence.split() for sentence, first in zip(shown.sentences, shown.first, strict=True) if first]
    assert all(x == "x0" and int(y[1:]) < -15 and 12 < int(block[1:]) < 30 for _, x, y, block, _ in told)
    first = shown.actions[shown.first]
    assert len(first) == 40 * len(setting.blocked)
    aside = np.abs(first[..., 0].cumsum(axis=1)).max(axis=1).reshape(len(setting.blocked), -1)
    assert (aside.min(axis=1) > np.array(setting.blocked)).all()
    right = (first[:, 0, 0] > 0).reshape(len(setting.blocked), -1).mean(axis=1)
    assert ((right > 0.25) & (right < 0.75)).all()


def test_the_comparison_runs_goes_on_where_it_stopped_and_prints_its_table(path, tmp_path, capsys):
    multimodal, heads = (importlib.import_module(name) for name in ("multimodal", "heads"))
    output = tmp_path / "quick.json"
    heads.main(["--quick", "--output", str(output)])
    text = capsys.readouterr().out
    assert all(f"\n| {label} |" in text for label, _, _ in heads.variants())
    rows = json.loads((tmp_path / "quick_multimodal.json").read_text())["rows"]
    assert [row["name"] for row in rows] == sorted(heads.POLICIES, key=multimodal.ROWS.index)
    assert [len(row["loss"]) for row in rows] == [
        6 if "longer" in row["name"] else 3 for row in rows
    ]  # of 9 or 3 steps
    again = ["--quick", "--output", str(tmp_path / "quick_multimodal.json"), "--seeds", "0"]
    multimodal.main([*again, "--only", *heads.POLICIES])
    assert json.loads((tmp_path / "quick_multimodal.json").read_text())["rows"] == rows
    short = {**rows[0], "seed": 1}
    multimodal.Results(tmp_path / "quick_multimodal.json", multimodal.QUICK).add(short)
    assert json.loads((tmp_path / "quick_multimodal.json").read_text())["rows"] == [rows[0], short, *rows[1:]]
    with pytest.raises(SystemExit, match="another setting"):
        multimodal.main(["--output", str(tmp_path / "quick_multimodal.json")])
    with pytest.raises(SystemExit):
        heads.main(["--output", str(output)])


def test_a_word_is_the_distance_to_the_block(path, world, tmp_path, capsys):
    transfusion, training = (importlib.import_module(name) for name in ("transfusion", "multimodal_training"))
    transfusion.main(["--quick", "--output", str(tmp_path / "quick.json")])
    assert "1, insulated" in capsys.readouterr().out
    setting = world.Setting(blocked=(0.03,), demonstrations=2)
    shown = world.demonstrate(setting, 0)
    names = [*world.words(setting), *(f"ahead{n}" for n in range(-80, 81))]
    tokenizer = training.tokenizer_of(names)
    bench = training.Bench(setting, 0)
    policy = bench.policy("flow")
    policy.prompts.tokenizer = tokenizer
    spoken = transfusion.Spoken(policy, shown)
    said = tokenizer.convert_ids_to_tokens(spoken.labels[:, -1].tolist())
    for sentence, word in zip(shown.sentences, said, strict=True):
        state = {word[0]: int(word[1:]) for word in sentence.split()[1:]}
        assert word == f"ahead{state['b'] - state['y']}"


def test_beside_execution_inference_may_take_as_many_periods_as_are_executed_or_left(path, world):
    heads = importlib.import_module("heads")
    periods = {n: heads.period(120.0, world.Setting(execute=n)) for n in (1, 4, 6)}
    assert periods == pytest.approx({1: 120.0, 4: 30.0, 6: 60.0})


def test_intervals_are_wilsons(path):
    multimodal = importlib.import_module("multimodal")
    assert multimodal.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert multimodal.wilson(0, 150)[0] == pytest.approx(0.0)


def test_every_row_of_the_files_is_whole(path):
    multimodal = importlib.import_module("multimodal")
    content = json.loads((FOLDER / "multimodal.json").read_text())
    seeds = {name: [row["seed"] for row in content["rows"] if row["name"] == name] for name in multimodal.ROWS}
    assert all(found == [0, 1, 2] for found in seeds.values())
    for row in content["rows"]:
        for wall in [*row["walls"], *row.get("sampled", [])]:
            assert wall["episodes"] >= 50
            assert set(wall["clean"]) == set(wall["arrived"]) - set(wall["touched"])
            assert not set(wall["left"]) & set(wall["right"])


def shown(name):
    """What a cell of the notebook says in a literal of that name."""
    notebook = nbformat.read(FOLDER.parent / "notebooks/6-heads.ipynb", as_version=4)
    (source,) = [cell.source for cell in notebook.cells if re.search(rf"^{name} = ", cell.source, flags=re.MULTILINE)]
    (found,) = [
        node for node in ast.parse(source).body if ast.get_source_segment(source, node).startswith(f"{name} =")
    ]
    return ast.literal_eval(found.value)


def test_what_the_notebook_shows_of_policies_is_what_was_measured(path):
    multimodal = importlib.import_module("multimodal")
    content = json.loads((FOLDER / "multimodal.json").read_text())
    assert [b / 1000 for b in shown("BLOCKED")] == content["setting"]["blocked"]
    measured, told = multimodal.policies(content["rows"]), shown("MEASURED")
    assert list(told) == list(measured)
    for name, seeds in measured.items():
        assert told[name]["clean"] == [[len(wall["clean"]) for wall in walls] for walls in seeds]
        for what in ("touched", "arrived", "left", "right"):
            walls = range(len(content["setting"]["blocked"]))
            assert told[name][what] == [multimodal.count(seeds, wall, what)[0] for wall in walls]


def test_what_the_notebook_shows_of_speed_and_of_words_is_what_was_measured():
    content, told = json.loads((FOLDER / "heads.json").read_text()), shown("SPEED")
    assert list(told) == list(content["ms"])
    for label, (ms, clean) in told.items():
        worth = content["worth"][label]
        assert ms == pytest.approx(content["ms"][label], abs=0.06)
        assert clean == pytest.approx(np.mean(worth["clean"]) / worth["episodes_a_wall"], abs=6e-4)
    rows, told = json.loads((FOLDER / "transfusion.json").read_text())["rows"], shown("SWEEP")
    assert {(weight, insulated) for weight, insulated, *_ in told} == {(r["weight"], r["insulate"]) for r in rows}
    for weight, insulated, *values in told:
        some = [r for r in rows if (r["weight"], r["insulate"]) == (weight, insulated)]
        for name, value in zip(("language_loss", "right_words", "action_loss"), values, strict=True):
            assert value == pytest.approx(np.mean([r[name] for r in some]), abs=6e-5)
