"""The constraint language itself: what it refuses, what it comes down to, JSON, text, numbers for each sample."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vla_actions.actions import ActionSpace, Gripper
from hf_vla_actions.constraints import (
    All,
    Any,
    Constraint,
    Context,
    Fix,
    Forbid,
    InSet,
    KeepOut,
    Linear,
    MoveBy,
    Prefix,
    Range,
    Rate,
    Soft,
    Speed,
    Sticky,
    Target,
    Where,
    Workspace,
    constraint_from_dict,
)
from hf_vla_actions.constraints.kinds import TYPES
from hf_vla_actions.constraints.terms import Known, Pull
from hf_vla_actions.constraints.text import parse_constraints
from hf_vla_actions.errors import ActionSpaceError, ConstraintError, InfeasibleConstraintError

NAMES, UNITS = ["x", "y", "z", "height", "gripper"], ["m", "m", "m", "m", None]
ROBOT = {"frame": "base", "gripper": Gripper("gripper"), "rate_hz": 10.0}
SPACE = ActionSpace(NAMES, UNITS, (True, True, True, False, False), **ROBOT)
NAN = math.nan
KNOWN = Known(np.array([0.1, 0.2, NAN, 0.5, NAN]), np.array([0.01, 0.0, 0.0, 0.5, 1.0]), 1)
CHUNK = np.array([[0.1, 0.3, 0, 0.5, 1], [0.2, -0.4, 0, 0.6, 0], [-0.1, 0.0, 0, 0.4, 0]], dtype=float)


def expand(constraint, known=KNOWN, space=SPACE, half_bin=0.0, horizon=3):
    return constraint.expand(space, horizon, known, np.full(space.dof, half_bin))


def excess(constraint, known=KNOWN, chunk=CHUNK):
    """(steps,) largest excess of everything a constraint comes down to, on one chunk."""
    worst = np.zeros(len(chunk))
    for part in expand(constraint, known, horizon=len(chunk)):
        if isinstance(part, Constraint):
            for step in part.steps_in(len(chunk)):
                low, high = part.low, part.high  # the only one-dimensional kind here is Range
                value = chunk[step, part.dim]
                worst[step] = max(worst[step], low - value, value - high)
        else:
            worst = np.maximum(worst, part.excess(chunk[None])[0])
    return worst.round(9).tolist()


@pytest.mark.parametrize(
    ("constraint", "by_hand"),
    [
        (Rate("x", 0.05), [0.04, 0.05, 0.25]),
        (Rate("x", 0.05, from_last=False), [0, 0.05, 0.25]),
        (Rate("x", 0.05, steps=[2]), [0, 0, 0.25]),
        (Workspace("x", 0.0, 0.25), [0, 0.15, 0.05]),
        (Workspace(["x", 1], [0.3, 0.0], [None, 0.4], on_outside="recover"), [0.1, 0, 0]),
        (Workspace("x", 0.15, 0.45, on_outside="recover"), [0, 0, 0]),
        (Workspace("x", 0.25, 0.45, on_outside="return"), [0.05, 0, 0]),
        (Workspace("x", 0.35, 0.4, steps=-1), [0, 0, 0.05]),
        (Workspace(["x", "z"], [0.0, None], [0.25, None]), [0, 0.15, 0.05]),
        (Workspace("height", 0.45, 0.55), [0, 0.05, 0.05]),
        (MoveBy("x", 0.15, tolerance=0.02), [0, 0, 0.03]),
        (MoveBy("x", 0.0, tolerance=0.1, steps=slice(0, 2)), [0, 0.2, 0]),
        (Speed(["x", "y"], 0.4), [0, math.sqrt(0.2) - 0.4, 0]),
        (Speed(["x", "y"], 0.4, ord=1), [0, 0.2, 0]),
        (Speed(["x", "y"], 0.25, ord=math.inf), [0.05, 0.15, 0]),
        (Speed(["x", "y"], 2.0, ord="inf", per_second=True), [0.1, 0.2, 0]),
        (Speed("y", 0.35, steps=1), [0, 0.05, 0]),
        (Linear(["x", "y"], [2, 1], high=0.2), [0.3, 0, 0]),
        (Linear(["x", "y"], [1, -1], low=0, steps=0), [0.2, 0, 0]),
        (Linear(["x", "y"], 1, low=0.25, cumulative=True, origin=-0.1), [0, 0.15, 0.25]),
        (KeepOut(["x"], 0.35, 0.38), [0, 0.015, 0.015]),
        (KeepOut(["x"], 0.37, 0.39, margin=0.01, steps=[2]), [0, 0, 0.02]),
        (KeepOut(["x", "y"], [0.1, 0.9], 1.0), [0, 0, 0]),
        (KeepOut("height", 0.55, 0.6), [0, 0.025, 0.025]),
        (Sticky("gripper", min_hold=2), [0, 0, 0]),
        (Sticky("gripper", min_hold=3), [0, 1, 0]),
        (Sticky("gripper", max_switches=0), [0, 1, 0]),
        (Sticky("gripper", min_hold=1, max_switches=1), [0, 0, 0]),
        (Where(lambda chunks: chunks[:, :, 0].max(-1) < 0.2), [0, 0, 1]),
        (Range("x", 0, 0.15) & Rate("y", 0.5), [0, 0.2, 0.1]),
    ],
    ids=str,
)
def test_excess_of_what_a_constraint_comes_down_to(constraint, by_hand):
    # x: pose 0.1, then 0.2, 0.4, 0.3; last action 0.01. Gripper: open for one step, open, closed, closed.
    np.testing.assert_allclose(excess(constraint), by_hand, atol=1e-9)


def test_totals_are_as_fine_as_the_grid():
    for half_bin, tolerance in ((0.03, 0.03), (0.0, 1e-9)):
        term = expand(MoveBy("x", 0.2), half_bin=half_bin)[0]
        assert term.high[-1] - 0.2 == pytest.approx(tolerance, rel=1e-6)
        assert (term.low[:-1] == -np.inf).all()


def test_a_soft_total_is_a_brownian_bridge():
    (pull,) = expand(MoveBy("x", 0.3, sigma=0.1, weight=2.0, steps=[0, 2]))
    assert isinstance(pull, Pull)
    assert pull.counted.tolist() == [True, False, True]
    nats = pull.nats(np.array([0.0, 0.2]), 2, np.array([0.0, 0.1]))
    bridge = [[-2 * (v - (0.3 - s) / 2) ** 2 / (2 * 0.1**2 / 2) for v in (0.0, 0.2)] for s in (0.0, 0.1)]
    np.testing.assert_allclose(nats, bridge)
    assert np.isfinite(Pull(0, pull.counted, 1e300, 1e-300).nats(np.array([0.0]), 1, np.zeros(1))).all()


def test_committed_actions_are_fixed_then_pulled_then_free():
    prefix = Prefix([[1, NAN, 0, 0, 1], [2, 0, 0, 0, NAN], [3, NAN, NAN, NAN, NAN], [4] * 5], hard=1, sigma=0.5)
    parts = expand(prefix, horizon=5)
    fixed = {(c.steps, c.dim): c.value for c in parts if isinstance(c, Fix)}
    assert fixed == {(0, 0): 1, (0, 2): 0, (0, 3): 0, (0, 4): 1}
    pulled = {(c.steps, c.dim): (c.value, c.sigma, c.weight) for c in parts if isinstance(c, Target)}
    assert {cell: pulled[cell] for cell in [(1, 0), (2, 0)]} == {(1, 0): (2, 0.5, 1.0), (2, 0): (3, 0.5, 2 / 3)}
    assert (3, 4) in pulled
    assert len(pulled) == 4 + 1 + 5
    assert {c.steps for c in expand(Prefix(CHUNK, steps=[0]))} == {0}
    for wrong, part in ((Prefix(CHUNK[:, :4]), "4 numbers"), (Prefix(np.zeros((4, 5))), "chunk of 3")):
        with pytest.raises(ConstraintError, match=part):
            expand(wrong)


def test_any_and_soft_stay_what_they_are_and_all_falls_apart():
    a, b, c = Range("x", 0, 1), Range("y", 0, 1), Rate("z", 0.1)
    assert Any(a, [b, c]).alternatives == ((a,), (b, c))
    assert Any(a & b, c).alternatives == ((a, b), (c,))
    assert Any([a, Any(b, c)], c).alternatives == ((a, b), (a, c), (c,))
    assert (a & b & c).parts == (a, b, c)
    assert expand(Any(a, b)) == [Any(a, b)]
    assert expand((a & b).soft(3.0)) == [Soft(a, 3.0), Soft(b, 3.0)]
    assert [type(part).__name__ for part in expand(a & c & Any(a, b))] == ["Range", "Change", "Any"]
    outside = Workspace("x", 0.2, 0.3)
    (soft,) = expand(outside.soft(1.0))
    np.testing.assert_allclose(excess(soft.constraint), [0, 0.1, 0], atol=1e-12)
    assert Any(Rate("x", 1), Workspace("x", 0, 1)).needs == {"pose", "last_action"}
    assert Soft(KeepOut("x", 0, 1)).needs == {"pose"}
    assert (Rate("x", 1, from_last=False) & Speed("x", 1)).needs == set()


TCP = ActionSpace(NAMES, UNITS, (True, True, True, False, False), frame="tcp", gripper=Gripper("gripper"))


@pytest.mark.parametrize(
    ("constraint", "space", "known", "part"),
    [
        (Rate("x", 1), SPACE, Known(), r"last_action.*from_last=False"),
        (Rate("x", 1), SPACE, Known(last_action=np.full(5, NAN)), "last_action"),
        (Workspace("x", 0, 1), SPACE, Known(), r"Context\(pose=\{'x': \.\.\.\}\)"),
        (Workspace("z", 0, 1), SPACE, KNOWN, "'z'"),
        (Workspace("x", 0, 1), TCP, KNOWN, "Linear"),
        (Workspace(0, 0, 1), ActionSpace.unnamed(5), KNOWN, "nobody has said"),
        (Workspace("x", 0.2, 1), SPACE, KNOWN, "outside the low face by 0.1"),
        (KeepOut("x", 0, 1), TCP, KNOWN, "Linear"),
        (KeepOut("height", 0, 1), SPACE, Known(), "pose"),
        (MoveBy("height", 0.1), SPACE, KNOWN, "is a position"),
        (MoveBy(0, 0.1), ActionSpace.unnamed(5), KNOWN, "delta="),
        (Speed(["x", "height"], 0.1), SPACE, KNOWN, "is a position"),
        (Speed("x", 0.1, per_second=True), TCP, KNOWN, "rate_hz"),
        (Speed(["x", 0], 0.1), SPACE, KNOWN, "twice"),
        (Sticky("x"), SPACE, KNOWN, "has its gripper in 'gripper'"),
        (Sticky(4), ActionSpace.unnamed(5), KNOWN, "declares no gripper"),
        (Sticky("gripper"), SPACE, Known(), "last_action"),
        (Where(lambda chunks: True, backup=[0, 0]), SPACE, KNOWN, r"backup has shape \(5,\) or \(3, 5\)"),
        (Rate("x", 1, steps=3), SPACE, KNOWN, "not all in a chunk of 3"),
        (Range("x", [0, 0], 1), SPACE, KNOWN, "numbers for 2 samples"),
    ],
    ids=lambda value: str(value) if isinstance(value, Constraint) else "",
)
def test_what_does_not_fit_the_robot_says_what_is_missing(constraint, space, known, part):
    with pytest.raises(ConstraintError, match=part):
        expand(constraint, known, space)


def test_a_robot_outside_is_an_infeasible_start_and_unknown_names_are_refused():
    with pytest.raises(InfeasibleConstraintError, match="recover"):
        expand(Workspace("x", 0.2, 1))
    with pytest.raises(ActionSpaceError, match="no dimension is named 'w'"):
        expand(Linear(["x", "w"], 1, low=0))


def test_a_function_has_to_return_bools_and_must_not_write():
    for wrong in (lambda chunks: chunks[:, 0, 0], lambda chunks: True):
        with pytest.raises(ConstraintError, match="one bool for each of 1 chunks"):
            excess(Where(wrong, name="wrong"))
    with pytest.raises(ValueError, match="read-only"):
        excess(Where(lambda chunks: chunks.sort() is None))
    with pytest.raises(ConstraintError, match="no JSON"):
        Where(len).to_dict()
    with pytest.raises(ConstraintError, match="cannot be read from JSON"):
        constraint_from_dict({"type": "Where"})
    assert expand(Where(len, backup=[0, 0, 0, NAN, 1]))[0].backup.shape == (3, 5)


X, SOFT = Range("x", 0, 1), Target("x", 0, sigma=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rate("x", -1),
        lambda: Rate("x", NAN),
        lambda: Rate("x", 1, from_last=1),
        lambda: Rate(["x"], 1),
        lambda: Workspace([], 0, 1),
        lambda: Workspace(["x", "x"], 0, 1),
        lambda: Workspace(["x", True], 0, 1),
        lambda: Workspace("x", 1, 0),
        lambda: Workspace(["x", "y"], [0, 2], 1),
        lambda: Workspace(["x", "y"], [0, 0, 0], 1),
        lambda: Workspace("x", [0, 1], 2),
        lambda: Workspace("x", NAN, 1),
        lambda: Workspace("x", 0, 1, "stop"),
        lambda: MoveBy("x", math.inf),
        lambda: MoveBy("x", 1, tolerance=0.1, sigma=0.1),
        lambda: MoveBy("x", 1, weight=2),
        lambda: MoveBy("x", 1, sigma=0),
        lambda: Speed("x", -1),
        lambda: Speed("x", 1, ord=3),
        lambda: Speed("x", 1, ord=True),
        lambda: Speed("x", 1, per_second="yes"),
        lambda: Linear("x", 1),
        lambda: Linear("x", 0, low=0),
        lambda: Linear(["x", "y"], [1], low=0),
        lambda: Linear("x", 1, low=1, high=0),
        lambda: Linear("x", 1, low=0, origin=1),
        lambda: Linear("x", math.inf, low=0),
        lambda: KeepOut(["a", "b", "c", "d"], 0, 1),
        lambda: KeepOut("x", 1, 0),
        lambda: KeepOut("x", None, 1),
        lambda: KeepOut("x", 0, math.inf),
        lambda: KeepOut("x", 0, 1, margin=-1),
        lambda: Sticky("g", 0),
        lambda: Sticky("g", 1.5),
        lambda: Sticky("g", max_switches=-1),
        lambda: Sticky("g", hysteresis=1.0),
        lambda: Sticky("g", steps=0),
        lambda: Prefix([]),
        lambda: Prefix([1, 2]),
        lambda: Prefix([[1, 2], [3]]),
        lambda: Prefix([[math.inf]]),
        lambda: Prefix([["open"]]),
        lambda: Prefix([[1]], hard=2),
        lambda: Prefix([[1]], until=1),
        lambda: Prefix([[1]], sigma=0.1),
        lambda: Prefix([[1], [1]], hard=1, sigma=[0.1, 0.1]),
        lambda: Prefix([[1], [1]], hard=1, sigma=0.1, until=3),
        lambda: Where("x > 0"),
        lambda: Where(len, steps=0),
        lambda: Where(len, backup=[[0, 1], [0]]),
        lambda: Any(),
        lambda: Any([]),
        lambda: Any(3),
        lambda: Any("x"),
        lambda: Any(X, steps=0),
        lambda: Any(SOFT, X),
        lambda: All(),
        lambda: All(X, None),
        lambda: X.soft(0),
        lambda: X.soft(1).soft(1),
        lambda: SOFT.soft(1),
        lambda: Target("x", 0, hard=True).soft(1),
        lambda: MoveBy("x", 1, sigma=1).soft(1),
        lambda: Any(X, Rate("x", 1)).soft(1),
        lambda: Soft("x", 1),
        lambda: Range("x", [0, 0], [1, 1, 1]),
        lambda: Range("x", [0, 2], 1),
        lambda: Range("x", [], 1),
        lambda: Range("x", [[0]], 1),
        lambda: Range("x", torch.tensor([True, False]), 1),
        lambda: Any(Range("x", [0, 0]), Range("y", [0, 0, 0])),
    ],
)
def test_malformed_constraints_are_refused_at_birth(make):
    with pytest.raises(ConstraintError):
        make()


def test_only_constraints_join():
    with pytest.raises(TypeError):
        X & 3


# ---------------------------------------------------------------- JSON and text


def numbers(least=-1e6, **limits):
    return st.floats(least, 1e6, allow_nan=False, **limits)


positive = numbers(1e-6)
dims = st.lists(st.sampled_from(["x", "y", "z", 3, -1]), min_size=1, max_size=3, unique=True)
dim = st.sampled_from(["x", "gripper", 0, -1])
some_steps = st.sampled_from([None, 0, -1, (0, 2), slice(0, 2), slice(None, None, 2)])


@st.composite
def bounds(draw, count=None):
    pairs = [sorted((draw(numbers()), draw(numbers()))) for _ in range(count or 1)]
    low = [draw(st.sampled_from([None, pair[0]])) for pair in pairs]
    high = [pair[1] for pair in pairs]
    return (low, high) if count else (low[0], high[0])


@st.composite
def simple(draw):
    """Any constraint of numbers: of each kind, with and without its options."""
    kind = draw(st.sampled_from([Range, Forbid, InSet, Fix, Target, Rate, MoveBy, Speed, Linear, Workspace, KeepOut]))
    many, one, steps = draw(dims), draw(dim), draw(some_steps)
    if kind in (Range, Forbid):
        return kind(one, *draw(bounds()), steps=steps)
    if kind is Workspace:
        return kind(many, *draw(bounds(len(many))), steps=steps)
    if kind is KeepOut:
        corners = [sorted((draw(numbers()), draw(numbers()))) for _ in many]
        return kind(many, [low for low, _ in corners], [high for _, high in corners], draw(positive), steps=steps)
    if kind is InSet:
        return kind(one, draw(st.lists(numbers(), min_size=1, max_size=3)), draw(st.none() | positive), steps=steps)
    if kind is Fix:
        return kind(one, draw(st.sampled_from(["open", "closed"]) | numbers()), steps=steps)
    if kind is Target:
        hard = draw(st.booleans())
        return kind(one, draw(numbers()), sigma=None if hard else draw(positive), hard=hard, steps=steps)
    if kind is Rate:
        return kind(one, draw(positive), draw(st.booleans()), steps=steps)
    if kind is MoveBy:
        return kind(one, draw(numbers()), sigma=draw(st.none() | positive), steps=steps)
    if kind is Speed:
        return kind(many, draw(positive), draw(st.sampled_from([1, 2, "inf"])), draw(st.booleans()), steps=steps)
    low, high = draw(bounds())
    weights = draw(st.lists(positive, min_size=len(many), max_size=len(many)))
    return kind(many, weights, low, high, cumulative=True, origin=draw(numbers()), steps=steps)


hards = simple().filter(lambda c: c.is_hard)
sticky = st.builds(Sticky, dim, st.integers(1, 9), st.none() | st.integers(0, 3), st.none() | st.floats(0, 0.9))
made = st.one_of(
    simple(),
    sticky,
    st.builds(Any, hards, hards, st.lists(hards, min_size=2, max_size=2)),
    st.builds(lambda a, b: a & b, simple(), simple()),
    hards.filter(lambda c: not isinstance(c, Target)).map(lambda c: c.soft(2.0)),
    st.builds(lambda a, b, c: Any(a, b) & c.soft(0.5), hards, hards, sticky.filter(lambda c: c.hysteresis is None)),
)


@settings(max_examples=300, deadline=None)
@given(made)
def test_json_and_text_give_back_the_same_constraint(constraint):
    again = constraint_from_dict(json.loads(json.dumps(constraint.to_dict(), allow_nan=False)))
    assert again == constraint
    assert type(again) is type(constraint)
    assert parse_constraints(f"{constraint}; Range(x, 0, 1)") == [constraint, X]


@pytest.mark.parametrize(
    "constraint",
    [
        Prefix([[0.1, NAN], [0.2, 0.3]], hard=1, sigma=[0.1, 0.2], until=2),
        Prefix(np.full((3, 2, 2), NAN), hard=[0, 1, 2]),
        Range("x", [None, 0.1], math.inf),
        Workspace(["x", "y"], [[0, None], [1, 2]], None),
        Fix("gripper", ["open", "closed", 0.5]),
        All(Soft(X, [1.0, 2.0]), Any(Rate("x", [0.1, 0.2]), X)),
    ],
    ids=str,
)
def test_json_of_prefixes_and_of_numbers_for_each_sample(constraint):
    text = json.dumps(constraint.to_dict(), allow_nan=False)
    assert constraint_from_dict(json.loads(text)) == constraint
    assert Constraint.from_dict(json.loads(text)) == constraint


def test_every_kind_can_be_read():
    assert set(TYPES) == {kind.__name__ for kind in Constraint.__subclasses__() for kind in _leaves(kind)} - {"Where"}


def _leaves(kind):
    below = [leaf for child in kind.__subclasses__() for leaf in _leaves(child)]
    return below or [kind]


def test_text_as_on_a_command_line():
    read = parse_constraints("Speed([x, y, z], 0.02); Any(Range(x, -0.1, None), [Range(y, high=inf), Rate(x, 1e-3)])")
    assert read[0] == Speed(["x", "y", "z"], 0.02)
    assert read[1] == Any(Range("x", -0.1), [Range("y"), Rate("x", 1e-3)])
    (prefix,) = parse_constraints("Prefix([[nan, -inf]])".replace("-inf", "-1"))
    assert prefix == Prefix([[NAN, -1]])
    assert str(read[0]) == "Speed(('x', 'y', 'z'), max=0.02)"
    assert len(str(Range("x", np.linspace(-1, 0, 64)))) < 60


@pytest.mark.parametrize(
    "text",
    [
        "Speed(x)",
        "Range(x, -nan, 1)",
        "Any(x)",
        "Any(Teleport(x))",
        "Where(abs)",
        "slice(0, 1)",
        "Range(x, 0, 1, steps=slice())",
        "Range(**x)",
        "Range(*x)",
        "Range(x, 1 + 1)",
        "[Range(x, 0, 1)]",
        "Soft(Range(x, 0, 1), weight=-1)",
    ],
)
def test_text_that_is_no_constraint_is_refused(text):
    with pytest.raises(ConstraintError):
        parse_constraints(text)


# ---------------------------------------------------------------- numbers for each sample, context


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, lambda v: [torch.tensor(x) for x in v]])
def test_numbers_for_each_sample_come_in_every_form(form):
    constraint = Range("x", form([-0.5, 0.25]), 1.0)
    assert (constraint.n_samples, constraint.low) == (2, (-0.5, 0.25))
    assert constraint.sample(1) == Range("x", 0.25, 1.0)
    assert Range("x", form([-0.5, 0.25])[0], 1.0) == Range("x", -0.5, 1.0)


@pytest.mark.parametrize(
    ("constraint", "second"),
    [
        (Rate("x", [0.1, 0.2]), Rate("x", 0.2)),
        (Workspace(["x", "y"], [[0, 1], [2, 3]], [4, 5]), Workspace(["x", "y"], [2, 3], [4, 5])),
        (KeepOut("x", [[0], [1]], 5, margin=[0, 1]), KeepOut("x", 1, 5, margin=1)),
        (Linear(["x", "y"], np.eye(2), low=[0, 1]), Linear(["x", "y"], [0, 1], low=1)),
        (Sticky("g", [1, 2], max_switches=[None, 3]), Sticky("g", 2, 3)),
        (Fix("g", ["open", "closed"]), Fix("g", "closed")),
        (MoveBy("x", [1, 2], sigma=0.1), MoveBy("x", 2, sigma=0.1)),
        (Prefix(np.arange(8.0).reshape(2, 2, 2), hard=[0, 1]), Prefix([[4, 5], [6, 7]], hard=1)),
        (Any(X, Rate("x", [0.1, 0.2])), Any(X, Rate("x", 0.2))),
        (X & Rate("x", [0.1, 0.2]), X & Rate("x", 0.2)),
        (X.soft([1, 2]), X.soft(2)),
    ],
    ids=str,
)
def test_the_constraint_of_one_sample(constraint, second):
    assert constraint.n_samples == 2
    assert constraint.sample(1) == second
    assert second.n_samples is None
    assert second.sample(7) == second
    with pytest.raises(ConstraintError, match="none for sample 2"):
        constraint.sample(2)


def turned(x, y, z):
    return np.array([[0, -1, 0, x], [1, 0, 0, y], [0, 0, 1, z], [0, 0, 0, 1]], dtype=float)


@pytest.mark.parametrize(
    ("pose", "rows"),
    [
        ({"z": 3, 0: 1}, [[1, NAN, 3, NAN, NAN]] * 2),
        ({"x": [1, 2], "y": 0}, [[1, 0, NAN, NAN, NAN], [2, 0, NAN, NAN, NAN]]),
        ([1, 2, 3], [[1, 2, 3, NAN, NAN]] * 2),
        ([[1, 2], [3, 4]], [[1, 2, NAN, NAN, NAN], [3, 4, NAN, NAN, NAN]]),
        (torch.tensor([1.0, 2.0]), [[1, 2, NAN, NAN, NAN]] * 2),
        (turned(1, 2, 3), [[1, 2, 3, NAN, NAN]] * 2),
        ([turned(1, 2, 3), turned(4, 5, 6)], [[1, 2, 3, NAN, NAN], [4, 5, 6, NAN, NAN]]),
        (None, [None, None]),
    ],
)
def test_poses_come_in_every_form(pose, rows):
    context = Context(pose, held_steps=3)
    for i, row in enumerate(rows):
        known = context.known(SPACE, i, 2)
        np.testing.assert_array_equal(known.pose, row)
        assert (known.last_action, known.held_steps) == (None, 3)


def test_four_samples_of_four_numbers_are_no_matrix():
    assert Context(np.arange(16).reshape(4, 4)).known(SPACE, 1, 4).pose[:4].tolist() == [4, 5, 6, 7]


def test_last_actions_and_held_steps_of_each_sample():
    context = Context(last_action=np.arange(10).reshape(2, 5), held_steps=torch.tensor([1, 4]))
    known = context.known(SPACE, 1, 2)
    assert known.last_action.tolist() == [5, 6, 7, 8, 9]
    assert (known.held_steps, known.pose, context.n_samples) == (4, None, 2)
    assert Context(last_action={"gripper": 1}).known(SPACE, 0).last_action[4] == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Context({"x": NAN}),
        lambda: Context([1, math.inf]),
        lambda: Context("here"),
        lambda: Context(3.0),
        lambda: Context([[1, 2], [3]]),
        lambda: Context({"x": "1"}),
        lambda: Context({1.5: 0}),
        lambda: Context({"x": [[1]]}),
        lambda: Context(np.diag([2.0, 1, 1, 1])),
        lambda: Context(np.zeros((2, 3, 3))),
        lambda: Context(last_action=np.zeros((1, 1, 5))),
        lambda: Context(held_steps=-1),
        lambda: Context(held_steps=[1, 2.5]),
        lambda: Context(held_steps=[]),
        lambda: Context({"x": [1, 2]}, held_steps=[1, 2, 3]),
        lambda: Context({"x": [1, 2]}).known(SPACE, 0, 3),
        lambda: Context({"x": [1, 2]}).known(SPACE, 2),
        lambda: Context({"w": 1}).known(SPACE, 0),
        lambda: Context([0] * 6).known(SPACE, 0),
        lambda: Context(last_action=[0] * 4).known(SPACE, 0),
        lambda: Context(np.eye(4)).known(ActionSpace.unnamed(5), 0),
    ],
)
def test_malformed_contexts_are_refused(make):
    with pytest.raises((ConstraintError, ActionSpaceError)):
        make()
