"""Rotations in every form that data sets use, as pairs of inverses: `to_matrix` and `from_matrix`.

All of them take (..., k) numbers or matrices (..., 3, 3), NumPy or torch (float64 on the way out, no gradient). Angles are
radians. The work is done by `scipy.spatial.transform.Rotation`.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_vla_actions.actions.arrays import like, read_numbers
from hf_vla_actions.errors import ActionSpaceError

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

SIZES = {"quat_xyzw": 4, "quat_wxyz": 4, "axis_angle": 3, "rot6d": 6, "rot6d_rows": 6, "matrix": 9}
FORMS = (
    "euler_xyz and any other order (lower case: about fixed axes, one after the other; upper case: about the moving "
    "axes, as in scipy), " + ", ".join(SIZES)
)
ORTHOGONAL = 1e-3  # entries of R^T R may be off by this; then the nearest rotation is taken
AT_POLE = 1e-7  # rad from the singular middle angle of an Euler triple


def euler_order(form: str) -> str | None:
    """The axes of an Euler form, as scipy takes them ("xyz", "ZYX", ...); None for another form.

    Raises:
        ActionSpaceError: a form that there is not.
    """
    if form in SIZES:
        return None
    match = re.fullmatch(r"euler_([xyz]{3}|[XYZ]{3})", form) if isinstance(form, str) else None
    if match is None or match[1][0] == match[1][1] or match[1][1] == match[1][2]:
        raise ActionSpaceError(f"no rotation is written as {form!r}; there are {FORMS}")
    return match[1]


def size_of(form: str) -> int:
    """Numbers that a rotation has in a form."""
    return 3 if euler_order(form) else SIZES[form]


def to_matrix(values: Any, form: str) -> Any:
    """Rotations in a form to matrices; inverse of `from_matrix`.

    Args:
        values: (..., k), k = `size_of(form)`; quaternions need not have length 1, and two columns (rot6d) need not be
            orthogonal: Gram-Schmidt makes them so, the first one keeps its direction.
        form: "euler_" and the axes ("xyz": about fixed axes in turn; "XYZ": about the moving axes), "quat_xyzw",
            "quat_wxyz", "axis_angle" (axis times angle), "rot6d" (the first two columns one after the other; Zhou et
            al. 2019, arXiv:1812.07035), "rot6d_rows" (the first two rows, as in pytorch3d), "matrix" (row by row).

    Returns:
        (..., 3, 3) float64.

    Raises:
        ActionSpaceError: an unknown form, a wrong size, numbers that are no rotation.
    """
    axes, size = euler_order(form), size_of(form)
    array = read_numbers("the rotation", values)
    if array.ndim < 1 or array.shape[-1] != size:
        raise ActionSpaceError(f"{form} has {size} numbers on the last axis, got shape {array.shape}")
    rows = array.reshape(-1, size)
    if not len(rows):
        matrix = np.zeros((0, 3, 3))
    elif axes:
        matrix = _scipy().from_euler(axes, rows).as_matrix()
    elif form.startswith("quat"):
        matrix = _from_quaternion(rows if form == "quat_xyzw" else rows[:, [1, 2, 3, 0]])
    elif form == "axis_angle":
        matrix = _scipy().from_rotvec(rows).as_matrix()
    elif form == "matrix":
        matrix = _nearest(rows.reshape(-1, 3, 3))
    else:
        columns = _gram_schmidt(rows.reshape(-1, 2, 3))
        matrix = columns if form == "rot6d_rows" else columns.swapaxes(-1, -2)
    return like(values)(matrix.reshape(*array.shape[:-1], 3, 3))


def from_matrix(matrix: Any, form: str) -> Any:
    """Matrices to rotations in a form; inverse of `to_matrix`, but for what a rotation can be written as twice.

    Of these the usual one is chosen: a scalar part of a quaternion that is not negative, an angle of at most pi, a
    middle Euler angle in [-pi/2, pi/2] (in [0, pi] if the first and the last axis are the same); where only the sum or
    difference of the outer Euler angles counts (gimbal lock), the last one is 0. See `nearest_euler`.

    Args:
        matrix: (..., 3, 3).
        form: as in `to_matrix`.

    Returns:
        (..., k) float64.

    Raises:
        ActionSpaceError: an unknown form; matrices that are no rotations (more than 1e-3 off, or a reflection).
    """
    axes = euler_order(form)
    array = read_numbers("the matrix", matrix)
    if array.shape[-2:] != (3, 3):
        raise ActionSpaceError(f"rotation matrices have shape (..., 3, 3), got {array.shape}")
    if not array.size:
        return like(matrix)(np.zeros((*array.shape[:-2], size_of(form))))
    rotation = _scipy().from_matrix(_nearest(array.reshape(-1, 3, 3)))
    if axes:
        values = _euler(rotation, axes)
    elif form.startswith("quat"):
        values = rotation.as_quat(canonical=True)
        values = values if form == "quat_xyzw" else values[:, [3, 0, 1, 2]]
    elif form == "axis_angle":
        values = rotation.as_rotvec()
    else:
        exact = rotation.as_matrix()
        columns = exact if form in ("matrix", "rot6d_rows") else exact.swapaxes(-1, -2)
        values = columns.reshape(-1, 9)[:, : SIZES[form]]
    return like(matrix)(values.reshape(*array.shape[:-2], -1))


def convert_rotation(values: Any, form: str, to: str) -> Any:
    """Rotations (..., k) from one form to another; its own inverse with the forms exchanged."""
    return from_matrix(to_matrix(values, form), to)


def nearest_euler(matrix: Any, form: str, reference: Any) -> Any:
    """The Euler angles of rotations that are closest to others: no jump by 2 pi, nor to the other triple, nor at a pole.

    Every rotation has two triples of Euler angles (and all of them plus 2 pi), and infinitely many at gimbal lock,
    where the last angle is taken from `reference`. What is subtracted from the angles of the state before must be the
    one that a small turn leads to.

    Args:
        matrix: (..., 3, 3).
        form: "euler_" and the axes.
        reference: (..., 3) rad.

    Returns:
        (..., 3) rad, each within pi of `reference`, so not always in [-pi, pi].
    """
    axes = euler_order(form)
    if axes is None:
        raise ActionSpaceError(f"only Euler angles have a nearest triple, got {form!r}")
    near = read_numbers("reference", reference)
    first = from_matrix(read_numbers("the matrix", matrix), form)
    near = np.broadcast_to(near, first.shape)
    # (a, b, c) turns as (a + pi, pi - b, c + pi) does, or (a + pi, -b, c + pi) if the outer axes are the same.
    same_ends = axes[0].lower() == axes[2].lower()
    middle = -first[..., 1] if same_ends else np.pi - first[..., 1]
    second = np.stack([first[..., 0] + np.pi, middle, first[..., 2] + np.pi], axis=-1)
    pole = np.abs(np.sin(first[..., 1])) if same_ends else np.abs(np.cos(first[..., 1]))
    locked = _with_last(read_numbers("the matrix", matrix), axes, near[..., 2])
    triples = np.stack([np.where((pole < AT_POLE)[..., None], locked, first), second])
    turns = wrap(triples - near)
    better = (np.abs(turns[1]).sum(-1) < np.abs(turns[0]).sum(-1)) & (pole >= AT_POLE)
    return like(matrix)(near + np.where(better[..., None], turns[1], turns[0]))


def wrap(angles: Any) -> Any:
    """Angles (rad) to (-pi, pi]: the same direction, without whole turns."""
    array = read_numbers("angles", angles)
    inside = (array > -np.pi) & (array <= np.pi)
    return like(angles)(np.where(inside, array, np.pi - np.mod(np.pi - array, 2 * np.pi)))


def _scipy() -> type[Rotation]:
    from scipy.spatial.transform import Rotation  # not with the package: half a second

    return Rotation


def _with_last(matrix: np.ndarray, axes: str, last: np.ndarray) -> np.ndarray:
    """(..., 3) Euler angles of matrices at gimbal lock whose last angle is given."""
    if not last.size:
        return np.zeros((*last.shape, 3))
    undo = _scipy().from_euler(axes[2], -last.reshape(-1, 1)).as_matrix()
    flat = matrix.reshape(-1, 3, 3)
    rest = flat @ undo if axes.isupper() else undo @ flat
    angles = _euler(_scipy().from_matrix(rest), axes).reshape(*last.shape, 3)
    return np.stack([angles[..., 0], angles[..., 1], angles[..., 2] + last], axis=-1)


def _euler(rotation: Rotation, axes: str) -> np.ndarray:
    with warnings.catch_warnings():
        # The last angle is 0 at gimbal lock, as said above; the rotation is right all the same.
        warnings.filterwarnings("ignore", message="Gimbal lock", category=UserWarning)
        return rotation.as_euler(axes)


def _from_quaternion(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=-1)
    if (length < 1e-6).any():
        raise ActionSpaceError(f"quaternion {int((length < 1e-6).argmax())} has length 0, which is no rotation")
    return _scipy().from_quat(rows).as_matrix()


def _nearest(matrices: np.ndarray) -> np.ndarray:
    """The same matrices, if they are rotations but for rounding."""
    gram = np.swapaxes(matrices, -1, -2) @ matrices
    off = np.abs(gram - np.eye(3)).max(axis=(-1, -2))
    bad = (off > ORTHOGONAL) | (np.linalg.det(matrices) < 0)
    if bad.any():
        i = int(bad.argmax())
        raise ActionSpaceError(
            f"matrix {i} is no rotation: R^T R is off by {off[i]:.3g}, determinant {np.linalg.det(matrices[i]):.3g}"
        )
    return matrices


def _gram_schmidt(vectors: np.ndarray) -> np.ndarray:
    """(n, 3, 3) orthonormal rows from two vectors (n, 2, 3) each; the first keeps its direction."""
    first, second = vectors[:, 0], vectors[:, 1]
    size = np.linalg.norm(first, axis=-1, keepdims=True)
    one = first / np.where(size > 0, size, 1.0)
    rest = second - (one * second).sum(-1, keepdims=True) * one
    left = np.linalg.norm(rest, axis=-1, keepdims=True)
    bad = ((size <= 1e-9) | (left <= 1e-9 * np.maximum(size, np.linalg.norm(second, axis=-1, keepdims=True))))[:, 0]
    if bad.any():
        raise ActionSpaceError(f"rotation {int(bad.argmax())}: two vectors that are zero or parallel are no rotation")
    two = rest / left
    return np.stack([one, two, np.cross(one, two)], axis=1)
