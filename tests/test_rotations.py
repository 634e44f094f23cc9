"""Rotations: every form there and back, against their definitions, at every singularity, NumPy as torch."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vla_actions.actions.rotations import (
    SIZES,
    convert_rotation,
    euler_order,
    from_matrix,
    nearest_euler,
    size_of,
    to_matrix,
    wrap,
)
from hf_vla_actions.errors import ActionSpaceError

EULER = [
    f"euler_{''.join(order)}"
    for axes in ("xyz", "XYZ")
    for order in itertools.product(axes, repeat=3)
    if order[0] != order[1] != order[2]
]
FORMS = [*EULER, *SIZES]
SPECIAL = [0.0, 1e-12, -1e-9, np.pi / 2, -np.pi / 2, np.pi / 2 - 1e-8, np.pi, -np.pi, np.pi - 1e-9, 0.3, -2.5]
ANGLES = st.one_of(st.sampled_from(SPECIAL), st.floats(-np.pi, np.pi))


def axis_matrix(axis, angle):
    """The rotation about one axis, written out."""
    c, s = np.cos(angle), np.sin(angle)
    return {
        "x": np.array([[1, 0, 0], [0, c, -s], [0, s, c]]),
        "y": np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]),
        "z": np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]),
    }[axis]


def by_hand(values, form):
    """Matrix of a rotation from the definition of its form."""
    order = euler_order(form)
    if order:
        matrix = np.eye(3)
        for axis, angle in zip(order, values, strict=True):
            one = axis_matrix(axis.lower(), angle)
            matrix = one @ matrix if order.islower() else matrix @ one
        return matrix
    if form == "axis_angle":
        angle = np.linalg.norm(values)
        k = np.array(values) / (angle or 1.0)
        cross = np.array([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
        return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    if form.startswith("quat"):
        x, y, z, w = values if form == "quat_xyzw" else np.roll(values, -1)
        columns = []
        for v in np.eye(3):  # q v q*
            t = 2 * np.cross([x, y, z], v)
            columns.append(v + w * t + np.cross([x, y, z], t))
        return np.array(columns).T
    if form == "matrix":
        return np.reshape(values, (3, 3))
    a, b = np.reshape(values, (2, 3))
    three = np.stack([a, b, np.cross(a, b)])
    return three if form == "rot6d_rows" else three.T


@given(st.lists(ANGLES, min_size=3, max_size=3), st.sampled_from(FORMS))
@settings(max_examples=300, deadline=None)
def test_every_form_goes_there_and_back_and_means_its_definition(angles, form):
    matrix = by_hand(angles, "euler_XYZ")
    values = from_matrix(matrix, form)
    assert values.shape == (size_of(form),)
    np.testing.assert_allclose(by_hand(values, form), matrix, atol=3e-7)  # poles: the last angle is set to 0
    np.testing.assert_allclose(to_matrix(values, form), matrix, atol=3e-7)


@given(st.lists(ANGLES, min_size=3, max_size=3), st.sampled_from(EULER))
@settings(max_examples=150, deadline=None)
def test_euler_angles_mean_their_definition(angles, form):
    np.testing.assert_allclose(to_matrix(angles, form), by_hand(angles, form), atol=1e-14)


@pytest.mark.parametrize("size", [0.0, 1e-300, 1e-12, 1e-8, 1e-4, 1.0, np.pi - 1e-9, np.pi])
def test_axis_angle_of_any_size(size):
    values = size * np.array([0.6, 0.0, -0.8])
    np.testing.assert_allclose(to_matrix(values, "axis_angle"), by_hand(values, "axis_angle"), atol=1e-15)
    back = from_matrix(to_matrix(values, "axis_angle"), "axis_angle")
    np.testing.assert_allclose(back, values, rtol=1e-9, atol=1e-300 if size < 1e-200 else 0)


@pytest.mark.parametrize(("form", "to"), itertools.product(["euler_zyx", "euler_XYZ", *SIZES], repeat=2))
def test_forms_convert_in_batches_and_torch_gives_the_same(form, to):
    values = convert_rotation(np.random.default_rng(0).uniform(-1.5, 1.5, (4, 5, 3)), "euler_xyz", form)
    there = convert_rotation(values, form, to)
    assert there.shape == (4, 5, size_of(to))
    assert (there[2, 3] == convert_rotation(values[2, 3], form, to)).all()
    np.testing.assert_allclose(convert_rotation(there, to, form), values, atol=1e-12)
    tensor = convert_rotation(torch.from_numpy(values), form, to)
    assert tensor.dtype == torch.float64
    assert (tensor.numpy() == there).all()


def test_six_numbers_of_a_network_become_the_nearest_frame_by_gram_schmidt():
    """Zhou et al. 2019: the first column keeps its direction, the second loses what is along the first."""
    matrix = to_matrix([2.0, 0.0, 0.0, 3.0, 0.5, 0.0], "rot6d")
    np.testing.assert_allclose(matrix, np.eye(3), atol=1e-15)
    rows = from_matrix(by_hand([0.1, 0.2, 0.3], "euler_XYZ"), "rot6d_rows")
    np.testing.assert_allclose(rows, by_hand([0.1, 0.2, 0.3], "euler_XYZ")[:2].ravel(), atol=1e-15)


@given(
    st.lists(ANGLES, min_size=3, max_size=3), st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3),
    st.sampled_from(EULER), st.lists(st.sampled_from([-2, 0, 1]), min_size=3, max_size=3),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_nearest_triple_turns_the_same_and_is_no_further_than_the_one_it_came_from(angles, step, form, turns):
    target = np.array(angles) + step
    reference = np.array(angles) + 2 * np.pi * np.array(turns)
    near = nearest_euler(to_matrix(target, form), form, reference)
    np.testing.assert_allclose(to_matrix(near, form), to_matrix(target, form), atol=3e-7)
    assert (np.abs(near - reference) <= np.pi + 1e-9).all()
    # At a pole the last angle stays, elsewhere the triple that was turned away is found again.
    slack = 1e-5
    assert np.abs(near - reference).sum() <= np.abs(step).sum() + slack


@pytest.mark.parametrize("form", ["euler_XYZ", "euler_xyz", "euler_ZYX"])
def test_at_the_pole_the_last_angle_stays(form):
    here = np.array([0.4, np.pi / 2, -1.1])
    np.testing.assert_allclose(nearest_euler(to_matrix(here, form), form, here), here, atol=1e-7)


def test_wrap_keeps_what_is_inside_and_the_direction():
    angles = np.array([0.1, np.pi, -np.pi, 3 * np.pi, -7.0, 1e-300])
    wrapped = wrap(angles)
    assert wrapped[0] == 0.1
    assert wrapped[1] == np.pi
    assert wrapped[5] == 1e-300
    assert ((wrapped > -np.pi) & (wrapped <= np.pi)).all()
    np.testing.assert_allclose(np.exp(1j * wrapped), np.exp(1j * angles), atol=1e-15)


@pytest.mark.parametrize(
    ("values", "form", "message"),
    [
        ([1, 2, 3], "euler_xxy", "no rotation is written as 'euler_xxy'"),
        ([1, 2, 3], "euler_xYz", "no rotation is written"),
        ([1, 2, 3], "quat", "quat_xyzw"),
        ([1, 2, 3], "quat_xyzw", "has 4 numbers"),
        ([0, 0, 0, 0], "quat_wxyz", "length 0"),
        ([1, 0, 0, 2, 0, 0], "rot6d", "parallel"),
        ([0, 0, 0, 2, 0, 0], "rot6d", "zero or parallel"),
        ([1, 0, 0, 0, 1, 0, 0, 0, -1], "matrix", "determinant -1"),
        ([1, 0, 0, 0, 2, 0, 0, 0, 1], "matrix", "is no rotation"),
        ([1, 2, np.nan], "euler_xyz", "NaN"),
        (["a", "b", "c"], "euler_xyz", "must be numbers"),
        ([[1, 2], [3]], "euler_xyz", "must be numbers"),
    ],
)
def test_what_is_no_rotation_raises(values, form, message):
    with pytest.raises(ActionSpaceError, match=message):
        to_matrix(values, form)


def test_other_refusals_raises():
    with pytest.raises(ActionSpaceError, match="detach"):
        to_matrix(torch.zeros(3, requires_grad=True), "axis_angle")
    with pytest.raises(ActionSpaceError, match=r"\(..., 3, 3\)"):
        from_matrix(np.zeros(9), "axis_angle")
    with pytest.raises(ActionSpaceError, match="nearest triple"):
        nearest_euler(np.eye(3), "axis_angle", np.zeros(3))
