"""Retimed chunks against what they promise: the path, the limit, the gripper; and nothing where nothing is wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vla_actions.actions import ActionSpace, Gripper
from hf_vla_actions.constraints.retime import RetimedChunk, retime
from hf_vla_actions.errors import ConstraintError, VLAActionsError
from hf_vla_actions.runtime import RecedingHorizon

DELTA = ActionSpace(["x", "y", "yaw", "grip"], delta=(True, True, True, False), gripper=Gripper("grip"))
MIXED = ActionSpace(["x", "joint", "grip"], delta=(True, False, False), gripper=Gripper("grip"))


def within(limit, dims=slice(0, 2)):
    return lambda actions: np.linalg.norm(actions[:, dims], axis=1) <= limit


chunks = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).normal(size=(5, 4)) * np.random.default_rng(seed).choice([0.0, 0.02, 1.0])
)


@settings(deadline=None, max_examples=100)
@given(chunk=chunks, limit=st.floats(0.05, 3.0))
def test_parts_add_up_keep_the_limit_and_there_are_no_more_than_needed(chunk, limit):
    done = retime(chunk, DELTA, within(limit), max_parts=200)
    assert done.stuck == ()
    assert within(limit)(done.actions).all()
    for step, whole in enumerate(chunk):
        parts = done.actions[done.decoded_step == step]
        np.testing.assert_allclose(parts[:, :3].sum(axis=0), whole[:3], atol=1e-12)
        assert (parts[:, 3] == whole[3]).all(), "the gripper acts where it did"
        assert len(parts) == 1 or not within(limit)(whole[None] / (len(parts) - 1)).any()


def test_what_is_allowed_stays_bit_by_bit():
    chunk = np.random.default_rng(0).normal(size=(6, 4))
    done = retime(chunk, DELTA, within(100.0))
    assert done.actions.tobytes() == chunk.tobytes()
    assert done.decoded_step.tolist() == list(range(6))
    assert done.actions is not chunk


def test_only_steps_that_are_too_long_are_split():
    chunk = np.array([[0.1, 0.0, 0.0, 1.0], [0.3, 0.4, 0.3, 0.0], [0.0, 0.1, 0.0, 0.0]])
    done = retime(chunk, DELTA, within(0.2))
    assert done.decoded_step.tolist() == [0, 1, 1, 1, 2]
    np.testing.assert_allclose(done.actions[1:4], [[0.1, 0.4 / 3, 0.1, 0.0]] * 3, atol=1e-15)
    assert done.first(1).tolist() == [[0.1, 0.0, 0.0, 1.0]]
    assert len(done.first(2)) == 4
    assert len(done.first(None)) == len(done.first(3)) == 5
    assert done.n_decoded == 3


def test_targets_are_approached_on_a_line_and_reached_exactly():
    chunk = np.array([[0.0, 0.7, 1.0], [0.0, 0.1, 0.0]])
    asked = []

    def near(actions):
        asked.append(actions.copy())
        return (actions[:, 1] <= 0.5) | (np.abs(actions[:, 0]) < 0.2)

    assert retime(chunk, MIXED, near, last_action=np.zeros(3)).actions.tolist() == chunk.tolist()
    chunk[0, 0] = 0.3  # now the part that ends at 0.7 must be shorter in x
    done = retime(chunk, MIXED, near, last_action=np.array([9.0, 0.1, 9.0]))
    assert done.decoded_step.tolist() == [0, 0, 1]
    np.testing.assert_allclose(done.actions[:2], [[0.15, 0.4, 1.0], [0.15, 0.7, 1.0]], atol=1e-15)
    assert done.actions[1, 1] == 0.7
    assert done.actions[2].tolist() == chunk[1].tolist()


def test_a_step_that_no_splitting_helps_is_left_and_named():
    chunk = np.array([[0.1, 0.0, 0.0, 1.0], [5.0, 0.0, 0.0, 1.0]])
    done = retime(chunk, DELTA, within(0.2), max_parts=4)
    assert done.stuck == (1,)
    assert done.actions.tolist() == chunk.tolist()
    assert retime(chunk, DELTA, within(0.2), max_parts=1).stuck == (1,)
    assert retime(chunk, DELTA, within(0.2), max_parts=25).stuck == ()
    never = retime(chunk, DELTA, lambda actions: np.zeros(len(actions), bool))
    assert never.stuck == (0, 1)


@pytest.mark.parametrize(
    ("chunk", "space", "options", "message"),
    [
        (np.zeros((2, 3)), DELTA, {}, "shape"),
        (np.zeros((0, 4)), DELTA, {}, "shape"),
        (np.full((2, 4), np.nan), DELTA, {}, "NaN"),
        (np.zeros((2, 4)), DELTA, {"max_parts": 0}, "max_parts"),
        (np.zeros((2, 3)), MIXED, {}, r"\['joint'\] are targets"),
        (np.zeros((2, 3)), MIXED, {"last_action": np.zeros(2)}, "last_action"),
        (np.zeros((2, 2)), ActionSpace(["a", "b"], delta=(True, None)), {}, r"\['b'\]"),
    ],
)
def test_what_cannot_be_retimed_raises(chunk, space, options, message):
    with pytest.raises(ConstraintError, match=message):
        retime(chunk, space, lambda actions: np.ones(len(actions), bool), **options)


@pytest.mark.parametrize("answer", [lambda a: True, lambda a: np.ones(len(a)), lambda a: np.ones((len(a), 1), bool)])
def test_an_answer_that_is_no_mask_raises(answer):
    with pytest.raises(ConstraintError, match="step_allowed takes"):
        retime(np.zeros((2, 4)), DELTA, answer)


@pytest.mark.parametrize("steps", [[], [1], [0, 2], [0, 1, 0]])
def test_decoded_steps_that_do_not_count_up_raise(steps):
    with pytest.raises(ConstraintError, match="count up"):
        RetimedChunk(np.zeros((len(steps), 2)), np.array(steps, dtype=np.int64))


@pytest.mark.parametrize(("execute", "looks"), [(1, [0, 2, 4, 6]), (2, [0, 3, 6]), (None, [0, 4])])
def test_a_policy_looks_again_after_decoded_steps(execute, looks):
    chunk = RetimedChunk(np.array([[1.0], [1.0], [2.0], [3.0]]), np.array([0, 0, 1, 2]))
    seen = []

    def predict(obs):
        seen.append(obs["time"])
        return chunk

    policy = RecedingHorizon(predict, execute)
    taken = [float(policy({"time": time})[0]) for time in range(8)]
    assert seen == looks
    once = chunk.first(execute)[:, 0].tolist()
    assert taken == (once * 8)[:8]


def test_more_steps_than_were_decoded_raise():
    chunk = RetimedChunk(np.zeros((4, 1)), np.array([0, 0, 0, 1]))
    with pytest.raises(VLAActionsError, match="more than the horizon 2"):
        RecedingHorizon(lambda obs: chunk, 3)({})
