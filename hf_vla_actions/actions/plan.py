"""What has to be done to say actions of one space in another, found out before any number is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hf_vla_actions.actions.gripper import check_gripper_way, convert_gripper
from hf_vla_actions.actions.motion import Needs, Side, needs_of
from hf_vla_actions.actions.pose import PoseDims
from hf_vla_actions.actions.refusals import (
    KINDS,
    check_alone,
    check_anchors,
    check_frames,
    check_kinds,
    check_motion,
    check_rate,
    check_reference,
)
from hf_vla_actions.actions.rotations import euler_order
from hf_vla_actions.actions.space import ActionSpace
from hf_vla_actions.actions.units import factor
from hf_vla_actions.errors import ActionSpaceError

Group = tuple[tuple[int, ...], np.ndarray]  # dimensions and what their numbers are multiplied with


@dataclass(frozen=True)
class Copy:
    """One dimension that goes by itself.

    Args:
        source: index in the source.
        to: index in the target.
        factor: of the units.
        way: "same"; "absolute" (from changes); "delta" (from targets); "anchor" (changes relative to something else).
    """

    source: int
    to: int
    factor: float
    way: str


@dataclass(frozen=True)
class PosePlan:
    """Position and rotation: their dimensions, to and from m and rad, and what they mean on both sides."""

    read: tuple[Group, Group]
    write: tuple[Group, Group]
    source: Side
    to: Side
    needs: Needs


@dataclass(eq=False)
class Plan:
    """All of it: dimensions that are copied, the gripper, the pose, and the texts that say so."""

    source: ActionSpace
    to: ActionSpace
    source_anchor: str | None
    to_anchor: str | None
    copies: list[Copy] = field(default_factory=list)
    gripper: tuple[int, int] | None = None
    pose: PosePlan | None = None
    texts: list[str] = field(default_factory=list)

    @property
    def needs_base(self) -> bool:
        """Whether the pose of the base in the world is needed."""
        return self.pose is not None and self.pose.needs.base

    @property
    def needs_opening(self) -> bool:
        """Whether the state of the gripper is needed."""
        a, b = self.source.gripper, self.to.gripper
        return self.gripper is not None and a is not None and b is not None and a.relative != b.relative

    @property
    def needs_numbers(self) -> list[int]:
        """Dimensions of the source whose state is needed, other than those of the pose."""
        return [copy.source for copy in self.copies if copy.way in ("absolute", "delta")]

    def needs_text(self) -> str:
        """What has to be given to `convert`, in words; "" if nothing."""
        parts = [self.source.names[i] for i in self.needs_numbers]
        if self.pose is not None:
            parts += ["the position"] * self.pose.needs.position + ["the orientation"] * self.pose.needs.rotation
        parts += ["whether the gripper is open"] * self.needs_opening
        texts = [f"state= with {', '.join(parts)} when the chunk begins"] if parts else []
        texts += ["base=, the pose of the base in the world"] if self.needs_base else []
        return f"needs {' and '.join(texts)}" if texts else ""

    def gripper_values(self, values: np.ndarray, is_open: np.ndarray | None) -> np.ndarray:
        """The gripper's numbers in the other convention.

        Args:
            values: (..., horizon).
            is_open: (...) bool, the state before the first step, where it is needed.
        """
        a, b = self.source.gripper, self.to.gripper
        return values if a is None or b is None else convert_gripper(values, a, b, is_open)


def make_plan(source: ActionSpace, to: ActionSpace, horizon: int | None, drop: Sequence[str] = ()) -> Plan:
    """The way from one space to another; raises if there is none. `horizon` None: more than one step."""
    if not isinstance(to, ActionSpace):
        raise ActionSpaceError(f"to= is the ActionSpace that is wanted, got {to!r}")
    # A chunk of one step has one reference, whatever its changes are said to be relative to.
    anchors = ("chunk", "chunk") if horizon == 1 else (source.anchor, to.anchor)
    plan = Plan(source, to, *anchors)
    dropped = {source.index(name) for name in drop}
    if source.named != to.named or (not source.named and source.dof != to.dof):
        raise ActionSpaceError(
            f"{'the source' if to.named else 'the target'} has dimensions without names, so nobody knows which is which: "
            f"describe it with ActionSpace(names, units, ...), {source.dof} dimensions here and {to.dof} there"
        )
    check_rate(source, to)
    left, missing = set(range(source.dof)) - dropped, set(range(to.dof))
    if source == to and not dropped:
        plan.copies = [Copy(i, i, 1.0, "same") for i in sorted(left)]
        plan.texts = ["the spaces are the same: nothing to do"]
        return plan
    _plan_gripper(plan, left, missing)
    _plan_pose(plan, left, missing)
    _plan_rest(plan, left, missing)
    if dropped:
        plan.texts.append(f"left out: {', '.join(source.names[i] for i in sorted(dropped))}")
    if not plan.texts:
        plan.texts.append("only names or their order change: no number does")
    return plan


def _plan_gripper(plan: Plan, left: set[int], missing: set[int]) -> None:
    a, b = plan.source.gripper, plan.to.gripper
    i = None if a is None else plan.source.index(a.dim)
    if i is not None and i not in left:
        a = i = None
    if a is None and b is None:
        return
    if a is None or b is None or i is None:
        which, dim = ("target", a.dim) if a is not None else ("source", b.dim)  # type: ignore[union-attr]
        raise ActionSpaceError(
            f"the {which} does not say which number of its gripper is open (the other side's is {dim!r}): give it "
            "gripper=Gripper(dim, open=, closed=), or leave the dimension out with drop="
        )
    j = plan.to.index(b.dim)
    left.discard(i)
    missing.discard(j)
    plan.gripper = (i, j)
    here, there = a.describe(), b.describe()
    if replace(a, dim=0) == replace(b, dim=0):
        plan.gripper = None
        plan.copies.append(Copy(i, j, 1.0, "same"))
        return
    check_gripper_way(a, b)
    plan.texts.append(f"gripper {plan.source.names[i]!r} ({here}) to {plan.to.names[j]!r} ({there})")


def _plan_pose(plan: Plan, left: set[int], missing: set[int]) -> None:
    check_frames(plan.source, plan.to)
    spaces = ((plan.source, left, plan.source_anchor), (plan.to, missing, plan.to_anchor))
    groups = [[_dims(space, part, free) for part in _parts(space.known_pose())] for space, free, _ in spaces]
    a, b = (_side(space, group, anchor) for (space, _, anchor), group in zip(spaces, groups, strict=True))
    both = [groups[0][k] if groups[1][k] else () for k in (0, 1)]
    other = [groups[1][k] if groups[0][k] else () for k in (0, 1)]
    for k, what in enumerate(("position", "rotation")):
        if both[k]:
            kinds = [
                [space.delta[i] for i in dims[k]] for (space, _, _), dims in zip(spaces, (both, other), strict=True)
            ]
            check_kinds(what, kinds, a, b)
    shift = bool(both[0]) and a.position_facts() != b.position_facts()
    turn = bool(both[1]) and a.rotation_facts() != b.rotation_facts()
    through_tool = shift and "tcp" in (a.frame, b.frame)
    if through_tool and not both[1] and any(pose is not None and pose.rotation for pose in _poses(plan)):
        raise ActionSpaceError(
            "positions along the axes of the tool depend on how it turns meanwhile: leave its rotation in both spaces"
        )
    if both[1] and not (turn or through_tool) and a.form is None:
        # Nobody has said how it is written: it can stay as it is, number by number, if the names say the same.
        both[1], other[1] = (), ()
    for k in (0, 1):
        left -= set(both[k])
        missing -= set(other[k])
    if not (shift or turn):
        _copy_groups(plan, both, other)
        return
    check_motion((("source", a, plan.source), ("target", b, plan.to)), shift, turn, bool(both[1]) and through_tool)
    needs = needs_of(a, b, bool(both[0]), bool(both[1]))
    if needs.position or needs.rotation or a.anchor != b.anchor:
        check_reference(a, b, shift, turn)
    read = _group(plan.source, both[0], "m"), _group(plan.source, both[1], _unit(a))
    write = _group(plan.to, other[0], "m", True), _group(plan.to, other[1], _unit(b), True)
    plan.pose = PosePlan(read, write, a, b, needs)
    plan.texts += [_say_side("position", a, b)] if shift else []
    plan.texts += [_say_side("rotation", a, b)] if turn else []
    plan.texts += ["no dimension turns the tool: its orientation stays"] if through_tool and not both[1] else []
    plan.texts += _say_units(plan, both, other)


def _plan_rest(plan: Plan, left: set[int], missing: set[int]) -> None:
    source, to = plan.source, plan.to
    absent = [to.names[j] for j in sorted(missing) if to.names[j] not in {source.names[i] for i in left}]
    if absent:
        raise ActionSpaceError(
            f"nothing becomes {absent} of the target: the source has {[source.names[i] for i in sorted(left)]} left over"
        )
    for j in sorted(missing):
        i = source.index(to.names[j])
        left.discard(i)
        way = _way(plan, i, j)
        check_alone(source, to, i, way, [d for d in missing if to.names[d] != to.names[j]])
        scale = factor(source.units[i], to.units[j], repr(source.names[i]))
        plan.copies.append(Copy(i, j, scale, way))
        if scale != 1:
            plan.texts.append(f"{source.names[i]!r} from {source.units[i]} to {to.units[j]}")
        if way != "same":
            plan.texts.append(f"{source.names[i]!r} from {_said(source, i)} to {_said(to, j)}")
    if left:
        raise ActionSpaceError(
            f"{[source.names[i] for i in sorted(left)]} have no place in the target ({list(to.names)}): name them in "
            "drop= to leave them out"
        )


def _way(plan: Plan, i: int, j: int) -> str:
    one, two = plan.source.delta[i], plan.to.delta[j]
    if one is two and (one is False or plan.source_anchor == plan.to_anchor):
        return "same"
    if one is None or two is None:
        raise ActionSpaceError(
            f"{plan.source.names[i]!r} is {KINDS[one]} here and {KINDS[two]} there: say delta= in both"
        )
    check_anchors(plan.source_anchor if one else "", plan.to_anchor if two else "")
    return "anchor" if one and two else "absolute" if one else "delta"


def _side(space: ActionSpace, groups: list[tuple[int, ...]], anchor: str | None) -> Side:
    pose = space.known_pose()
    kinds = []
    for dims in groups:
        said = {space.delta[i] for i in dims}
        kinds.append(said.pop() if len(said) == 1 else None)
    form = None if pose is None or not groups[1] else pose.form
    turns = None if pose is None else pose.turns
    if form is not None and turns is None and (euler_order(form) is None or space.frame == "tcp"):
        turns = "compose"
    return Side(space.frame, anchor, kinds[0], kinds[1], form, turns)


def _poses(plan: Plan) -> tuple[PoseDims | None, PoseDims | None]:
    return plan.source.known_pose(), plan.to.known_pose()


def _parts(pose: PoseDims | None) -> tuple:
    return (None, None) if pose is None else (pose.position, pose.rotation)


def _dims(space: ActionSpace, part, free: set[int]) -> tuple[int, ...]:
    """Indices of a position or rotation; () if there is none or some of it is left out."""
    dims = () if part is None else tuple(space.index(dim) for dim in part)
    return dims if set(dims) <= free else ()


def _unit(side: Side) -> str | None:
    return "rad" if side.form == "axis_angle" or (side.form and euler_order(side.form)) else None


def _group(space: ActionSpace, dims: tuple[int, ...], unit: str | None, out: bool = False) -> Group:
    pairs = [(unit, space.units[i]) if out else (space.units[i], unit) for i in dims]
    return dims, np.array([factor(*pair, space.describe(i)) for pair, i in zip(pairs, dims, strict=True)])


def _copy_groups(plan: Plan, both, other) -> None:
    for i, j in zip((*both[0], *both[1]), (*other[0], *other[1]), strict=True):
        scale = factor(plan.source.units[i], plan.to.units[j], repr(plan.source.names[i]))
        plan.copies.append(Copy(i, j, scale, "same"))
    plan.texts += _say_units(plan, both, other)


def _say_units(plan: Plan, both, other) -> list[str]:
    changes: dict[tuple, list[str]] = {}
    for i, j in zip((*both[0], *both[1]), (*other[0], *other[1]), strict=False):
        units = plan.source.units[i], plan.to.units[j]
        if units[0] != units[1] and all(units):
            changes.setdefault(units, []).append(plan.source.names[i])
    return [f"{', '.join(names)} from {units[0]} to {units[1]}" for units, names in changes.items()]


def _said(space: ActionSpace, i: int) -> str:
    return KINDS[space.delta[i]] + (f" (each {space.anchor})" if space.delta[i] and space.anchor else "")


def _say_side(what: str, a: Side, b: Side) -> str:
    texts = []
    for side in (a, b):
        delta = side.position_delta if what == "position" else side.rotation_delta
        facts = [side.form] if what == "rotation" and side.form else []
        facts += [KINDS[delta]] + ([f"from {'each step' if side.anchor == 'step' else 'the start of the chunk'}"]
                                   if delta and side.anchor else [])  # fmt: skip
        facts += [str(side.turns)] if what == "rotation" and delta and side.turns else []
        texts.append(f"{', '.join(facts)}, {side.frame or 'no'} frame")
    return f"{what} ({texts[0]}) to ({texts[1]})"
