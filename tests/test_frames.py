"""Frames and references: pairs of inverses, the rule of RoboVLMs against its own code, chunks against a slow loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vla_actions.actions import frames
from hf_vla_actions.actions.rotations import from_matrix, to_matrix
from hf_vla_actions.errors import ActionSpaceError

RNG = np.random.default_rng(3)
HERE = RNG.uniform(-1.2, 1.2, (6, 5, 3))
ACTIONS = np.concatenate([RNG.normal(size=(6, 5, 6)) * 0.2, RNG.integers(0, 2, (6, 5, 1))], axis=-1)
PAIRS = {
    "exact": (frames.to_tcp, frames.to_world, {}),
    "extrinsic": (frames.to_tcp, frames.to_world, {"form": "euler_zyx"}),
    "composed": (frames.to_tcp, frames.to_world, {"form": "euler_xyz", "turns": "compose"}),
    "robovlms": (frames.to_tcp_robovlms, frames.to_world_robovlms, {}),
    "coarse": (frames.to_tcp_robovlms, frames.to_world_robovlms, {"scale": 1.0}),
}


def rotation(euler):
    """R_x R_y R_z, written out: Euler XYZ about moving axes."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(euler), np.sin(euler)
    x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return x @ y @ z


def euler_of(matrix):
    return np.array(
        [np.arctan2(-matrix[1, 2], matrix[2, 2]), np.arcsin(matrix[0, 2]), np.arctan2(-matrix[0, 1], matrix[0, 0])]
    )


@pytest.mark.parametrize("name", PAIRS)
def test_tool_and_world_are_inverse_and_torch_gives_the_same(name):
    to_tcp, to_world, options = PAIRS[name]
    there = to_tcp(ACTIONS, HERE, **options)
    np.testing.assert_allclose(to_world(there, HERE, **options), ACTIONS, atol=1e-11)
    np.testing.assert_allclose(to_tcp(to_world(ACTIONS, HERE, **options), HERE, **options), ACTIONS, atol=1e-11)
    assert (there[..., 6] == ACTIONS[..., 6]).all(), "the gripper stays"
    tensor = to_tcp(torch.from_numpy(ACTIONS), torch.from_numpy(HERE), **options)
    assert (tensor.numpy() == there).all()
    assert (to_tcp(ACTIONS[1, 2], HERE[1, 2], **options) == there[1, 2]).all()


def test_exact_rule_is_the_definition():
    for action, here in zip(ACTIONS.reshape(-1, 7), HERE.reshape(-1, 3), strict=True):
        now, then = rotation(here), rotation(here + action[3:6])
        expected = np.concatenate([now.T @ action[:3], euler_of(now.T @ then), action[6:]])
        np.testing.assert_allclose(frames.to_tcp(action, here), expected, atol=1e-12)


def test_rule_of_robovlms_is_that_of_its_code():
    """`world_to_tcp_frame` step by step: a hundredth of the change, the old orientation seen from the new, times 100."""
    for action, here in zip(ACTIONS.reshape(-1, 7), HERE.reshape(-1, 3), strict=True):
        now, then = rotation(here), rotation(here + 0.01 * action[3:6])
        expected = np.concatenate([now.T @ action[:3], 100 * euler_of(then.T @ now), action[6:]])
        np.testing.assert_allclose(frames.to_tcp_robovlms(action, here), expected, atol=1e-10)


@pytest.mark.parametrize(("degrees", "least", "most"), [(0.1, 0, 0.001), (1, 0.001, 0.03), (10, 0.2, 3), (60, 8, 90)])
def test_small_angles_are_an_approximation_with_the_opposite_sign(degrees, least, most):
    """What docs/spaces.md says of the difference: it grows with the square of the turn."""
    rng = np.random.default_rng(0)
    here = rng.uniform(-1.0, 1.0, (500, 3))
    turn = rng.normal(size=(500, 3))
    turn *= np.radians(degrees) / np.linalg.norm(turn, axis=-1, keepdims=True)
    actions = np.concatenate([np.zeros((500, 3)), turn], axis=-1)
    exact = to_matrix(frames.to_tcp(actions, here)[:, 3:], frames.CALVIN_FORM)
    rule = to_matrix(-frames.to_tcp_robovlms(actions, here)[:, 3:], frames.CALVIN_FORM)
    angle = np.degrees(np.linalg.norm(from_matrix(exact.swapaxes(-1, -2) @ rule, "axis_angle"), axis=-1))
    assert least <= np.median(angle) <= most


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2, np.pi / 2 - 1e-9])
@pytest.mark.parametrize("turns", frames.TURNS)
def test_at_gimbal_lock_the_rotation_is_right_even_so(pitch, turns):
    here = np.array([0.3, pitch, -0.7])
    action = np.array([0.1, 0, 0, 0.02, -0.03, 0.01])
    back = frames.to_world(frames.to_tcp(action, here, turns=turns), here, turns=turns)
    angles = (here + action[3:], here + back[3:]) if turns == "difference" else (action[3:], back[3:])
    np.testing.assert_allclose(*(to_matrix(a, frames.CALVIN_FORM) for a in angles), atol=1e-6)
    assert np.abs(back[3:]).max() < 0.1, "and no angle jumps"


