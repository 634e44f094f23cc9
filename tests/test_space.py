import numpy as np
import pytest

from hf_vla_actions.actions import ActionSpace, Gripper
from hf_vla_actions.errors import ActionSpaceError

WIDOWX = ActionSpace(
    names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    units=("m", "m", "m", "rad", "rad", "rad", None),
    delta=(True,) * 6 + (False,),
    frame="base",
    gripper=Gripper("gripper"),
    rate_hz=5,
)


def test_json_round_trip_keeps_every_fact():
    assert ActionSpace.from_dict(WIDOWX.to_dict()) == WIDOWX
    assert ActionSpace.from_dict(ActionSpace.unnamed(3).to_dict()) == ActionSpace.unnamed(3)


def test_dimensions_go_by_name_or_index():
    assert [WIDOWX.index("yaw"), WIDOWX.index(5), WIDOWX.index(-2)] == [5, 5, 5]
    assert WIDOWX.describe("x") == "'x' (m, delta, base frame)"
    assert ActionSpace(["a"]).describe(0) == "'a' (no unit, delta or absolute not said)"


@pytest.mark.parametrize("dim", ["yow", 7, -8, 1.0, True])
def test_unknown_dimension_raises(dim):
    with pytest.raises(ActionSpaceError, match="yaw"):
        WIDOWX.index(dim)


def test_binary_gripper_settles_on_its_two_values_and_nothing_else_moves():
    actions = np.full((2, 7), 0.3)
    actions[1, 6] = 0.5
    settled = WIDOWX.settle(actions)
    assert settled[:, 6].tolist() == [0.0, 1.0]
    assert (settled[:, :6] == 0.3).all()
    assert actions[0, 6] == 0.3, "the caller's array stays as it was"


def test_gripper_with_other_convention_settles_on_its_own_values():
    space = ActionSpace(["g"], gripper=Gripper(0, open=-1.0, closed=1.0))
    assert space.settle(np.array([[0.2], [-0.2]])).tolist() == [[1.0], [-1.0]]
    continuous = ActionSpace(["g"], gripper=Gripper(0, binary=False))
    assert continuous.settle(np.array([[0.2]])).tolist() == [[0.2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": []}, "at least one"),
        ({"names": ["x", "x"]}, "different"),
        ({"names": ["x"], "units": ["m", "m"]}, "units has 2"),
        ({"names": ["x"], "delta": (True, False)}, "delta has 2"),
        ({"names": ["x"], "delta": ("yes",)}, "True, False or None"),
        ({"names": ["x"], "frame": "camera"}, "frame"),
        ({"names": ["x"], "rate_hz": 0}, "rate_hz"),
        ({"names": ["x"], "gripper": Gripper("g")}, "no dimension is named 'g'"),
    ],
)
def test_impossible_space_raises(arguments, message):
    with pytest.raises(ActionSpaceError, match=message):
        ActionSpace(**arguments)


def test_gripper_needs_two_states_raises():
    with pytest.raises(ActionSpaceError, match="different finite"):
        Gripper("g", open=1.0, closed=1.0)
    with pytest.raises(ActionSpaceError, match="'open' or 'closed'"):
        Gripper("g").state("half")


def test_damaged_description_raises():
    with pytest.raises(ActionSpaceError, match="not the description"):
        ActionSpace.from_dict({"names": ["x"], "colour": "red"})
