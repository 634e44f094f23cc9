"""Grippers: every convention into every other, commands and states, SIMPLER's repetition against its own loop."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vla_actions.actions import ActionSpace, Gripper
from hf_vla_actions.actions.gripper import (
    GripperMemory,
    commands_to_states,
    convert_gripper,
    state_before,
    states_to_commands,
)
from hf_vla_actions.constraints import Context, Sticky, bind
from hf_vla_actions.errors import ActionSpaceError, ConstraintError

RT1 = Gripper("g", open=-1.0, closed=1.0, relative=True)
GOOGLE = Gripper("g", open=-1.0, closed=1.0, relative=True, sticky=15)
CONVENTIONS = [Gripper("g", *ends, binary=False) for ends in [(1, 0), (0, 1), (-1, 1), (1, -1), (0.08, 0.0), (255, 3)]]


@pytest.mark.parametrize(("a", "b"), itertools.product(CONVENTIONS, repeat=2))
def test_conventions_go_there_and_back(a, b):
    values = a.from_opening(np.linspace(-0.1, 1.1, 13))
    there = convert_gripper(values, a, b)
    np.testing.assert_allclose(convert_gripper(there, b, a), values, rtol=0, atol=1e-12 * 256)
    ends = convert_gripper(np.array([a.open, a.closed]), a, b)
    assert ends.tolist() == [b.open, b.closed], "the ends are exact"


def test_libero_takes_what_openvla_says():
    """Model 0 = close, 1 = open; the environment -1 = open, +1 = close, two values only (openvla's LIBERO scripts)."""
    model, libero = Gripper("g", 1, 0, binary=False), Gripper("g", -1, 1)
    values = np.array([0.0, 0.2, 0.51, 1.0])
    assert convert_gripper(values, model, libero).tolist() == (-np.sign(2 * values - 1)).tolist()


def test_thresholds_are_those_of_the_side_that_decides():
    model, robot = Gripper("g", 1, 0, binary=False), Gripper("g", -1, 1, threshold=-0.8)
    assert convert_gripper([0.85, 0.95], model, robot).tolist() == [1, -1]
    assert convert_gripper([0.85, 0.95], Gripper("g", 1, 0, threshold=0.3), robot).tolist() == [-1, -1]
    assert Gripper("g", threshold=0.7).settle([0.69, 0.7]).tolist() == [0, 1]
    assert Gripper("g", 0, 1, threshold=0.3).is_open([0.3, 0.31]).tolist() == [True, False]
    space = ActionSpace(["x", "g"], gripper=Gripper("g", threshold=0.7))
    assert space.settle(np.array([[0.69, 0.69], [0.7, 0.7]])).tolist() == [[0.69, 0.0], [0.7, 1.0]]


def test_relative_gripper_is_not_settled():
    space = ActionSpace(["g"], gripper=RT1)
    assert space.settle(np.array([[0.0]])).tolist() == [[0.0]]
    assert RT1.commands([-1, -0.11, -0.1, 0, 0.1, 0.11, 1]).tolist() == [1, 1, 0, 0, 0, -1, -1]
    assert Gripper("g", 1, -1, relative=True, threshold=0.5).commands([0.4, 0.6, -0.6]).tolist() == [0, 1, -1]


def slow_states(values, open_before):
    """The rule in words: a command is followed, everything else leaves the gripper as it is."""
    states, now = [], open_before
    for value in values:
        now = True if value < -0.1 else False if value > 0.1 else now
        states.append(now)
    return states


@given(
    st.lists(st.lists(st.sampled_from([-1.0, -0.05, 0.0, 0.1, 1.0]), min_size=7, max_size=7), min_size=1, max_size=4),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_commands_to_states_equals_the_slow_rule_in_any_pieces(rows, data):
    before = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    expected = [slow_states(*pair) for pair in zip(rows, before, strict=True)]
    cut = data.draw(st.integers(1, 6))
    values = np.array(rows)
    first, memory = commands_to_states(values[:, :cut], RT1, GripperMemory(np.array(before)))
    second, _ = commands_to_states(values[:, cut:], RT1, memory)
    assert np.concatenate([first, second], axis=1).tolist() == expected


def simpler(openings, repeats):
    """SIMPLER's google_robot (simpler_env/policies/openvla): a change of the opening starts a repeated command."""
    before, repeating, done, command, out = None, False, 0, 0.0, []
    for opening in openings:
        change = 0.0 if before is None else before - opening
        before = opening
        if abs(change) > 0.5 and not repeating:
            repeating, command = True, change
        if repeating:
            done += 1
            change = command
        if done == repeats:
            repeating, done, command = False, 0, 0.0
        out.append(change)
    return out


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.sampled_from([1, 2, 15]), st.integers(1, 59))
@settings(max_examples=150, deadline=None)
def test_forgetful_repetition_is_that_of_simpler(states, repeats, cut):
    gripper = Gripper("g", open=-1, closed=1, relative=True, sticky=repeats)
    wanted = np.array(states)
    memory = GripperMemory(wanted[0])
    pieces = []
    for piece in (wanted[:cut], wanted[cut:]):
        if len(piece):
            values, memory = states_to_commands(piece, gripper, memory, forget=True)
            pieces.append(values)
    got = np.concatenate(pieces)
    # While a command is repeated SIMPLER sends it; a change seen then is lost and must not be sent as such.
    assert got.tolist() == simpler([float(s) for s in states], repeats)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.booleans(), st.sampled_from([1, 2, 15]))
