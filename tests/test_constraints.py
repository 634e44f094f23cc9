"""The constraint language bound to a robot: feasibility, tables, projection, messages."""

import json
import logging
import math
import pickle

import numpy as np
import pytest

from hf_vla_actions.actions import ActionSpace, ActionStats, Gripper
from hf_vla_actions.constraints import (
    Constraint,
    Fix,
    Forbid,
    InSet,
    Range,
    Target,
    bind,
    constraint_from_dict,
    project,
)
from hf_vla_actions.errors import ActionSpaceError, ConstraintError, InfeasibleConstraintError
from hf_vla_actions.tokenizers import UniformActionTokenizer

NAMES, UNITS = ["x", "y", "yaw", "height", "gripper"], ["m", "m", "rad", "m", None]
LOW, HIGH = [-0.03, -0.01, -0.2, 0.5, 0.0], [0.028, 0.03, 0.2, 0.5, 1.0]
SPACE = ActionSpace(NAMES, UNITS, (True, True, True, False, False), frame="base", gripper=Gripper("gripper"))


def table(scheme="openvla", n=256, space=SPACE):
    """Real value of each token, written out by hand: centers, un-normalized, gripper rounded."""
    centers = UniformActionTokenizer(n, scheme).grid.values
    rows = [low + (centers + 1) / 2 * (high - low) for low, high in zip(LOW, HIGH, strict=True)]
    rows[3] = np.full(n, 0.5)
    rows[4] = np.where(centers >= 0.5, 1.0, 0.0) if space.gripper.binary else centers
    return np.array(rows)


VALUES = table()


def test_the_table_is_the_one_of_statistics_and_space():
    stats = ActionStats.from_ranges(LOW, HIGH, mask=[True, True, True, True, False])
    centers = np.repeat(UniformActionTokenizer(256, "openvla").grid.values[:, None], 5, axis=1)
    np.testing.assert_allclose(SPACE.settle(stats.unnormalize(centers)).T, VALUES, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("constraint", "oracle"),
    [
        (Range("x", -0.01, 0.004), lambda v: (v >= -0.01) & (v <= 0.004)),
        (Range("x", None, 0.004), lambda v: v <= 0.004),
        (Range("x", 0.004, math.inf), lambda v: v >= 0.004),
        (Range("x", VALUES[0, 7], VALUES[0, 9]), lambda v: (v >= VALUES[0, 7]) & (v <= VALUES[0, 9])),
        (Forbid("x", -0.01, 0.004), lambda v: (v < -0.01) | (v > 0.004)),
        (Forbid("x", VALUES[0, 7], VALUES[0, 9]), lambda v: (v < VALUES[0, 7]) | (v > VALUES[0, 9])),
        (InSet("x", [0.01, -0.01], 0.002), lambda v: np.minimum(abs(v - 0.01), abs(v + 0.01)) <= 0.002),
        (InSet("x", [0.01, -0.01]), lambda v: np.isin(v, [nearest(v, 0.01), nearest(v, -0.01)])),
        (Fix("x", 0.01), lambda v: v == nearest(v, 0.01)),
        (Fix("x", 0.028), lambda v: v == v.max()),
        (Target("x", 0.01, hard=True), lambda v: v == nearest(v, 0.01)),
        (Target("x", 5.0, hard=True, tolerance=9.0), lambda v: v == v.max()),
        (Target("x", 0.01, sigma=0.001), lambda v: np.full(len(v), True)),
    ],
    ids=lambda value: str(value) if isinstance(value, Constraint) else "",
)
def test_tokens_are_allowed_by_their_real_value(constraint, oracle):
    bound = bind([constraint], SPACE, VALUES, 2)
    assert bound.allowed.shape == (1, 2, 5, 256)
    expected = oracle(VALUES[0])
    assert (bound.allowed[0, :, 0] == expected).all()
    assert expected.any()
    assert bound.allowed[0, :, 1:].all()


def nearest(values, wanted):
    return values[np.argmin(np.abs(values - wanted))]


def test_both_codes_of_openvlas_double_center_are_allowed():
    assert bind([Fix("x", 0.028)], SPACE, VALUES, 1).allowed[0, 0, 0].nonzero()[0].tolist() == [254, 255]


def test_nearest_moves_to_the_closest_real_value_and_keeps_what_is_allowed():
    bound = bind([Forbid("x", -0.004, 0.01), Range("y", 0.0, 0.001)], SPACE, VALUES, 1)
    for dim in range(5):
        row, allowed = VALUES[dim], bound.allowed[0, 0, dim]
        for code, goal in enumerate(bound.nearest[0, 0, dim]):
            assert allowed[goal]
            assert abs(row[goal] - row[code]) == np.abs(row[allowed] - row[code]).min()
            assert goal == code or not allowed[code]


