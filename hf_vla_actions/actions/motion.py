"""Positions and rotations of one space in another: frame, delta or absolute, what changes are relative to, rotation form.

`move` takes the short way where there is one and otherwise goes through the absolute poses that the actions aim at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_vla_actions.actions.frames import to_absolute, to_delta, to_orientations, to_turns
from hf_vla_actions.actions.rotations import euler_order, from_matrix, nearest_euler, to_matrix


@dataclass(frozen=True)
class Side:
    """What a space says about its position and rotation.

    Args:
        frame: axes.
        anchor: what changes are relative to.
        position_delta: whether the position is a change.
        rotation_delta: whether the rotation is a change.
        form: how the rotation is written.
        turns: what a change of Euler angles means.
    """

    frame: str | None
    anchor: str | None
    position_delta: bool | None
    rotation_delta: bool | None
    form: str | None
    turns: str | None

    @property
    def subtracts(self) -> bool:
        """Whether rotations are differences of Euler angles."""
        return self.rotation_delta is True and self.turns == "difference"

    def position_facts(self) -> tuple:
        """What the numbers of a position depend on."""
        return self.frame, self.position_delta, self.anchor if self.position_delta else None

    def rotation_facts(self) -> tuple:
        """What the numbers of a rotation depend on."""
        facts = (self.frame, self.rotation_delta, self.anchor if self.rotation_delta else None, self.form)
        return (*facts, self.turns if self.rotation_delta and self.form and euler_order(self.form) else None)


@dataclass(frozen=True)
class Here:
    """Where the tool is when the chunk begins; None for what nobody has said.

    Args:
        position: (..., 3) m.
        matrix: (..., 3, 3) orientation.
        euler: Euler angles (..., 3) as they were given, by form: they say more than the matrix.
    """

    position: np.ndarray | None = None
    matrix: np.ndarray | None = None
    euler: tuple[str, np.ndarray] | None = None

    def angles(self, form: str) -> np.ndarray:
        """(..., 3) Euler angles in a form."""
        if self.euler is not None and self.euler[0] == form:
            return self.euler[1]
        return from_matrix(self.matrix, form)


@dataclass(frozen=True)
class Needs:
    """What has to be known beside the actions."""

    position: bool
    rotation: bool
    base: bool


def needs_of(a: Side, b: Side, has_position: bool, has_rotation: bool) -> Needs:
    """What `move` needs to get from `a` to `b`."""
    shift = has_position and a.position_facts() != b.position_facts()
    turn = has_rotation and a.rotation_facts() != b.rotation_facts()
    base = {a.frame, b.frame} == {"world", "base"} and (shift or turn)
    place = shift and a.position_delta is not b.position_delta
    if _is_turned_base(a, b, has_position, has_rotation) or (turn and (_is_rewritten(a, b) or _is_summed(a, b))):
        return Needs(place, False, base)
    # Absolute rotations have no reference, and what both are relative to cancels.
    refers = (turn and (a.rotation_delta or b.rotation_delta)) or (shift and "tcp" in (a.frame, b.frame))
    return Needs(place, bool(refers) and not (a.frame == b.frame and _composed(a, b)), base)


def move(
    position: np.ndarray | None, rotation: np.ndarray | None, a: Side, b: Side, here: Here, base: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Say positions and rotations of one side as the other does; what is missing in `here` must not be needed.

    Args:
        position: (..., horizon, 3) m.
        rotation: (..., horizon, k) rad where there are angles.
        a: what they mean.
        b: what they shall mean.
        here: where the tool is when the chunk begins, in the frame of `a` (of `b` if `a` is in the tool's).
        base: (4, 4) pose of the base in the world, if one is in the base's frame and one in the world's.
    """
    shift = position is not None and a.position_facts() != b.position_facts()
    turn = rotation is not None and a.rotation_facts() != b.rotation_facts()
    if _is_turned_base(a, b, position is not None, rotation is not None) and base is not None:
        return _turn_axes(position, rotation, a, b, base if a.frame == "base" else _inverse(base))
    if rotation is not None and turn and (_is_rewritten(a, b) or _is_summed(a, b)):
        rotation, turn = _in_place(rotation, a, b), False
    if not shift and not turn:
        return position, rotation
    here = _filled(here, position if position is not None else rotation)
    # Without a rotation among the actions the tool keeps the one it has, and `_axes` needs no aims.
    tool = turn or "tcp" in (a.frame, b.frame)
    aims = _aims(rotation, a, here) if tool and rotation is not None and a.form is not None else None
    goals = _goals(position, a, here, aims) if shift else None
    if base is not None and a.frame != b.frame:
        matrix = base if a.frame == "base" else _inverse(base)
        here, aims, goals = _moved(here, aims, goals, matrix)
    new_rotation = _rotation_of(aims, b, here) if turn and aims is not None else rotation
    return (_position_of(goals, b, here, aims) if goals is not None else position), new_rotation


def _composed(a: Side, b: Side) -> bool:
    """Whether rotations of both are changes by composition: then the orientation at the start cancels."""
    return a.rotation_delta is True and b.rotation_delta is True and not (a.subtracts or b.subtracts)