@settings(max_examples=100, deadline=None)
def test_repetition_loses_no_change_that_lasts(states, before, repeats):
    gripper = Gripper("g", open=-1, closed=1, relative=True, sticky=repeats)
    wanted = np.array(states + [states[-1]] * 2 * repeats)
    values, _ = states_to_commands(wanted, gripper, GripperMemory(before))
    reached, _ = commands_to_states(values, gripper, GripperMemory(before))
    assert reached[-1] == states[-1]
    if repeats == 1:
        assert (reached == wanted).all()
    runs = [len(list(group)) for key, group in itertools.groupby(values.tolist()) if key != 0]
    assert all(run % repeats == 0 for run in runs), "every command is sent its whole number of times"


def test_simpler_forgets_what_waiting_keeps():
    wanted = np.array([True, False] + [True] * 40)  # close for one step, then open again
    memory = GripperMemory(True)
    kept, _ = states_to_commands(wanted, GOOGLE, memory)
    forgot, _ = states_to_commands(wanted, GOOGLE, memory, forget=True)
    assert kept.tolist() == [0] + [1] * 15 + [-1] * 15 + [0] * 11
    assert forgot.tolist() == [0] + [1] * 15 + [0] * 26, "it stays closed for ever"


def test_state_before_is_the_opposite_of_the_first_command():
    values = np.array([[0.0, 1.0, -1.0], [0.0, -1.0, 1.0]])
    assert state_before(values, RT1).tolist() == [True, False]
    assert state_before(np.zeros(3), RT1, default=True)
    with pytest.raises(ActionSpaceError, match="default="):
        state_before(np.zeros(3), RT1)


def test_relative_and_absolute_through_the_state_before():
    bridge = Gripper("g")
    states = np.array([[1.0, 1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0, 0.0]])
    commands = convert_gripper(states, bridge, RT1, is_open=[True, True])
    assert commands.tolist() == [[0, 0, 1, 0, -1], [1, -1, 0, 1, 0]]
    assert (convert_gripper(commands, RT1, bridge, is_open=True) == states).all()
    flipped = Gripper("g", open=1, closed=-1, relative=True)
    assert (convert_gripper(commands, RT1, flipped) == -commands).all()
    coarse = Gripper("g", open=1, closed=-1, relative=True, threshold=0.5)
    assert convert_gripper([-0.3, 0.0, 0.05], RT1, coarse).tolist() == [1, 0, 0], "a command stays a command"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relative": True, "binary": True}, "three commands"),
        ({"sticky": 3}, "only a relative"),
        ({"sticky": 0, "relative": True}, "at least 1"),
        ({"threshold": 1.0}, "between 0 and 1"),
        ({"threshold": 0.6, "relative": True}, "between 0 and 0.5"),
        ({"open": float("nan")}, "different finite"),
    ],
)
def test_impossible_gripper_raises(arguments, message):
    with pytest.raises(ActionSpaceError, match=message):
        Gripper("g", **arguments)


def test_wrong_kind_raises():
    with pytest.raises(ActionSpaceError, match="commands, not states"):
        RT1.is_open(0.5)
    with pytest.raises(ActionSpaceError, match="states, not commands"):
        Gripper("g").commands(0.5)
    with pytest.raises(ActionSpaceError, match="is_open="):
        convert_gripper([0.0], RT1, Gripper("g"))
    with pytest.raises(ActionSpaceError, match="repeats each command 15 times"):
        convert_gripper([0.0], Gripper("g"), GOOGLE, True)
    with pytest.raises(ActionSpaceError, match="one state for each row"):
        commands_to_states(np.zeros((2, 3)), RT1, GripperMemory(np.array([True] * 3)))
    with pytest.raises(ActionSpaceError, match="True or False"):
        GripperMemory(1)
    with pytest.raises(ActionSpaceError, match="finite"):
        commands_to_states([np.nan], RT1, GripperMemory(True))
    with pytest.raises(ActionSpaceError, match="states are bool"):
        states_to_commands([0.0, 1.0], RT1, GripperMemory(True))


@pytest.mark.parametrize("gripper", [Gripper("g"), RT1, GOOGLE, Gripper(-1, 0, 1, True, threshold=0.3)])
def test_json_keeps_every_fact_and_old_files_read_as_ever(gripper):
    space = ActionSpace(["x", "g"], gripper=gripper)
    assert ActionSpace.from_dict(space.to_dict()) == space
    if gripper == Gripper("g"):
        assert gripper.to_dict() == {"dim": "g", "open": 1.0, "closed": 0.0, "binary": True}
        assert Gripper(**{"dim": "g", "open": 1.0, "closed": 0.0, "binary": True}) == gripper


def test_relative_gripper_has_no_state_to_hold_raises():
    space = ActionSpace(["g"], gripper=RT1)
    with pytest.raises(ConstraintError, match="no state to hold"):
        bind([Sticky("g", min_hold=2)], space, None, 3, grid=False, context=Context(last_action=[1.0]))