def test_hard_targets_come_after_all_other_constraints():
    for order in (1, -1):
        pair = [Target("x", 0.02, hard=True, tolerance=0.02), Range("x", None, 0.005)][::order]
        allowed = VALUES[0][bind(pair, SPACE, VALUES, 1).allowed[0, 0, 0]]
        assert allowed.tolist() == [VALUES[0][VALUES[0] <= 0.005].max()]
    with pytest.raises(InfeasibleConstraintError, match="cannot hold together"):
        bind([Target("x", 0.02, hard=True), Range("x", None, 0.005)], SPACE, VALUES, 1)


def test_soft_targets_add_up_in_nats():
    soft = [Target("x", 0.01, sigma=0.002), Target("x", 0.0, sigma=0.004, weight=3.0, max_nats=2.0, steps=1)]
    bias = bind(soft, SPACE, VALUES, 2).bias
    first = -(((VALUES[0] - 0.01) / 0.002) ** 2) / 2
    second = np.maximum(-3 * (VALUES[0] / 0.004) ** 2 / 2, -2.0)
    np.testing.assert_allclose(bias[0, 0, 0], first, rtol=1e-12)
    np.testing.assert_allclose(bias[0, 1, 0], first + second, rtol=1e-12)
    assert not bias[0, :, 1:].any()
    assert bind([Range("x", 0, 1)], SPACE, VALUES, 2).bias is None


def test_a_soft_target_out_of_reach_warns_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            bind([Target("x", 0.1234, sigma=0.01)], SPACE, VALUES, 2)
    assert len(caplog.records) == 1
    assert "at least 5 steps" in caplog.text


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, [0, 1, 2, 3]),
        (1, [1]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([3, 0], [0, 3]),
    ],
)
def test_steps_choose_within_the_chunk(steps, expected):
    bound = bind([Range("x", 0, 1, steps=steps)], SPACE, VALUES, 4)
    assert np.flatnonzero(~bound.allowed[0, :, 0].all(-1)).tolist() == expected


@pytest.mark.parametrize("steps", [4, -5, slice(2, 9), slice(3, 3), [0, 4]])
def test_steps_outside_the_chunk_are_refused(steps):
    with pytest.raises(ConstraintError, match=r"not all in a chunk of 4 \(0\.\.3\)"):
        bind([Range("x", 0, 1, steps=steps)], SPACE, VALUES, 4)


def test_ten_centimeters_in_one_step_is_an_error_that_explains_itself():
    with pytest.raises(InfeasibleConstraintError) as caught:
        bind([[], [Fix("x", 0.10, steps=1)]], SPACE, VALUES, 2)
    error = caught.value
    assert (error.sample, error.step, error.unit) == (1, 1, "m")
    assert error.nearest == VALUES[0].max()
    assert error.reachable == (VALUES[0].min(), VALUES[0].max())
    assert error.names == ("Fix('x', value=0.1, steps=1)",)
    assert error.bin_width == pytest.approx(0.058 / 255)
    for part in (
        "'x' (m, delta, base frame)",
        "sample 1, step 1",
        "wanted 0.1 m",
        "reachable -0.0298863..0.0278863 m",
    ):
        assert part in str(error)
    assert "nearest reachable value 0.0278863 m" in str(error)
    assert "reach of one step is 0.0278863 m: 0.1 m needs at least 4 steps" in error.suggestion
    assert "ask for 0.025 m in each of 4 steps" in error.suggestion
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.nearest == error.nearest


@pytest.mark.parametrize(
    ("constraints", "part"),
    [
        ([Range("x", -1.0, -0.1)], "-0.1 m needs at least 4 steps"),
        ([Range("height", 0.6, 0.7)], "constant in the statistics: every token means 0.5"),
        ([Fix("gripper", 0.5)], "only ever open (1) or closed (0)"),
        ([Range("x", VALUES[0, 7] + 1e-5, VALUES[0, 8] - 1e-5)], "No token has a value there"),
        ([Forbid("x", None, None)], "wanted nothing"),
        ([Target("yaw", 0.5, hard=True)], "wanted 0.5 rad"),
        ([InSet("x", [0.5, -0.05])], "nearest reachable value -0.0298863 m"),
    ],
)
def test_empty_sets_say_why(constraints, part):
    with pytest.raises(InfeasibleConstraintError) as caught:
        bind(constraints, SPACE, VALUES, 2)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absolute_and_unnamed_dimensions_get_no_talk_of_steps():
    absolute = ActionSpace(NAMES, UNITS, False)
    for space in (absolute, ActionSpace.unnamed(5)):
        with pytest.raises(InfeasibleConstraintError) as caught:
            bind([Fix(0, 0.1)], space, VALUES, 2)
        assert "steps" not in caught.value.suggestion
        assert "unnorm_key" in caught.value.suggestion


