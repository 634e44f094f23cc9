"""The functions of benchmarks/constraint_modes.py: what its table rests on."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_llava

from hf_vla_actions.evaluate import Rollout

FILE = Path(__file__).parents[1] / "benchmarks/constraint_modes.py"
BOX = ((-0.105, -0.105, 0.05), (0.105, 0.105, 0.16))


@pytest.fixture(scope="module")
def modes():
    spec = importlib.util.spec_from_file_location("constraint_modes", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["constraint_modes"] = module
    spec.loader.exec_module(module)
    return module


def test_broken_steps_are_those_that_are_too_long_or_end_outside(modes):
    actions = [np.array([0.03, 0.04, 0, 0, 0, 9, 9.0]), np.array([0.0, 0.02, 0, 0, 0, 0, 0])]
    poses = [np.zeros(7), actions[0], actions[0] + actions[1]]
    episode = Rollout(0, actions=actions, poses=poses)
    assert modes.Limit("none").broken(episode).tolist() == [False, False]
    assert modes.Limit("axis", step=0.04).broken(episode).tolist() == [False, False]
    assert modes.Limit("axis", step=0.03).broken(episode).tolist() == [True, False]
    assert modes.Limit("length", step=0.045, length=True).broken(episode).tolist() == [True, False]
    assert modes.Limit("box", box=((-1, -1, -1), (1, 0.05, 1))).broken(episode).tolist() == [False, True]


def test_half_of_the_steps_break_the_limit_that_is_found(modes):
    few = np.repeat([0.03, 0.0424, 0.052], [25, 60, 15])
    assert 0.03 < modes.half_limit(few) < 0.0424
    assert modes.half_limit(np.append(np.full(10, 0.03), 0.0)) == pytest.approx(0.01)
    many = np.random.default_rng(0).uniform(0.0, 0.01, 1000)
    assert (many > modes.half_limit(many)).mean() == pytest.approx(0.5, abs=0.02)


def test_sign_test(modes):
    assert modes.sign_test([1, 2, 3], [1, 2, 3]) == (0, 0, 1.0)
    assert modes.sign_test(range(5), []) == (5, 0, 2 / 32)
    assert modes.sign_test([1], [2, 3, 4]) == (1, 3, pytest.approx(10 / 16))


@pytest.mark.parametrize("horizon", [1, 2])
def test_limited_rows_of_any_policy_break_nothing_and_are_compared_in_pairs(modes, horizon):
    policy = tiny_llava(horizon=horizon)
    world = replace(modes.TABLETOP, max_steps=(2, 2))
    seeds = range(3)
    free = world.run(policy, "free", modes.Limit("none"), seeds, horizon)
    assert len(world.limits(free)) == 4
    for limit in (modes.Limit("length", step=0.01, length=True), modes.Limit("both", step=0.01, box=BOX)):
        done = {mode: world.run(policy, mode, limit, seeds, horizon) for mode in modes.MODES}
        rows = modes.compare([modes.summarize("tiny", limit, m, e) for m, e in {"free": free, **done}.items()])
        assert [row.mode for row in rows] == ["free", *modes.MODES]
        assert all(row.broken == 0 for row in rows if row.mode != "free"), limit
        assert len(modes.table(rows).splitlines()) == 2 + len(rows)