def slow_delta(targets, state, anchor):
    before, out = state, []
    for target in targets:
        out.append(target - before)
        before = target if anchor == "step" else before
    return np.array(out)


@pytest.mark.parametrize("anchor", frames.ANCHORS)
@given(seed=st.integers(0, 999), horizon=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_delta_and_absolute_are_inverse(anchor, seed, horizon):
    rng = np.random.default_rng(seed)
    targets, state = rng.normal(size=(3, horizon, 4)), rng.normal(size=(3, 4))
    mask = rng.random(4) < 0.6
    changes = frames.to_delta(targets, state, anchor, mask)
    for row in range(3):
        expected = np.where(mask, slow_delta(targets[row], state[row], anchor), targets[row])
        np.testing.assert_allclose(changes[row], expected, atol=1e-14)
    np.testing.assert_allclose(frames.to_absolute(changes, state, anchor, mask), targets, atol=1e-13)
    tensor = frames.to_absolute(torch.from_numpy(changes), torch.from_numpy(state), anchor, mask)
    assert (tensor.numpy() == frames.to_absolute(changes, state, anchor, mask)).all()


def test_openpi_example():
    """All steps of a chunk against one state; masked numbers stay (openpi's DeltaActions)."""
    changes = frames.to_delta(np.array([[3.0, 4.0], [5.0, 6.0]]), [1.0, 2.0], mask=[False, True])
    assert changes.tolist() == [[3.0, 2.0], [5.0, 4.0]]


@pytest.mark.parametrize("anchor", frames.ANCHORS)
def test_angles_go_the_short_way_round(anchor):
    targets, angles = np.array([[3.1, 10.0], [-3.1, 20.0], [-3.0, 30.0]]), np.array([True, False])
    changes = frames.to_delta(targets, [3.0, 0.0], anchor, angles=angles)
    assert np.abs(changes[:, 0]).max() < 0.3
    np.testing.assert_allclose(frames.to_absolute(changes, [3.0, 0.0], anchor, angles=angles), targets, atol=1e-12)


@pytest.mark.parametrize("anchor", frames.ANCHORS)
@pytest.mark.parametrize("frame", ["base", "tcp"])
def test_turns_and_orientations_are_inverse_and_composed(anchor, frame):
    goals = to_matrix(RNG.uniform(-3, 3, (4, 5, 3)), "euler_xyz")
    start = to_matrix(RNG.uniform(-3, 3, (4, 3)), "euler_xyz")
    turns = frames.to_turns(goals, start, anchor, frame)
    np.testing.assert_allclose(frames.to_orientations(turns, start, anchor, frame), goals, atol=1e-14)
    for row in range(4):
        now = start[row]
        for goal, turn in zip(goals[row], turns[row], strict=True):
            np.testing.assert_allclose(now @ turn if frame == "tcp" else turn @ now, goal, atol=1e-14)
            now = goal if anchor == "step" else now


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frames.to_tcp(np.zeros((2, 3, 7)), np.zeros((3, 3))), r"euler is \(3,\) or \(2, 3, 3\)"),
        (lambda: frames.to_tcp(np.zeros(5), np.zeros(3)), "three positions and three angles"),
        (lambda: frames.to_tcp(np.zeros(7), np.zeros(3), "quat_xyzw"), "Euler angles"),
        (lambda: frames.to_tcp(np.zeros(7), np.zeros(3), turns="sum"), "turns is one of"),
        (lambda: frames.to_tcp(np.full(7, np.inf), np.zeros(3)), "NaN or infinite"),
        (lambda: frames.to_delta(np.zeros(7), np.zeros(7)), "horizon"),
        (lambda: frames.to_delta(np.zeros((4, 2, 7)), np.zeros((2, 7))), r"state is \(4, 7\) or \(dof,\)"),
        (lambda: frames.to_delta(np.zeros((2, 7)), np.zeros(7), "first"), "anchor is one of"),
        (lambda: frames.to_delta(np.zeros((2, 7)), np.zeros(7), mask=[1] * 7), "7 times True or False"),
        (lambda: frames.to_turns(np.zeros((2, 3)), np.eye(3)), "horizon, 3, 3"),
        (lambda: frames.to_turns(np.zeros((2, 4, 3, 3)), np.zeros((4, 3, 3))), r"start is \(2, 3, 3\)"),
        (lambda: frames.to_turns(np.zeros((2, 3, 3)), np.eye(3), frame="joint"), "frame is one of"),
    ],
)
def test_wrong_shapes_and_words_raises(call, message):
    with pytest.raises(ActionSpaceError, match=message):
        call()