def test_a_conflict_names_the_smallest_set_to_blame():
    spec = [
        Range("x", -0.02, 0.02),
        Range("x", 0.01, None),
        Fix("y", 0.0),
        Forbid("x", 0.015, 0.5),
        Range("x", None, 0.005),
    ]
    with pytest.raises(InfeasibleConstraintError, match="cannot hold together") as caught:
        bind(spec, SPACE, VALUES, 1)
    assert caught.value.names == ("Range('x', low=0.01)", "Range('x', high=0.005)")
    assert caught.value.nearest is None


def test_a_constant_dimension_is_fine_if_its_value_is_allowed():
    assert bind([Range("height", 0.4, 0.6), Fix("height", 0.5)], SPACE, VALUES, 1).allowed.all()
    assert bind([Fix("height", 0.5)], SPACE, VALUES, 1, grid=False).project(np.full((1, 5), 0.5))[0, 3] == 0.5


def test_between_two_tokens_projection_can_what_the_grid_cannot():
    low, high = VALUES[0, 100] + 1e-5, VALUES[0, 101] - 1e-5
    bound = bind([Range("x", low, high)], SPACE, VALUES, 1, grid=False)
    chunk = VALUES[:, 30].reshape(1, 1, 5)
    assert bound.project(chunk)[0, 0, 0] == low
    with pytest.raises(InfeasibleConstraintError):
        bind([Range("x", 0.0281, 1.0)], SPACE, VALUES, 1, grid=False)
    bind([Range("x", 0.02799, 1.0)], SPACE, VALUES, 1, grid=False)  # within half a bin of the last token


def test_named_values_are_exact_when_projecting():
    bound = bind([Fix("x", 0.0123), InSet("y", [0.001, 0.002])], SPACE, VALUES, 3, grid=False)
    codes = np.random.default_rng(0).integers(0, 256, (50, 3, 5))
    moved = bound.project(VALUES[np.arange(5), codes])
    assert (moved[..., 0] == 0.0123).all()
    assert np.isin(moved[..., 1], [0.001, 0.002]).all()
    assert not bound.violations(moved).any()


def test_projection_leaves_what_is_allowed_bit_by_bit_and_moves_the_rest_no_further_than_needed():
    spec = [Range("x", -0.01, 0.01), Forbid("y", 0.0, 0.01), Range("yaw", None, 0.1, steps=0)]
    bound = bind(spec, SPACE, VALUES, 2, grid=False)
    codes = np.random.default_rng(1).integers(0, 256, (200, 2, 5))
    before = VALUES[np.arange(5), codes]
    after = bound.project(before)
    x, y, yaw = before[..., 0], before[..., 1], before[:, 0, 2]
    assert after[..., 0].tobytes() == np.clip(x, -0.01, 0.01).tobytes()
    assert after[:, 0, 2].tobytes() == np.minimum(yaw, 0.1).tobytes()
    assert after[:, 1, 2:].tobytes() == before[:, 1, 2:].tobytes()
    keep = (y < 0) | (y > 0.01)
    assert (after[..., 1][keep] == y[keep]).all()
    assert ((after[..., 1] < 0) | (after[..., 1] > 0.01)).all()
    expected = np.where(y <= 0.005, np.nextafter(0, -1), np.nextafter(0.01, 1))
    assert (after[..., 1][~keep] == expected[~keep]).all()
    np.testing.assert_array_equal(bound.violations(before)[..., 0], np.abs(after - before)[..., 0])
    assert before.tobytes() == VALUES[np.arange(5), codes].tobytes()


def test_a_binary_gripper_stays_binary_through_projection():
    chunk = np.array([[[0, 0, 0, 0.5, 0.3], [0, 0, 0, 0.5, 0.5]]])
    assert project(chunk, [], SPACE)[..., 4].tolist() == [[0.0, 1.0]]
    assert project(chunk, [Range("gripper", 0.2, 2)], SPACE)[..., 4].tolist() == [[1.0, 1.0]]
    assert project(chunk, [Fix("gripper", "closed", steps=1)], SPACE)[..., 4].tolist() == [[0.0, 0.0]]
    with pytest.raises(InfeasibleConstraintError, match="only ever open"):
        project(chunk, [Range("gripper", 0.2, 0.8)], SPACE)


