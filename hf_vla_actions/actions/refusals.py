"""What does not follow from two spaces, each with what would have to be said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hf_vla_actions.actions.motion import Side
from hf_vla_actions.actions.space import ActionSpace
from hf_vla_actions.actions.units import is_angle
from hf_vla_actions.errors import ActionSpaceError

KINDS = {True: "delta", False: "absolute", None: "delta or absolute, nobody has said"}


def check_rate(source: ActionSpace, to: ActionSpace) -> None:
    """Refuse another control rate."""
    if source.rate_hz is not None and to.rate_hz is not None and source.rate_hz != to.rate_hz:
        raise ActionSpaceError(
            f"actions at {source.rate_hz:g} Hz do not become actions at {to.rate_hz:g} Hz here: that takes other steps "
            "(and smaller or larger changes). Resample first, or give both spaces the rate of the chunk"
        )


def check_frames(source: ActionSpace, to: ActionSpace) -> None:
    """Refuse a frame that nobody has said, and joints for Cartesian axes."""
    here, there = source.frame, to.frame
    if here == there:
        return
    if here is None or there is None:
        raise ActionSpaceError(
            f"the frame of the {'source' if here is None else 'target'} is not said (the other one is "
            f"{there or here!r}): say frame='world', 'base', 'tcp' or 'joint'"
        )
    if "joint" in (here, there):
        raise ActionSpaceError(
            f"from {here!r} to {there!r} takes the kinematics of the robot, which nobody has given: use its controller"
        )


def check_anchors(here: str | None, there: str | None) -> None:
    """Refuse changes of which nobody has said what they are relative to; "" where there are no changes."""
    for which, anchor in (("source", here), ("target", there)):
        if anchor is None:
            raise ActionSpaceError(
                f"nobody has said what the changes of the {which} are relative to, and a chunk of several steps depends "
                "on it: say anchor='step' (each to the state before it) or anchor='chunk' (all to the first state)"
            )


def check_reference(a: Side, b: Side, shift: bool, turn: bool) -> None:
    """Refuse changes without anchor or axes, where the way goes through what they are relative to."""
    changes = [(shift and side.position_delta) or (turn and side.rotation_delta) for side in (a, b)]
    check_anchors(a.anchor if changes[0] else "", b.anchor if changes[1] else "")
    _check_axes(a.frame)


def _check_axes(frame: str | None) -> None:
    if frame is None:
        raise ActionSpaceError(
            "nobody has said along which axes the changes go: say frame='world', 'base', 'tcp' or 'joint' in both spaces"
        )


def check_kinds(what: str, kinds: Sequence[Sequence[bool | None]], a: Side, b: Side) -> None:
    """Refuse a position or rotation of which some numbers are changes and some are not, unless nothing happens to it."""
    one, two = (list(kind) for kind in kinds)
    unclear = {*one} not in ({True}, {False}) or {*two} not in ({True}, {False})
    same = one == two or {*one} == {*two} == {None}  # two forms of a rotation have different sizes
    if unclear and not (same and a.anchor == b.anchor):
        said = [", ".join(dict.fromkeys(KINDS[kind] for kind in side)) for side in (one, two)]
        raise ActionSpaceError(f"the {what} is {said[0]} here and {said[1]} there: say delta= in both spaces")


def check_motion(sides: Iterable[tuple[str, Side, ActionSpace]], shift: bool, turn: bool, turns_axes: bool) -> None:
    """Refuse a position or rotation that is not described well enough to become another.

    Args:
        sides: "source" and "target" with what they say.
        shift: whether the position changes.
        turn: whether the rotation does.
        turns_axes: whether the position needs to know the rotation.
    """
    for which, side, space in sides:
        for what, concerned, delta in (
            ("position", shift, side.position_delta),
            ("rotation", turn or turns_axes, side.rotation_delta),
        ):
            if concerned and delta is None:
                raise ActionSpaceError(f"the {what} of the {which} is {KINDS[None]}: say delta=")
            if concerned and side.frame == "tcp" and not delta:
                raise ActionSpaceError(
                    f"the {what} of the {which} is in the frame 'tcp' but no change: a target seen from the tool is a "
                    "change from where it is, so say delta=True"
                )
        if not (turn or turns_axes):
            continue
        if side.form is None:
            raise ActionSpaceError(
                f"nobody has said how the rotation of the {which} is written ({list(space.names)}): say "
                "pose=PoseDims(position, rotation, form='euler_xyz', ...), for changes of Euler angles with turns="
            )
        if side.rotation_delta and side.turns is None:
            raise ActionSpaceError(
                f"a change of the Euler angles of the {which} is their difference for some and the rotation in between for "
                "others: say PoseDims(..., turns='difference') or turns='compose'"
            )
        if side.subtracts and side.frame == "tcp":
            raise ActionSpaceError(f"in the frame 'tcp' of the {which} changes are composed: say turns='compose'")


def check_alone(source: ActionSpace, to: ActionSpace, i: int, way: str, others: Sequence[int]) -> None:
    """Refuse a dimension by itself that depends on axes or on other dimensions.

    Args:
        source: its space.
        to: the other one.
        i: its index.
        way: what happens to it: "same", or it becomes a change, a target or another change.
        others: indices in `to` of those that go by themselves after it.
    """
    poses = source.known_pose(), to.known_pose()
    free = source.units[i] is None and all(pose is not None and pose.rotation for pose in poses)
    same_axes = source.frame == to.frame and (source.frame != "tcp" or way == "same")
    if not (free or same_axes):
        raise ActionSpaceError(
            f"{source.describe(i)} cannot be said along other axes by itself: it is part of no pose. Say "
            "pose=PoseDims(position, rotation, form) in both spaces, or leave it out with drop="
        )
    if way == "same" or free:
        return
    _check_axes(source.frame)
    angles = [j for j in others if is_angle(to.units[j])]
    if source.frame != "joint" and is_angle(source.units[i]) and angles:
        raise ActionSpaceError(
            f"{source.names[i]!r} and {[to.names[j] for j in angles]} are angles, and nobody has said of what: if they are "
            "a rotation say pose=PoseDims(position, rotation, form, turns), if they are joints say frame='joint'"
        )