def _is_rewritten(a: Side, b: Side) -> bool:
    """Whether rotations differ in their form alone, and no reference is needed for that."""
    return a.rotation_facts()[:3] == b.rotation_facts()[:3] and (not a.rotation_delta or _composed(a, b))


def _is_summed(a: Side, b: Side) -> bool:
    """Whether both are differences of the same Euler angles, summed up or not."""
    return a.subtracts and b.subtracts and (a.frame, a.form) == (b.frame, b.form)


def _in_place(rotation: np.ndarray, a: Side, b: Side) -> np.ndarray:
    if _is_rewritten(a, b):
        return from_matrix(to_matrix(rotation, str(a.form)), str(b.form))
    start = np.zeros(3)
    return to_delta(to_absolute(rotation, start, a.anchor or "step"), start, b.anchor or "step")


def _is_turned_base(a: Side, b: Side, has_position: bool, has_rotation: bool) -> bool:
    """Whether changes are only seen along other fixed axes."""
    fixed = {a.frame, b.frame} == {"world", "base"} and a.anchor == b.anchor
    moves = not has_position or (a.position_delta is True and b.position_delta is True)
    return fixed and moves and (not has_rotation or _composed(a, b))


def _turn_axes(position, rotation, a: Side, b: Side, base: np.ndarray):
    axes = base[:3, :3]
    moved = None if position is None else position @ axes.T
    if rotation is None:
        return moved, None
    return moved, from_matrix(axes @ to_matrix(rotation, str(a.form)) @ axes.T, str(b.form))


def _inverse(pose: np.ndarray) -> np.ndarray:
    turned = pose[:3, :3].T
    return np.block([[turned, -turned @ pose[:3, 3:]], [np.zeros((1, 3)), np.ones((1, 1))]])


def _filled(here: Here, values: np.ndarray | None) -> Here:
    """Anything where nothing is needed: it cancels."""
    leading = values.shape[:-2] if values is not None else ()
    position = np.zeros(3) if here.position is None else here.position
    matrix = np.eye(3) if here.matrix is None else here.matrix
    euler = here.euler
    if euler is not None:
        euler = (euler[0], np.broadcast_to(euler[1], (*leading, 3)))
    return Here(np.broadcast_to(position, (*leading, 3)), np.broadcast_to(matrix, (*leading, 3, 3)), euler)


def _aims(rotation: np.ndarray, a: Side, here: Here) -> np.ndarray:
    """(..., horizon, 3, 3) orientations that rotations lead to."""
    form = str(a.form)
    if not a.rotation_delta:
        return to_matrix(rotation, form)
    if a.subtracts:
        return to_matrix(to_absolute(rotation, here.angles(form), a.anchor or "step"), form)
    return to_orientations(to_matrix(rotation, form), here.matrix, a.anchor or "step", a.frame or "base")


def _rotation_of(aims: np.ndarray, b: Side, here: Here) -> np.ndarray:
    """(..., horizon, k) rotations that lead to orientations; inverse of `_aims`."""
    form, anchor = str(b.form), b.anchor or "step"
    if not b.rotation_delta:
        return from_matrix(aims, form)
    if not b.subtracts:
        return from_matrix(to_turns(aims, here.matrix, anchor, b.frame or "base"), form)
    before, changes = here.angles(form), []
    for t in range(aims.shape[-3]):
        after = nearest_euler(aims[..., t, :, :], form, before)
        changes.append(after - before)
        before = after if anchor == "step" else before
    return np.stack(changes, axis=-2)


def _goals(position: np.ndarray | None, a: Side, here: Here, aims: np.ndarray | None) -> np.ndarray:
    """(..., horizon, 3) positions that moves lead to."""
    if not a.position_delta:
        return np.asarray(position)
    moves = np.asarray(position)
    if a.frame == "tcp":
        moves = (_axes(a, here, aims) @ moves[..., None])[..., 0]
    return to_absolute(moves, here.position, a.anchor or "step")


def _position_of(goals: np.ndarray, b: Side, here: Here, aims: np.ndarray | None) -> np.ndarray:
    """(..., horizon, 3) moves that lead to positions; inverse of `_goals`."""
    if not b.position_delta:
        return goals
    moves = to_delta(goals, here.position, b.anchor or "step")
    if b.frame == "tcp":
        moves = (_axes(b, here, aims).swapaxes(-1, -2) @ moves[..., None])[..., 0]
    return moves


def _axes(side: Side, here: Here, aims: np.ndarray | None) -> np.ndarray:
    """(..., horizon, 3, 3) axes of the tool in which each move is expressed: those before it, or those at the start."""
    first = np.asarray(here.matrix)[..., None, :, :]
    if side.anchor == "chunk" or aims is None:
        return first
    return np.concatenate([first, aims[..., :-1, :, :]], axis=-3)


def _moved(here: Here, aims, goals, pose: np.ndarray):
    """The same in other fixed axes."""
    axes, origin = pose[:3, :3], pose[:3, 3]
    start = Here(np.asarray(here.position) @ axes.T + origin, axes @ np.asarray(here.matrix))
    return start, None if aims is None else axes @ aims, None if goals is None else goals @ axes.T + origin