@pytest.mark.parametrize(("opened", "closed"), [(1.0, 0.0), (0.0, 1.0), (-1.0, 1.0), (0.08, 0.0)])
def test_open_and_closed_follow_the_robots_convention(opened, closed):
    space = ActionSpace(NAMES, UNITS, gripper=Gripper("gripper", open=opened, closed=closed))
    values = space.settle(table().T).T
    values[4] = np.where(np.arange(256) < 128, min(opened, closed), max(opened, closed))
    for word, number in (("open", opened), ("closed", closed)):
        allowed = bind([Fix("gripper", word)], space, values, 1).allowed[0, 0, 4]
        assert set(values[4][allowed]) == {number}
        assert (project(np.zeros((1, 5)), [Fix(-1, word)], space)[:, 4] == number).all()


def test_open_needs_a_gripper_in_that_dimension():
    with pytest.raises(ConstraintError, match="has its gripper in 'gripper'"):
        bind([Fix("x", "open")], SPACE, VALUES, 1)
    with pytest.raises(ConstraintError, match="declares no gripper"):
        bind([Fix(4, "open")], ActionSpace.unnamed(5), VALUES, 1)


def test_an_open_gripper_that_is_not_binary_is_its_outermost_token():
    space = ActionSpace(NAMES, UNITS, gripper=Gripper("gripper", binary=False))
    values = table(space=space)
    allowed = values[4][bind([Fix("gripper", "open")], space, values, 1).allowed[0, 0, 4]]
    assert set(allowed) == {values[4].max()}


def test_lists_per_sample():
    bound = bind([[Range("x", 0, 1)], [], [Range("x", None, 0)]], SPACE, VALUES, 1, limits=[Range("y", 0, 1)])
    assert bound.allowed.shape == (3, 1, 5, 256)
    assert (~bound.allowed[:, 0, 1]).any(-1).all()
    chunk = np.tile(VALUES[:, 3], (6, 1, 1))  # two sequences of each sample
    assert (bound.project(chunk)[:, 0, 0] != VALUES[0, 3]).tolist() == [True, True, False, False, False, False]
    bound.check_batch(3)
    with pytest.raises(ConstraintError, match=r"3 samples .* a batch of 2"):
        bound.check_batch(2)
    with pytest.raises(ConstraintError, match="do not belong"):
        bound.project(chunk[:4])
    bind([Range("x", 0, 1)], SPACE, VALUES, 1).check_batch(17)


@pytest.mark.parametrize("bad", [[Range("x", 0, 1), [Range("x", 0, 1)]], "x", [3], [["x"]], {"x": 1}])
def test_what_is_no_list_of_constraints_is_refused(bad):
    with pytest.raises(ConstraintError, match="list"):
        bind(bad, SPACE, VALUES, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Range("x", 2, 1),
        lambda: Range("x", math.nan, 1),
        lambda: Range("x", math.inf, math.inf),
        lambda: Range("x", "0", 1),
        lambda: Range("x", True, 1),
        lambda: Range(1.5, 0, 1),
        lambda: Range(None, 0, 1),
        lambda: Range("x", 0, 1, steps="all"),
        lambda: Range("x", 0, 1, steps=[]),
        lambda: Range("x", 0, 1, steps=slice(0, 4, 0)),
        lambda: Range("x", 0, 1, steps=0.5),
        lambda: InSet("x", []),
        lambda: InSet("x", 0.1),
        lambda: InSet("x", [math.inf]),
        lambda: Fix("x", math.nan),
        lambda: Fix("x", "ajar"),
        lambda: Fix("x", 0.1, tolerance=-1),
        lambda: Target("x", 0.1),
        lambda: Target("x", 0.1, sigma=0),
        lambda: Target("x", 0.1, sigma=0.1, hard=True),
        lambda: Target("x", 0.1, sigma=0.1, tolerance=0.1),
        lambda: Target("x", 0.1, sigma=0.1, weight=0),
        lambda: Target("x", 0.1, sigma=math.inf),
    ],
)
def test_malformed_constraints_are_refused_at_birth(make):
    with pytest.raises(ConstraintError):
        make()


def test_unknown_dimensions_list_what_there_is():
    with pytest.raises(ActionSpaceError, match="did you mean 'gripper'"):
        bind([Fix("griper", 1.0)], SPACE, VALUES, 1)
    with pytest.raises(ActionSpaceError, match=r"outside 0\.\.4"):
        bind([Fix(5, 1.0)], SPACE, VALUES, 1)


