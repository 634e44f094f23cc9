"""Axes and reference points of actions, as pairs of inverses: world and tool frame, delta and absolute.

Angles are radians, positions in any one unit. NumPy or torch goes in, float64 of the same kind comes out. The tool frame is
that of the tool center point (TCP). What a "change of rotation" is, data sets do not agree on; both readings are named:

    "difference"  Euler angles of the next orientation minus those of this one (CALVIN, BridgeData V2)
    "compose"     the rotation that leads from this orientation to the next: about the axes of the frame
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_vla_actions.actions.arrays import like, read_numbers
from hf_vla_actions.actions.rotations import euler_order, from_matrix, nearest_euler, to_matrix, wrap
from hf_vla_actions.errors import ActionSpaceError

ANCHORS = ("step", "chunk")
TURNS = ("difference", "compose")
CALVIN_FORM = "euler_XYZ"


def to_tcp(actions: Any, euler: Any, form: str = CALVIN_FORM, turns: str = "difference") -> Any:
    """Changes along the axes of the world to changes along those of the tool, exactly; inverse of `to_world`.

    Args:
        actions: (..., dof) with dof >= 6: three changes of position, three of rotation (`form`, rad), then numbers that
            stay as they are (the gripper).
        euler: orientation of the tool before each action: (..., 3) with the leading axes of the actions, or (3,).
        form: "euler_" and the axes, for all angles.
        turns: how rotation is meant in the world: "difference" or "compose" (see above); in the tool frame it is
            always the rotation that leads to the next orientation.

    Returns:
        (..., dof); the rotation is about the axes of the tool as it stands.
    """
    moves, angles, rest, here = _parts(actions, euler, form, turns)
    after = to_matrix(angles + moves[1], form) if turns == "difference" else to_matrix(moves[1], form) @ here
    back = here.swapaxes(-1, -2)
    turned = from_matrix(back @ after, form)
    return like(actions)(np.concatenate([_apply(back, moves[0]), turned, rest], axis=-1))


def to_world(actions: Any, euler: Any, form: str = CALVIN_FORM, turns: str = "difference") -> Any:
    """Changes along the axes of the tool to changes along those of the world, exactly; inverse of `to_tcp`.

    Differences of Euler angles are the nearest ones, each in (-pi, pi]: with the pitch before and after within 90
    degrees of zero they are the only small ones.

    Args:
        actions: (..., dof) as `to_tcp` returns them.
        euler: orientation of the tool before each action, rad.
        form: as in `to_tcp`.
        turns: as in `to_tcp`.
    """
    moves, angles, rest, here = _parts(actions, euler, form, turns)
    after = here @ to_matrix(moves[1], form)
    if turns == "difference":
        turned = nearest_euler(after, form, angles) - angles
    else:
        turned = from_matrix(after @ here.swapaxes(-1, -2), form)
    return like(actions)(np.concatenate([_apply(here, moves[0]), turned, rest], axis=-1))


def to_tcp_robovlms(actions: Any, euler: Any, scale: float = 0.01) -> Any:
    """The rule that RoboVLMs trains CALVIN policies with; inverse of `to_world_robovlms`.

    Position by the inverse orientation. Rotation: Euler angles (XYZ about moving axes) plus the change times `scale`
    give a new orientation, and the Euler angles of the *old* one seen from the *new* one, divided by `scale`, are the
    result. So it has the opposite sign of `to_tcp`, and is its linear part: a policy trained on these numbers must be
    undone by `to_world_robovlms`, by nothing else. How far the two are apart: `docs/spaces.md`.

    Source: Robot-VLAs/RoboVLMs, `robovlms/data/data_utils.py` (`world_to_tcp_frame`).

    Args:
        actions: (..., dof), dof >= 6, rotation as difference of Euler angles, in any unit (CALVIN's is 0.05 rad).
        euler: orientation before each action, rad: (..., 3) with the leading axes of the actions, or (3,).
        scale: what the change of rotation is multiplied with, and divided by afterwards.
    """
    moves, angles, rest, here = _parts(actions, euler, CALVIN_FORM, "difference")
    after = to_matrix(angles + moves[1] * scale, CALVIN_FORM)
    turned = from_matrix(after.swapaxes(-1, -2) @ here, CALVIN_FORM) / scale
    return like(actions)(np.concatenate([_apply(here.swapaxes(-1, -2), moves[0]), turned, rest], axis=-1))


def to_world_robovlms(actions: Any, euler: Any, scale: float = 0.01) -> Any:
    """Undo `to_tcp_robovlms`; arguments as there (`tcp_to_world_frame` of the same source)."""
    moves, angles, rest, here = _parts(actions, euler, CALVIN_FORM, "difference")
    after = here @ to_matrix(moves[1] * scale, CALVIN_FORM).swapaxes(-1, -2)
    turned = (nearest_euler(after, CALVIN_FORM, angles) - angles) / scale
    return like(actions)(np.concatenate([_apply(here, moves[0]), turned, rest], axis=-1))


def to_delta(targets: Any, state: Any, anchor: str = "chunk", mask: Any = None, angles: Any = None) -> Any:
    """Targets to changes, number by number; inverse of `to_absolute`.

    Args:
        targets: (..., horizon, dof).
        state: (..., dof) where the robot is when the chunk begins; the leading axes of the targets, or none.
        anchor: "chunk": every step is relative to that state (openpi's `DeltaActions`, src/openpi/transforms.py);
            "step": each step is relative to the one before, so changes add up (bridge).
        mask: (dof,) bool, True where a number becomes a change; the others stay targets (the gripper). All if None.
        angles: (dof,) bool, True for angles (rad) that are the same after a whole turn: changes, and the targets that
            `to_absolute` makes of them, are in (-pi, pi]. For joints that turn further leave it out.
    """
    x, start, mask, angles = _additive(targets, state, anchor, mask, angles)
    before = start if anchor == "chunk" else np.concatenate([start, x[..., :-1, :]], axis=-2)
    change = x - before
    return like(targets)(np.where(mask, np.where(angles, wrap(change), change), x))


def to_absolute(deltas: Any, state: Any, anchor: str = "chunk", mask: Any = None, angles: Any = None) -> Any:
    """Changes to targets, number by number; inverse of `to_delta`, arguments as there."""
    x, start, mask, angles = _additive(deltas, state, anchor, mask, angles)
    target = start + (x if anchor == "chunk" else np.cumsum(x, axis=-2))
    return like(deltas)(np.where(mask, np.where(angles, wrap(target), target), x))


def to_turns(matrices: Any, start: Any, anchor: str = "chunk", frame: str = "world") -> Any:
    """Orientations to the rotations that lead to them; inverse of `to_orientations`.

    Args:
        matrices: (..., horizon, 3, 3) orientations aimed at.
        start: (..., 3, 3) orientation when the chunk begins.
        anchor: "chunk": from the start to each step; "step": from each step to the next.
        frame: "tcp": about the axes of the tool where the rotation begins; "world" or "base": about fixed axes.

    Returns:
        (..., horizon, 3, 3).
    """
    goal, first = _orientations(matrices, start, anchor, frame)
    before = first if anchor == "chunk" else np.concatenate([first, goal[..., :-1, :, :]], axis=-3)
    back = before.swapaxes(-1, -2)
    return like(matrices)(back @ goal if frame == "tcp" else goal @ back)


def to_orientations(turns: Any, start: Any, anchor: str = "chunk", frame: str = "world") -> Any:
    """Rotations to the orientations that they lead to; inverse of `to_turns`, arguments as there."""
    turn, first = _orientations(turns, start, anchor, frame)
    if anchor == "chunk":
        return like(turns)(first @ turn if frame == "tcp" else turn @ first)
    now, steps = first[..., 0, :, :], []
    for t in range(turn.shape[-3]):
        now = now @ turn[..., t, :, :] if frame == "tcp" else turn[..., t, :, :] @ now
        steps.append(now)
    return like(turns)(np.stack(steps, axis=-3))


def _apply(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(..., 3, 3) on (..., 3)."""
    return (matrices @ vectors[..., None])[..., 0]


def _parts(actions: Any, euler: Any, form: str, turns: str):
    """((position, rotation), angles, what stays, orientation) of a pose action."""
    if euler_order(form) is None:
        raise ActionSpaceError(f"changes of rotation are Euler angles here, got the form {form!r}")
    _check("turns", turns, TURNS)
    x, angles = read_numbers("actions", actions), read_numbers("euler", euler)
    if x.ndim < 1 or x.shape[-1] < 6:
        raise ActionSpaceError(f"pose actions are (..., dof) with three positions and three angles, got {x.shape}")
    if angles.shape[-1:] != (3,) or (angles.ndim > 1 and angles.shape[:-1] != x.shape[:-1]):
        raise ActionSpaceError(f"euler is (3,) or {(*x.shape[:-1], 3)} for actions {x.shape}, got {angles.shape}")
    angles = np.broadcast_to(angles, (*x.shape[:-1], 3))
    return (x[..., :3], x[..., 3:6]), angles, x[..., 6:], to_matrix(angles, form)


def _additive(values: Any, state: Any, anchor: str, mask: Any, angles: Any):
    _check("anchor", anchor, ANCHORS)
    x, start = read_numbers("actions", values), read_numbers("state", state)
    if x.ndim < 2 or start.ndim < 1 or start.shape[-1] != x.shape[-1]:
        raise ActionSpaceError(
            f"actions are (..., horizon, dof) and state (..., dof), got {x.shape} and {start.shape}"
        )
    if start.ndim > 1 and start.shape[:-1] != x.shape[:-2]:
        raise ActionSpaceError(f"state is {(*x.shape[:-2], x.shape[-1])} or (dof,), got {start.shape}")
    start = np.broadcast_to(start, (*x.shape[:-2], x.shape[-1]))[..., None, :]
    masks = []
    for name, given, default in (("mask", mask, True), ("angles", angles, False)):
        array = np.full(x.shape[-1], default) if given is None else np.asarray(given)
        if array.dtype != bool or array.shape != x.shape[-1:]:
            raise ActionSpaceError(f"{name} is {x.shape[-1]} times True or False, got {given!r}")
        masks.append(array)
    return x, start, masks[0], masks[1]


def _orientations(matrices: Any, start: Any, anchor: str, frame: str) -> tuple[np.ndarray, np.ndarray]:
    _check("anchor", anchor, ANCHORS)
    _check("frame", frame, ("world", "base", "tcp"))
    x, first = read_numbers("matrices", matrices), read_numbers("start", start)
    if x.ndim < 3 or x.shape[-2:] != (3, 3) or first.shape[-2:] != (3, 3):
        raise ActionSpaceError(
            f"matrices are (..., horizon, 3, 3) and start (..., 3, 3), got {x.shape} and {first.shape}"
        )
    if first.ndim > 2 and first.shape[:-2] != x.shape[:-3]:
        raise ActionSpaceError(f"start is {(*x.shape[:-3], 3, 3)} or (3, 3), got {first.shape}")
    return x, np.broadcast_to(first, (*x.shape[:-3], 3, 3))[..., None, :, :]


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ActionSpaceError(f"{name} is one of {list(allowed)}, got {value!r}")
