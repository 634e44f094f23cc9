"""Actions of one space in another: what they make the robot do stays the same, and what does not follow is refused."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vla_actions.actions import Actions, ActionSpace, Gripper, PoseDims
from hf_vla_actions.actions.rotations import from_matrix, size_of, to_matrix
from hf_vla_actions.data import TRANSFORMS, LeRobotDataset
from hf_vla_actions.data.transforms import calvin_metric
from hf_vla_actions.errors import ActionSpaceError

LENGTHS = {"m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254}
ANGLES = {"rad": 1.0, "deg": np.pi / 180}
FORMS = ["euler_xyz", "euler_XYZ", "euler_zyx", "quat_xyzw", "quat_wxyz", "axis_angle", "rot6d", "matrix"]
GRIPPERS = [(1, 0), (0, 1), (-1, 1), (0.08, 0)]


def random_space(rng, frame, summed=None):
    """A space of one arm: a pose in any form, a gripper, a joint of a torso and a flag without unit, in any order."""
    form, length, angle = rng.choice(FORMS), rng.choice(list(LENGTHS)), rng.choice(list(ANGLES))
    euler = form.startswith("euler")
    kinds = (True, True) if frame == "tcp" else (bool(rng.integers(2)), bool(rng.integers(2)))
    turns = ["compose", "difference"][rng.integers(2)] if euler and frame != "tcp" else None
    turns = "compose" if euler and frame == "tcp" else turns
    rotation = [f"rot{i}" for i in range(size_of(form))]
    unit = angle if euler or form == "axis_angle" else None
    facts = [(name, length, kinds[0]) for name in ("px", "py", "pz")]
    facts += [(name, unit, kinds[1]) for name in rotation]
    facts += [("hand", None, False), ("torso", None, bool(rng.integers(2))), ("flag", None, False)]
    order = rng.permutation(len(facts))
    names, units, delta = zip(*[facts[i] for i in order], strict=True)
    gripper = Gripper("hand", *GRIPPERS[rng.integers(4)], binary=False)
    pose = PoseDims(("px", "py", "pz"), rotation, str(form), turns)
    return ActionSpace(
        names, units, delta, frame, gripper, pose=pose, anchor=summed or ["step", "chunk"][rng.integers(2)]
    )


def columns(space, chunk, names):
    return np.stack([chunk[:, space.names.index(name)] for name in names], axis=-1)


def goals(space, chunk, start, base):
    """Where a chunk leads, from the definitions, one step after the other.

    Returns: positions and orientations in the world, opening of the gripper, torso, flag.
    """
    pose, scale = space.pose, LENGTHS[space.units[space.names.index("px")]]
    unit = space.units[space.names.index("rot0")]
    positions = columns(space, chunk, pose.position) * scale
    rotations = columns(space, chunk, pose.rotation) * (ANGLES[unit] if unit else 1.0)
    p0, r0, torso = start
    axes, origin = (base[:3, :3], base[:3, 3]) if space.frame == "base" else (np.eye(3), np.zeros(3))
    p0, r0 = axes.T @ (p0 - origin), axes.T @ r0
    e0 = from_matrix(r0, pose.form) if pose.form.startswith("euler") else None
    shift, turn = space.delta[space.names.index("px")], space.delta[space.names.index("rot0")]
    p, r, e, out = p0, r0, e0, []
    for move, by in zip(positions, rotations, strict=True):
        if space.anchor == "chunk":
            p, r, e = p0, r0, e0
        p = p + (r @ move if space.frame == "tcp" else move) if shift else move
        if not turn:
            r = to_matrix(by, pose.form)
        elif pose.turns == "difference":
            e = e + by
            r = to_matrix(e, pose.form)
        else:
            r = r @ to_matrix(by, pose.form) if space.frame == "tcp" else to_matrix(by, pose.form) @ r
        out.append((axes @ p + origin, axes @ r))
    hand = columns(space, chunk, ["hand"])[:, 0]
    column = columns(space, chunk, ["torso"])[:, 0]
    if space.delta[space.names.index("torso")]:
        column = torso + (column if space.anchor == "chunk" else np.cumsum(column))
    opening = (hand - space.gripper.closed) / (space.gripper.open - space.gripper.closed)
    return [np.array([o[0] for o in out]), np.array([o[1] for o in out]), opening, column]


def random_chunk(rng, space, horizon, small):
    """Numbers that mean something in a space: proper rotations, small enough to come back the same way."""
    unit = space.units[space.names.index("rot0")]
    angles = rng.uniform(-small, small, (horizon, 3))
    rotations = from_matrix(to_matrix(angles, "euler_xyz"), space.pose.form) / (ANGLES[unit] if unit else 1.0)
    chunk = rng.normal(size=(horizon, space.dof))
    for i, name in enumerate(space.pose.rotation):
        chunk[:, space.names.index(name)] = rotations[:, i]
    return chunk


def state_of(rng, source, to, start, base):
    """The same place in a space of its own, in the frame that the conversion wants it in."""
    frame = source.frame if source.frame != "tcp" else to.frame if to.frame != "tcp" else "world"
    p0, r0, torso = start
    if frame == "base":
        p0, r0 = base[:3, :3].T @ (p0 - base[:3, 3]), base[:3, :3].T @ r0
    form = str(rng.choice(["quat_xyzw", "rot6d", "matrix"]))
    names = ["torso", "px", "py", "pz", *(f"q{i}" for i in range(size_of(form)))]
    space = ActionSpace(names, [None, *["cm"] * 3, *[None] * size_of(form)], False, frame,
                        pose=PoseDims(names[1:4], names[4:], form))  # fmt: skip
    return space.wrap(np.concatenate([[torso], p0 / 0.01, from_matrix(r0, form)]))


def random_place(rng, small):
    turn = to_matrix(rng.uniform(-small, small, 3), "euler_xyz")
    base = np.eye(4)
    base[:3, :3], base[:3, 3] = to_matrix(rng.uniform(-small, small, 3), "euler_xyz"), rng.normal(size=3)
    return (rng.normal(size=3), turn, rng.normal()), base


@given(st.integers(0, 10**6), st.sampled_from(["base", "world", "tcp"]), st.sampled_from(["base", "world", "tcp"]))
@settings(max_examples=100, deadline=None)
def test_what_the_robot_does_stays_the_same_and_the_way_back_leads_back(seed, one, two):
    rng = np.random.default_rng(seed)
    source, to, horizon = random_space(rng, one), random_space(rng, two), int(rng.integers(1, 5))
    start, base = random_place(rng, 0.3)
    chunk = random_chunk(rng, source, horizon, 0.15)
    state = state_of(rng, source, to, start, base)
    there = source.convert(chunk, to, state, base=base)
    assert there.shape == (horizon, to.dof)
    for a, b in zip(goals(source, chunk, start, base), goals(to, there, start, base), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-9)
    assert (columns(to, there, ["flag"]) == columns(source, chunk, ["flag"])).all()
    back = to.convert(there, source, state_of(rng, to, source, start, base), base=base)
    np.testing.assert_allclose(back, chunk, atol=1e-8)


@pytest.mark.parametrize("anchors", [("step", "chunk"), ("chunk", "step"), ("step", "step"), ("chunk", "chunk")])
@pytest.mark.parametrize("frames", [("base", "world"), ("world", "base")])
def test_changes_along_other_fixed_axes_keep_their_anchor_or_change_it(anchors, frames):
    rng = np.random.default_rng(3)
    spaces = []
    for frame, anchor in zip(frames, anchors, strict=True):
        space = random_space(rng, "tcp", anchor)  # both changes, composed
        spaces.append(replace(space, frame=frame, units=tuple("m" if u in LENGTHS else u for u in space.units)))
    source, to = spaces
    start, base = random_place(rng, 0.3)
    chunk = random_chunk(rng, source, 4, 0.15)
    there = source.convert(chunk, to, state_of(rng, source, to, start, base), base=base)
    for a, b in zip(goals(source, chunk, start, base), goals(to, there, start, base), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-9)


# A robot of BridgeData: differences of Euler angles in the frame of the base, one after the other.
NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
UNITS = ("m",) * 3 + ("rad",) * 3 + (None,)
POSE = PoseDims(NAMES[:3], NAMES[3:6], "euler_xyz", "difference")
BRIDGE = ActionSpace(NAMES, UNITS, (True,) * 6 + (False,), "base", Gripper("gripper"), 5.0, pose=POSE, anchor="step")
ROBOT = ActionSpace(
    ("gripper", "x", "y", "z", "qx", "qy", "qz", "qw"),
    (None, "mm", "mm", "mm", None, None, None, None),
    False,
    "base",
    Gripper("gripper", open=-1.0, closed=1.0),
    5.0,
)
CHUNK = np.random.default_rng(1).normal(size=(3, 4, 7)) * 0.1
CHUNK[..., 6] = CHUNK[..., 6] > 0
STATE = np.random.default_rng(2).normal(size=(3, 6)) * 0.5


BRIDGE_STATE = ActionSpace(NAMES[:6], UNITS[:6], False, "base", pose=replace(POSE, turns=None))


def test_worked_example():
    action = np.array([[0.01, 0, 0, 0, 0, np.pi / 2, 1.0], [0.01, 0, 0, 0, 0, np.pi / 2, 0.0]])
    out = BRIDGE.convert(action, ROBOT, [0.1, 0.2, 0.3, 0.0, 0.0, 0.0])
    half = np.sqrt(0.5)
    expected = [[-1, 110, 200, 300, 0, 0, half, half], [1, 120, 200, 300, 0, 0, 1, 0]]
    np.testing.assert_allclose(out, expected, atol=1e-12)


def test_state_goes_as_array_mapping_or_in_a_space_of_its_own():
    out = BRIDGE.convert(CHUNK, ROBOT, STATE)
    mapping = {name: STATE[:, i] for i, name in enumerate(NAMES[:6])}
    assert (BRIDGE.convert(CHUNK, ROBOT, mapping) == out).all()
    degrees = ActionSpace(NAMES[:6], ("m",) * 3 + ("deg",) * 3, False, "base", pose=replace(POSE, turns=None))
    own = degrees.wrap(STATE * ([1] * 3 + [180 / np.pi] * 3))
    np.testing.assert_allclose(BRIDGE.convert(CHUNK, ROBOT, own), out, atol=1e-12)
    assert (BRIDGE.convert(CHUNK[1], ROBOT, STATE[1]) == out[1]).all()
    assert (BRIDGE.convert(CHUNK[1, 0], ROBOT, STATE[1]) == out[1, 0]).all(), "one action is a chunk of one step"


def test_differences_of_real_states_lead_to_these_states(shared):
    """BridgeData relabelled as OpenVLA trains on it: changes of the reached state are targets again."""
    dataset = LeRobotDataset(shared / "data/bridge_sample")
    targets = replace_space(BRIDGE, names=NAMES, delta=False, pose=replace(POSE, turns=None))
    for episode in dataset.episodes:
        states = dataset.states[episode.start : episode.stop, :6]
        changes = np.concatenate(
            [np.diff(states, axis=0), dataset.actions[episode.start : episode.stop - 1, 6:]], axis=1
        )
        np.testing.assert_allclose(BRIDGE.convert(changes, targets, states[0])[:, :6], states[1:], atol=1e-12)
        back = targets.convert(
            np.concatenate([states[1:], changes[:, 6:]], axis=1), BRIDGE, BRIDGE_STATE.wrap(states[0])
        )
        np.testing.assert_allclose(back, changes, atol=1e-12)


def test_a_state_of_its_own_brings_its_own_units_for_single_dimensions():
    lift = ActionSpace(("lift", "tilt"), ("mm", "deg"), True, "joint", anchor="step")
    target = ActionSpace(("tilt", "lift"), ("rad", "m"), False, "joint")
    state = ActionSpace(("tilt", "other", "lift"), ("rad", None, "cm"), False, "joint").wrap([np.pi, 7.0, 50.0])
    out = lift.convert([[1.0, 90.0], [2.0, -180.0]], target, state)
    np.testing.assert_allclose(out, [[1.5 * np.pi, 0.501], [0.5 * np.pi, 0.503]], atol=1e-12)


def test_published_commands_have_sizes_in_meters_and_radians():
    libero = TRANSFORMS["libero"].result
    units = ("m",) * 3 + ("rad",) * 3 + (None,)
    metric = replace_space(libero, names=libero.names, units=units)
    command = np.array([1.0, -0.5, 0.0, 0.2, 0.0, 1.0, 1.0])
    out = libero.convert(command, metric)
    np.testing.assert_allclose(out, [0.05, -0.025, 0, 0.1, 0, 0.5, 1], atol=1e-15)
    np.testing.assert_allclose(metric.convert(out, libero), command, atol=1e-15)
    calvin, in_metric = TRANSFORMS["calvin"].result, TRANSFORMS["calvin_metric"].result
    np.testing.assert_allclose(calvin.convert(command, in_metric)[:6], calvin_metric(command[:6]), atol=1e-15)


@pytest.mark.parametrize(
    "unit", ["-2 m", "0 m", "nan m", "inf m", "0.05 furlong", "0.05", "2  m", "m 2", "0.05 rad", ""]
)
def test_units_that_are_no_length_raise(unit):
    source, to = (ActionSpace(("a",), (u,), True, "joint", anchor="step") for u in (unit, "m"))
    with pytest.raises(ActionSpaceError, match="nobody can turn"):
        source.convert([[1.0]], to)


def test_angles_in_multiples_of_a_radian_are_no_single_dimensions():
    names = ("a", "b")
    source = ActionSpace(names, ("0.5 rad",) * 2, True, "base", anchor="step")
    with pytest.raises(ActionSpaceError, match="nobody has said of what"):
        source.convert([[1.0, 2.0]], ActionSpace(names, ("0.5 rad",) * 2, False, "base"), [0.0, 0.0])


def test_torch_gives_the_same_numbers():
    out = BRIDGE.convert(torch.from_numpy(CHUNK), ROBOT, torch.from_numpy(STATE))
    assert out.dtype == torch.float64
    assert (out.numpy() == BRIDGE.convert(CHUNK, ROBOT, STATE)).all()


def test_only_what_is_needed_is_asked_for():
    """Units, order and the gripper need no state; changes along other fixed axes need the base alone."""
    swapped = ActionSpace(NAMES[::-1], (None, *["deg"] * 3, *["cm"] * 3), BRIDGE.delta[::-1], "base",
                          Gripper("gripper", 0, 1), pose=POSE, anchor="step")  # fmt: skip
    out = BRIDGE.convert(CHUNK, swapped)
    np.testing.assert_allclose(out[..., ::-1][..., :6], CHUNK[..., :6] * ([100] * 3 + [180 / np.pi] * 3))
    assert (out[..., 0] == 1 - CHUNK[..., 6]).all()
    unsaid = ActionSpace(NAMES, UNITS, BRIDGE.delta, "base", Gripper("gripper"))
    cm = ActionSpace(NAMES, ("cm",) * 3 + UNITS[3:], BRIDGE.delta, "base", Gripper("gripper"))
    assert (unsaid.convert(CHUNK, cm)[..., 3:] == CHUNK[..., 3:]).all(), "nobody said how, and nothing has to be known"
    composed = replace_space(BRIDGE, pose=replace(POSE, turns="compose"), anchor=None)
    in_world = replace_space(composed, frame="world")
    base = np.eye(4)
    base[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    np.testing.assert_allclose(composed.convert(CHUNK, in_world, base=base)[..., 0], -CHUNK[..., 1], atol=1e-15)
    np.testing.assert_allclose(
        in_world.convert(composed.convert(CHUNK, in_world, base=base), composed, base=base), CHUNK
    )
    one_step = replace_space(BRIDGE, anchor=None).convert(CHUNK[:, :1], ROBOT, STATE)
    assert (one_step == BRIDGE.convert(CHUNK[:, :1], ROBOT, STATE)).all(), "one step has one reference"
    chunked = replace_space(BRIDGE, anchor="chunk")
    np.testing.assert_allclose(BRIDGE.convert(CHUNK, chunked)[..., :6], np.cumsum(CHUNK, axis=1)[..., :6], atol=1e-15)


def test_joints_convert_with_the_state_of_openpi():
    absolute = ActionSpace(["j1", "j2", "grip"], ["rad", "rad", None], False, "joint", Gripper("grip"))
    delta = ActionSpace(["j1", "j2", "grip"], ["deg", "rad", None], (True, True, False), "joint", Gripper("grip"),
                        anchor="chunk")  # fmt: skip
    chunk = np.array([[7.0, 0.2, 1.0], [7.1, 0.1, 0.0]])
    out = absolute.convert(chunk, delta, [6.9, 0.0])
    np.testing.assert_allclose(out, [[np.degrees(0.1), 0.2, 1.0], [np.degrees(0.2), 0.1, 0.0]])
    np.testing.assert_allclose(delta.convert(out, absolute, {"j1": np.degrees(6.9), "j2": 0.0}), chunk)


def test_relative_gripper_follows_from_the_state():
    rt1 = replace_space(BRIDGE, gripper=Gripper("gripper", -1, 1, relative=True))
    chunk = CHUNK[:1].copy()
    chunk[0, :, 6] = [1, 0, 0, 1]
    commands = BRIDGE.convert(chunk, rt1, {"gripper": 1.0})
    assert commands[0, :, 6].tolist() == [0, 1, 0, -1]
    assert (rt1.convert(commands, BRIDGE, {"gripper": 1.0}) == chunk).all()


def test_explain_says_every_step_and_the_log_what_was_done(caplog):
    texts = BRIDGE.explain(ROBOT)
    assert len(texts) == 5
    for text, words in zip(
        texts,
        ("open 1, closed 0, binary) to", "position (delta", "euler_xyz, delta, from each step, difference", "m to mm",
         "needs state= with the position, the orientation"), strict=True):  # fmt: skip
        assert words in text
    with caplog.at_level(logging.INFO, "hf_vla_actions.actions.convert"):
        BRIDGE.convert(CHUNK, ROBOT, STATE)
    assert "quat_xyzw, absolute, base frame" in caplog.text
    assert BRIDGE.explain(BRIDGE) == ["the spaces are the same: nothing to do"]


def test_dimensions_are_left_out_only_by_name():
    space = ActionSpace([*NAMES, "terminate"], [*UNITS, None], (*BRIDGE.delta, False), "base", Gripper("gripper"))
    chunk = np.concatenate([CHUNK, np.ones((3, 4, 1))], axis=-1)
    plain = ActionSpace(NAMES, UNITS, BRIDGE.delta, "base", Gripper("gripper"))
    with pytest.raises(ActionSpaceError, match=r"\['terminate'\] have no place.*drop="):
        space.convert(chunk, plain)
    assert (space.convert(chunk, plain, drop=("terminate",)) == CHUNK).all()
    assert "left out: terminate" in space.explain(plain, drop=("terminate",))
    with pytest.raises(ActionSpaceError, match=r"nothing becomes \['terminate'\]"):
        plain.convert(CHUNK, space)


def test_actions_know_their_space():
    actions = BRIDGE.wrap(CHUNK)
    there = actions.to(ROBOT, STATE)
    assert there.space == ROBOT
    assert there.to(ROBOT) is there, "asking again changes nothing"
    assert (there.values == BRIDGE.convert(CHUNK, ROBOT, STATE)).all()
    with pytest.raises(ActionSpaceError, match="converted already"):
        BRIDGE.convert(there, ROBOT, STATE)
    with pytest.raises(ActionSpaceError, match="are in the space"):
        replace_space(BRIDGE, frame="world").convert(there, BRIDGE)
    with pytest.raises(ActionSpaceError, match="cannot be joined"):
        Actions.join([actions, there])
    assert Actions.join([actions, actions]).values.shape == (6, 4, 7)
    with pytest.raises(ActionSpaceError, match="8 dimensions"):
        ROBOT.wrap(CHUNK)


def replace_space(space, **facts):
    values = {name: getattr(space, name) for name in ("names", "units", "delta", "frame", "gripper", "rate_hz")}
    return ActionSpace(**{**values, "pose": space.pose, "anchor": space.anchor, **facts})


TCP = replace_space(BRIDGE, frame="tcp", pose=replace(POSE, turns="compose"))
REFUSALS = {
    "no state": (BRIDGE, TCP, {}, "needs state= with the orientation"),
    "no position in the state": (BRIDGE, ROBOT, {"state": {"roll": 0, "pitch": 0, "yaw": 0}}, r"lacks \['x', 'y', 'z'\]"),
    "state of other rows": (BRIDGE, ROBOT, {"state": STATE[:2]}, "one for each chunk"),
    "state too long": (BRIDGE, ROBOT, {"state": np.zeros(9)}, "first n of"),
    "state of changes": (BRIDGE, ROBOT, {"state": BRIDGE.wrap(CHUNK[:, 0])}, "space of changes"),
    "state in another frame": (
        BRIDGE, ROBOT, {"state": replace_space(BRIDGE, frame="world", delta=False).wrap(CHUNK[:, 0])}, "frame base",
    ),
    "no base": (BRIDGE, replace_space(BRIDGE, frame="world"), {"state": STATE}, "needs base=, the pose"),
    "bad base": (
        BRIDGE, replace_space(BRIDGE, frame="world"), {"state": STATE, "base": np.ones((4, 4))}, "homogeneous matrix",
    ),
    "unknown unit": (BRIDGE, replace_space(BRIDGE, units=("parsec",) * 3 + UNITS[3:]), {}, "'x': nobody can turn m into"),
    "length to angle": (BRIDGE, replace_space(BRIDGE, units=("rad",) * 7), {}, "nobody can turn m into rad"),
    "no unit": (replace_space(BRIDGE, units=None), ROBOT, {"state": STATE}, "nobody can turn no unit into m"),
    "joints": (BRIDGE, replace_space(BRIDGE, frame="joint", pose=None), {}, "kinematics"),
    "frame unsaid": (BRIDGE, replace_space(BRIDGE, frame=None), {}, "frame of the target is not said"),
    "delta unsaid": (BRIDGE, replace_space(BRIDGE, delta=None), {"state": STATE}, "say delta="),
    "delta of a joint unsaid": (
        ActionSpace(["j"], delta=None), ActionSpace(["j"], delta=True), {}, "say delta= in both",
    ),
    "anchor unsaid": (replace_space(BRIDGE, anchor=None), ROBOT, {"state": STATE}, "say anchor="),
    "anchor of a joint unsaid": (
        ActionSpace(["j"], delta=True), ActionSpace(["j"], delta=False), {"state": [0.0]}, "say anchor=",
    ),
    "axes of a joint unsaid": (
        ActionSpace(["j"], delta=True, anchor="step"), ActionSpace(["j"], delta=False), {"state": [0.0]}, "along which axes",
    ),
    "axes unsaid": (
        replace_space(BRIDGE, frame=None), replace_space(ROBOT, frame=None), {"state": STATE}, "along which axes",
    ),
    "angles of what": (
        ActionSpace(["a", "b"], ["rad"] * 2, True, "base", anchor="step"), ActionSpace(["a", "b"], ["rad"] * 2, False, "base"),
        {"state": [0.0, 0.0]}, "nobody has said of what",
    ),
    "alone in the tool": (
        ActionSpace(["reach"], ["m"], True, "tcp", anchor="step"), ActionSpace(["reach"], ["m"], True, "tcp", anchor="chunk"),
        {}, "part of no pose",
    ),
    "mixed kinds": (
        BRIDGE, replace_space(BRIDGE, delta=(True, True, False, True, True, True, False)), {"state": STATE}, "say delta=",
    ),
    "mixed kinds, other anchor": (
        replace_space(BRIDGE, delta=(True, True, False, True, True, True, False)),
        replace_space(BRIDGE, delta=(True, True, False, True, True, True, False), anchor="chunk"), {}, "say delta=",
    ),
    "other mixed kinds": (
        replace_space(BRIDGE, delta=(True, True, False, True, True, True, False)),
        replace_space(BRIDGE, delta=(False, True, True, True, True, True, False)), {"state": STATE}, "say delta=",
    ),
    "unsaid absolute rotation in the tool": (
        replace_space(TCP, pose=None, delta=(True,) * 3 + (False,) * 4),
        replace_space(TCP, pose=None, delta=(True,) * 3 + (False,) * 4, anchor="chunk"),
        {"state": STATE}, "rotation of the source is in the frame 'tcp' but no change",
    ),
    "unsaid kinds, other anchor": (
        replace_space(BRIDGE, delta=None), replace_space(BRIDGE, delta=None, anchor="chunk"), {}, "say delta=",
    ),
    "rotation left out": (
        TCP, ActionSpace(("x", "y", "z", "gripper"), ("m", "m", "m", None), (True,) * 3 + (False,), "base", Gripper("gripper"),
                         anchor="step"),
        {"drop": NAMES[3:6]}, "how it turns meanwhile",
    ),
    "absolute rotation in the tool": (
        replace_space(TCP, delta=(True,) * 3 + (False,) * 4), replace_space(TCP, delta=(True,) * 3 + (False,) * 4, anchor="chunk"),
        {"state": STATE}, "rotation of the source is in the frame 'tcp' but no change",
    ),
    "unknown rotation in the tool": (
        replace_space(TCP, pose=None), replace_space(TCP, pose=None, anchor="chunk"), {"state": STATE}, "rotation of the source",
    ),
    "rotation by strange names": (
        ActionSpace(("x", "y", "z", "u", "v", "w"), ["m"] * 3 + [None] * 3, True, "tcp", anchor="step"),
        ActionSpace(("x", "y", "z", "u", "v", "w"), ["m"] * 3 + [None] * 3, True, "base", anchor="step"), {}, "part of no pose",
    ),
    "target in the tool": (BRIDGE, replace_space(TCP, delta=False), {"state": STATE}, "say delta=True"),
    "form unsaid": (replace_space(BRIDGE, pose=None), ROBOT, {"state": STATE}, "how the rotation of the source"),
    "turns unsaid": (
        replace_space(BRIDGE, pose=replace(POSE, turns=None)), ROBOT, {"state": STATE}, "their difference for some",
    ),
    "difference in the tool": (BRIDGE, replace_space(TCP, pose=POSE), {"state": STATE}, "turns='compose'"),
    "other rate": (BRIDGE, replace_space(BRIDGE, rate_hz=10.0), {}, "Resample"),
    "gripper unsaid": (BRIDGE, replace_space(BRIDGE, gripper=None), {}, "does not say which number"),
    "relative gripper": (
        BRIDGE, replace_space(BRIDGE, gripper=Gripper("gripper", -1, 1, relative=True)), {}, "whether the gripper is open",
    ),
    "sticky gripper": (
        BRIDGE, replace_space(BRIDGE, gripper=Gripper("gripper", -1, 1, relative=True, sticky=15)), {}, "GripperMemory",
    ),
    "no names": (BRIDGE, ActionSpace.unnamed(7), {}, "without names"),
    "missing dimension": (BRIDGE, ActionSpace(["elbow"], [None], frame="base"), {"drop": NAMES}, "nothing becomes"),
    "no such dimension to drop": (BRIDGE, BRIDGE, {"drop": ("elbow",)}, "no dimension is named"),
    "part of no pose": (
        replace_space(BRIDGE, pose=PoseDims(rotation=NAMES[3:6], form="euler_xyz", turns="difference"),
                      names=("a", "b", "c", *NAMES[3:])),
        replace_space(BRIDGE, pose=PoseDims(rotation=NAMES[3:6], form="euler_xyz", turns="difference"),
                      names=("a", "b", "c", *NAMES[3:]), frame="world"),
        {"state": STATE, "base": np.eye(4)}, "part of no pose",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_follow_raises(name):
    source, to, options, message = REFUSALS[name]
    chunk = np.zeros((3, 4, source.dof))
    with pytest.raises(ActionSpaceError, match=message):
        source.convert(chunk, to, **options)


def test_batches_may_be_empty_but_chunks_not_raises():
    assert BRIDGE.convert(np.zeros((0, 4, 7)), ROBOT, np.zeros(6)).shape == (0, 4, 8)
    assert ROBOT.convert(np.zeros((0, 4, 8)), BRIDGE, BRIDGE_STATE.wrap(np.zeros((0, 6)))).shape == (0, 4, 7)
    with pytest.raises(ActionSpaceError, match="at least one step"):
        BRIDGE.convert(np.zeros((3, 0, 7)), ROBOT, STATE)


def test_bad_arguments_raises():
    with pytest.raises(ActionSpaceError, match="to= is the ActionSpace"):
        BRIDGE.convert(CHUNK, "robot", STATE)
    with pytest.raises(ActionSpaceError, match="2 NaN or infinite"):
        BRIDGE.convert(np.where(np.arange(7) < 2, np.nan, 0.0), BRIDGE)
    with pytest.raises(ActionSpaceError, match=r"\(4, 6\) for a space of 7"):
        BRIDGE.convert(np.zeros((4, 6)), ROBOT)
    with pytest.raises(ActionSpaceError, match="detach"):
        BRIDGE.convert(torch.zeros(4, 7, requires_grad=True), ROBOT)