@pytest.mark.parametrize(
    "constraint",
    [
        Range("x", -0.01, 0.01),
        Range("x", None, 0.01, steps=slice(0, 4)),
        Forbid(2, -math.inf, 0.0, steps=[0, -1]),
        InSet("x", (0.1, 0.2), tolerance=0.01),
        Fix("gripper", "open", steps=3),
        Fix(np.int64(1), np.float32(0.5)),
        Target("x", 0.1, sigma=0.01, weight=2, max_nats=5),
        Target("x", 0.1, hard=True, tolerance=1),
    ],
    ids=lambda value: str(value) if isinstance(value, Constraint) else "",
)
def test_json_round_trip(constraint):
    text = json.dumps(constraint.to_dict(), allow_nan=False)
    again = constraint_from_dict(json.loads(text))
    assert again == constraint
    assert type(again) is type(constraint)
    assert Constraint.from_dict(json.loads(text)) == constraint


@pytest.mark.parametrize("bad", [{}, {"type": "Teleport"}, {"type": "Range", "dim": "x", "lo": 1}, "Range", None])
def test_json_of_something_else_is_refused(bad):
    with pytest.raises(ConstraintError):
        constraint_from_dict(bad)
    with pytest.raises(ConstraintError, match="description of a Fix"):
        Fix.from_dict(Range("x", 0, 1).to_dict())


def test_values_and_chunks_of_the_wrong_form_are_refused():
    with pytest.raises(ConstraintError, match="shape"):
        bind([], SPACE, VALUES[:3], 1)
    with pytest.raises(ConstraintError, match="token grid is needed"):
        bind([], SPACE, None, 1)
    bound = bind([Range("x", 0, 1)], SPACE, VALUES, 2, grid=False)
    with pytest.raises(ConstraintError, match="chunks have shape"):
        bound.project(np.zeros((3, 5)))
    with pytest.raises(ConstraintError, match="NaN"):
        bound.project(np.full((2, 5), np.nan))
    with pytest.raises(ConstraintError, match="without token values"):
        _ = bind([Range("x", 0, 1)], SPACE, None, 2, grid=False).allowed


def test_the_bounds_of_the_statistics_are_within_half_a_bin_of_a_token():
    # The outermost tokens lie half a bin inside; asking for the bound itself must not fail by rounding.
    rng = np.random.default_rng(3)
    centers = UniformActionTokenizer(256).grid.values
    space = ActionSpace(["x"], ["m"])
    for _ in range(300):
        low = rng.normal() * 10.0 ** rng.integers(-3, 3)
        high = low + abs(rng.normal()) * 10.0 ** rng.integers(-4, 2)
        values = (low + (centers + 1) / 2 * (high - low))[None]
        for bound, code in ((low, 0), (high, 255)):
            assert bind([Fix("x", bound)], space, values, 1).allowed[0, 0, 0, code]
            assert bind([Fix("x", bound)], space, values, 1, grid=False).project([[values[0, 9]]]) == bound


def test_nearest_finds_its_way_among_tokens_of_equal_value():
    values = np.array([[0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0]])
    bound = bind([Forbid("x", 1.5, 2.5)], ActionSpace(["x"], ["m"]), values, 1)
    assert values[0, bound.nearest[0, 0, 0]].tolist() == [0, 0, 1, 1, 1, 1, 3]
    assert bound.nearest[0, 0, 0, :4].tolist() == [0, 1, 2, 3]


def test_soft_targets_move_nothing_when_projecting():
    chunk = np.full((1, 1, 5), 0.7)
    bound = bind([Target("x", 0.0, sigma=0.001)], SPACE, VALUES, 1, grid=False)
    assert bound.project(chunk)[..., :4].tobytes() == chunk[..., :4].tobytes()
    assert project(chunk, [Target("x", 0.0, sigma=0.001)], SPACE)[0, 0, 0] == 0.7


def test_projecting_a_continuous_chunk_adds_the_limits():
    chunk = np.full((2, 3, 5), 0.7, dtype=np.float32)
    moved = project(chunk, [[Range("y", None, 0.2)], []], SPACE, limits=[Range("x", -0.5, 0.5)])
    assert moved.dtype == np.float64
    assert (moved[..., 0] == 0.5).all()
    assert moved[:, 0, 1].tolist() == [0.2, float(np.float32(0.7))]
    with pytest.raises(ConstraintError, match=r"2 samples .* a batch of 4"):
        project(np.zeros((4, 3, 5)), [[], []], SPACE)
