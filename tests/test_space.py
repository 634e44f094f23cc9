import json

import numpy as np
import pytest

from hf_vla_actions.actions import ActionSpace, Gripper, PoseDims
from hf_vla_actions.actions.pose import infer_pose
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


def test_files_without_the_facts_of_conversions_read_and_are_written_as_ever():
    old = {
        "names": ["x", "gripper"],
        "units": ["m", None],
        "delta": [True, False],
        "frame": "base",
        "gripper": {"dim": "gripper", "open": 1.0, "closed": 0.0, "binary": True},
        "rate_hz": 5,
        "named": True,
    }
    space = ActionSpace.from_dict(old)
    assert space == ActionSpace(["x", "gripper"], ["m", None], (True, False), "base", Gripper("gripper"), 5)
    assert space.to_dict() == old


def test_facts_of_conversions_go_through_json():
    pose = PoseDims(("x", "y", "z"), ("roll", "pitch", "yaw"), "euler_xyz", "difference")
    space = ActionSpace(WIDOWX.names, frame="base", gripper=WIDOWX.gripper, pose=pose, anchor="chunk")
    assert ActionSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    assert space != ActionSpace(WIDOWX.names, frame="base", gripper=WIDOWX.gripper, pose=pose, anchor="step")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("x y z gripper", PoseDims(("x", "y", "z"))),
        ("z y x qw qx qy qz", PoseDims(("x", "y", "z"), ("qx", "qy", "qz", "qw"), "quat_xyzw")),
        ("x y z roll pitch yaw", PoseDims(("x", "y", "z"), ("roll", "pitch", "yaw"))),
        ("rx ry rz", PoseDims(rotation=("rx", "ry", "rz"))),
        ("r6_0 r6_1 r6_2 r6_3 r6_4 r6_5", PoseDims(rotation=tuple(f"r6_{i}" for i in range(6)))),
        ("x y z roll pitch yaw rx ry rz", PoseDims(("x", "y", "z"))),
        ("x y yaw", None),
        ("j1 j2 j3", None),
    ],
)
def test_names_are_taken_at_their_word_only_where_they_leave_no_doubt(names, expected):
    assert infer_pose(names.split()) == expected
    assert ActionSpace(names.split()).known_pose() == expected
    assert ActionSpace(names.split()).pose is None, "nothing is stored that nobody said"


POSE = {"position": ("x", "y", "z"), "rotation": ("roll", "pitch", "yaw")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "position, a rotation or both"),
        ({"position": "xyz"}, "list of dimensions"),
        ({"position": ("x", "y")}, "three dimensions"),
        ({**POSE, "form": "quat_xyzw"}, "quat_xyzw has 4 dimensions"),
        ({**POSE, "form": "rpy"}, "no rotation is written as 'rpy'"),
        ({**POSE, "form": "euler_xyz", "turns": "sum"}, "turns is one of"),
        ({**POSE, "form": "axis_angle", "turns": "difference"}, "only Euler angles"),
        ({**POSE, "turns": "difference"}, "only Euler angles"),
        ({"position": ("x", "y", "gripper")}, "not two of them"),
        ({"position": ("x", "y", "w")}, "no dimension is named 'w'"),
    ],
)
def test_impossible_pose_raises(arguments, message):
    with pytest.raises(ActionSpaceError, match=message):
        ActionSpace(WIDOWX.names, gripper=WIDOWX.gripper, pose=PoseDims(**arguments))


def test_other_impossible_facts_raises():
    with pytest.raises(ActionSpaceError, match="joint"):
        ActionSpace(WIDOWX.names, frame="joint", pose=PoseDims(**POSE))
    with pytest.raises(ActionSpaceError, match="anchor must be one of"):
        ActionSpace(["x"], anchor="first")
    with pytest.raises(ActionSpaceError, match="not the description"):
        ActionSpace.from_dict({"names": ["x"], "gripper": {"dim": "x", "colour": "red"}})
