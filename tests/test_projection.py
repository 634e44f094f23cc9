"""Projection: everything that comes back is allowed, what was allowed comes back, and nothing moves further than needed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vla_actions.actions import ActionSpace, Gripper
from hf_vla_actions.constraints.allowed import Allowed
from hf_vla_actions.constraints.intervals import IntervalSet
from hf_vla_actions.constraints.laws import Laws, Moves, find_backups, find_limits
from hf_vla_actions.constraints.projection import project_chunks
from hf_vla_actions.constraints.terms import Change, Hold, Predicate, WeightedSum, Zone
from hf_vla_actions.errors import ConstraintError

REACH = IntervalSet.from_pairs([(-0.06, 0.06)])
STATES = IntervalSet.points([0.0, 1.0])
BOTH = pytest.mark.parametrize("style", ["axis", "direction"])


def space_of(dof, gripper=True):
    names = ["x", "y", "z", "roll", "pitch", "yaw"][: dof - gripper] + ["gripper"] * gripper
    units = (["m"] * 3 + ["rad"] * 3)[: dof - gripper] + [None] * gripper
    return ActionSpace(
        names, units, (True,) * (dof - gripper) + (False,) * gripper, gripper=Gripper("gripper") if gripper else None
    )


class Problem:
    """Sets, terms and laws of one sample; members of -0.06..0.06 where `sets` says nothing."""

    def __init__(self, horizon, dof, sets=None, terms=(), start=None, gripper=True, reach=REACH):
        self.space, self.terms = space_of(dof, gripper), list(terms)
        members = [reach] * (dof - gripper) + [STATES] * gripper
        self.sets = {(t, d): members[d] for t in range(horizon) for d in range(dof)} | (sets or {})
        rest = np.array([0.0] * (dof - gripper) + [np.nan] * gripper)
        start = np.full(dof, np.nan) if start is None else np.asarray(start, dtype=float)
        moves = Moves(members, self.sets, find_limits(terms, horizon, dof), rest, find_backups(terms, rest, horizon))
        self.possible = moves.empty is None
        self.laws = Laws(moves, self.terms, start, np.zeros(self.space.dof))
        self.allowed = Allowed(self.sets, self.terms)

    def project(self, chunks, style="axis"):
        return project_chunks(chunks, self.sets, self.terms, self.laws, self.space, style)

    def can_start(self, chunk):
        if not self.possible:
            return False
        made = [self.laws.complete(law, chunk, 0, 0) for law in range(self.laws.n_laws)]
        return any(self.allowed.safely(completion).all() for completion in made)

    def check(self, chunks):
        """The promise in its own words, not by the code that keeps it."""
        for (t, d), members in self.sets.items():
            assert members.contains(chunks[:, t, d]).all(), (t, d)
        for term in self.terms:
            assert (term.excess(chunks) == 0).all(), term


def within(dims, high, horizon, power=1, low=None, weights=None, **more):
    weights = np.ones(len(dims)) if weights is None else np.asarray(weights, dtype=float)
    low = np.full(horizon, -np.inf if low is None else low)
    return WeightedSum(tuple(dims), weights, power, low, np.full(horizon, float(high)), **more)


def ending(dim, total, tolerance, horizon, counted=None):
    low, high = np.full(horizon, -np.inf), np.full(horizon, np.inf)
    low[-1], high[-1] = total - tolerance, total + tolerance
    return WeightedSum((dim,), np.ones(1), 1, low, high, True, counted, 0.0)


def random_problem(rng):
    """Any mix of terms around a robot somewhere; most of them can start."""
    horizon, dof = int(rng.integers(1, 9)), int(rng.integers(2, 8))
    free = dof - 1
    start = np.append(rng.uniform(-0.03, 0.03, free) * (rng.random() < 0.6), float(rng.integers(2)))
    known = rng.random() < 0.8
    sets, terms = {}, []
    if rng.random() < 0.4:  # a band of moves that is forbidden, or single steps that are fixed
        band = IntervalSet.from_pairs([(-0.06, -0.004), (rng.uniform(0, 0.004), 0.05)])
        sets = {(t, int(rng.integers(free))): band for t in range(horizon)}
    if rng.random() < 0.3:
        low = rng.uniform(-0.03, 0.01)
        sets |= {(int(rng.integers(horizon)), 0): IntervalSet.from_pairs([(low, low + 0.02)])}
    if rng.random() < 0.7:
        limit = float(rng.choice([0.005, 0.02, 0.05]))
        terms += [Change(d, np.full(horizon, limit), start[d] if known else None) for d in range(free)]
    for d in range(min(free, 3)):
        if rng.random() < 0.5:
            pose, room = rng.uniform(-1, 1), rng.uniform(0.0, 0.15, 2)
            terms.append(within([d], pose + room[0], horizon, low=pose - room[1], cumulative=True, origin=pose))
    dims = list(range(min(free, 3)))
    if rng.random() < 0.6:
        power = [2, 2, "abs"][int(rng.integers(3))]
        terms.append(within(dims, rng.uniform(0.01, 0.06), horizon, power, weights=rng.choice([1.0, 2.0], len(dims))))
    if rng.random() < 0.2:
        terms.append(within(dims, 0.1, horizon, ["abs", 2, 1][int(rng.integers(3))], cumulative=True))
    if rng.random() < 0.3:
        terms.append(within(dims, 0.02, horizon, low=-0.03, weights=rng.uniform(0.2, 1, len(dims))))
    if rng.random() < 0.3:
        counted = rng.random(horizon) < 0.8
        counted[-1] = True
        terms.append(ending(free - 1, rng.uniform(-0.02, 0.02) * horizon, rng.choice([1e-9, 1e-3]), horizon, counted))
    if rng.random() < 0.5:
        center, size = rng.uniform(-0.1, 0.1, len(dims)), rng.uniform(0.005, 0.05, len(dims))
        delta, steps = np.ones(len(dims), dtype=bool), rng.random(horizon) < 0.9
        terms.append(Zone(tuple(dims), center - size, center + size, np.zeros(len(dims)), delta, steps))
    if rng.random() < 0.3:
        terms.append(
            Hold(free, 1.0, 0.0, int(rng.integers(1, 4)), rng.choice([None, 1]), start[-1], int(rng.integers(1, 5)))
        )
    if rng.random() < 0.2:
        terms.append(Predicate(lambda x: np.abs(x[:, :, 0]).max(axis=1) <= 0.03, None, "not too fast"))
    return Problem(horizon, dof, sets, terms, start)


def random_chunks(rng, problem, n):
    shape = (n, problem.laws.horizon, problem.laws.dof)
    chunks = rng.normal(rng.uniform(-0.02, 0.02), rng.choice([0.005, 0.02, 0.1]), shape)
    chunks[:, :, -1] = rng.random(shape[:2]) * 1.4 - 0.2
    return problem.space.settle(chunks)


def startable(seed, n=12):
    """A random problem that can start, and chunks to project."""
    rng = np.random.default_rng(seed)
    while True:
        problem = random_problem(rng)
        chunks = random_chunks(rng, problem, n)
        if problem.can_start(chunks[:1]):
            return problem, chunks


@BOTH
@pytest.mark.parametrize("seed", range(25))
def test_everything_that_comes_back_is_allowed(seed, style):
    problem, chunks = startable(seed)
    given = chunks.copy()
    moved = problem.project(chunks, style)
    assert np.array_equal(chunks, given)
    problem.check(moved)
    assert np.isin(moved[:, :, -1], [0.0, 1.0]).all()
    assert np.array_equal(problem.project(moved, style), moved)
    allowed = problem.allowed.exactly(chunks)
    assert np.array_equal(moved[allowed], chunks[allowed])


def test_the_random_problems_are_worth_it():
    """Most chunks have to be moved: otherwise the test above would show nothing."""
    drawn = [startable(seed) for seed in range(25)]
    assert sum((~problem.allowed.exactly(chunks)).sum() for problem, chunks in drawn) >= 150


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_all_checks_at_once_are_the_checks_one_by_one(horizon, seed):
    rng = np.random.default_rng(seed)
    last = [None, 0.0, 0.01][seed % 3]
    terms = [Change(d, rng.uniform(0.01, 0.04, horizon), last) for d in range(2)]
    terms += [
        within([d], 0.03, horizon, low=-0.02, cumulative=True, origin=rng.uniform(-0.01, 0.01)) for d in range(2)
    ]
    terms += [within([0, 1], 0.04, horizon, 2)]
    problem = Problem(horizon, 2, {}, terms, gripper=False)
    chunks = rng.normal(0, 0.015, (50, horizon, 2))
    chunks[:, 0] = np.where(rng.random((50, 2)) < 0.3, (last or 0.0) + terms[0].limits[0], chunks[:, 0])
    one_by_one = np.all([(term.excess(chunks) == 0).all(axis=1) for term in terms], axis=0)
    one_by_one &= np.all([members.contains(chunks[:, t, d]) for (t, d), members in problem.sets.items()], axis=0)
    assert np.array_equal(problem.allowed.exactly(chunks), one_by_one)
    assert not (problem.allowed.safely(chunks) & ~one_by_one).any()


CLOSED = {  # one constraint, three numbers of each step, and the nearest point in a formula
    "ball": (
        within([0, 1, 2], 0.02, 4, 2),
        lambda x: x * np.minimum(1, 0.02 / np.linalg.norm(x, axis=-1, keepdims=True)),
    ),
    "half-space": (
        within([0, 1, 2], 0.01, 4, weights=[1.0, -2.0, 0.5]),
        lambda x: x - np.maximum(x @ [1, -2, 0.5] - 0.01, 0)[..., None] * np.array([1, -2, 0.5]) / 5.25,
    ),
    "running sum": (
        ending(0, 0.03, 1e-6, 4),
        lambda x: x - [1, 0, 0] * ((x[:, :, 0].sum(axis=1) - 0.03) / 4)[:, None, None],
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_one_constraint_is_met_at_the_nearest_point(name):
    term, formula = CLOSED[name]
    problem = Problem(4, 3, {}, [term], gripper=False, reach=IntervalSet.from_pairs([(-9.0, 9.0)]))
    chunks = np.random.default_rng(1).normal(0, 0.03, (30, 4, 3))
    moved, best = problem.project(chunks), formula(chunks)
    problem.check(moved)
    way = np.linalg.norm((best - chunks).reshape(30, -1), axis=1)
    assert (np.linalg.norm((moved - chunks).reshape(30, -1), axis=1) <= way * (1 + 1e-3) + 1e-6).all()


def test_a_box_clamps_each_number_and_leaves_the_others_bit_by_bit():
    problem = Problem(4, 3, gripper=False)
    chunks = np.random.default_rng(2).normal(0, 0.06, (30, 4, 3))
    assert np.array_equal(problem.project(chunks), np.clip(chunks, -0.06, 0.06))


def test_what_has_nothing_to_do_with_a_violation_stays_bit_by_bit():
    terms = [Change(d, np.full(5, 0.02), 0.0) for d in range(3)]
    chunks = np.random.default_rng(3).uniform(-0.005, 0.005, (4, 5, 3))
    chunks[:, 2, 1] = 0.05
    moved = Problem(5, 3, {}, terms, np.zeros(3), gripper=False).project(chunks)
    assert np.array_equal(moved[:, :, [0, 2]], chunks[:, :, [0, 2]])
    assert np.array_equal(moved[:, [0, 4], 1], chunks[:, [0, 4], 1])
    assert (moved[:, 2, 1] < chunks[:, 2, 1]).all()


@pytest.mark.parametrize("seed", range(6))
def test_rate_and_box_against_all_points_of_a_fine_grid(seed):
    rng = np.random.default_rng(seed)
    limit, last = rng.uniform(0.01, 0.04), rng.uniform(-0.03, 0.03)
    terms = [Change(0, np.full(3, limit), last), within([0], 0.05, 3, low=-0.03, cumulative=True)]
    problem = Problem(3, 1, {}, terms, [last], gripper=False)
    chunk = rng.normal(0, 0.05, (1, 3, 1))
    if not problem.can_start(chunk):
        return
    moved = problem.project(chunk)
    problem.check(moved)
    center, width, best = np.zeros(3), 0.06, np.inf
    for _ in range(8):  # zoom into the best points of a grid: the problem is convex
        axes = [np.clip(c + np.linspace(-width, width, 41), -0.06, 0.06) for c in center]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3, 1)
        fine = grid[problem.allowed.exactly(grid)]
        distance = np.linalg.norm((fine - chunk)[:, :, 0], axis=1) if len(fine) else np.array([np.inf])
        if distance.min() < best:
            best, center = distance.min(), fine[distance.argmin(), :, 0]
        width *= 0.5
    assert np.linalg.norm(moved - chunk) <= best * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize("power", ["abs", 2])
@pytest.mark.parametrize("seed", range(4))
def test_no_allowed_chunk_nearby_is_closer(power, seed):
    """Everything convex at once: a nearest point cannot be improved by going toward any other allowed chunk."""
    rng, shape = np.random.default_rng(seed), (1, 12, 3)
    terms = [Change(d, np.full(12, 0.015), 0.0) for d in range(3)]
    terms += [within([d], 0.05, 12, low=-0.05, cumulative=True) for d in range(3)]
    terms += [within([0, 1, 2], 0.03, 12, power), within([0, 2], 0.02, 12, weights=[0.5, 0.8], cumulative=True)]
    problem = Problem(12, 3, {}, terms, np.zeros(3), gripper=False)
    chunk = rng.normal(0, 0.03, shape)
    moved = problem.project(chunk)
    problem.check(moved)
    others = problem.project(rng.normal(0, 0.03, (40, *shape[1:])) * rng.uniform(0, 1, (40, 1, 1)) + moved)
    problem.check(others)
    gain = ((chunk - moved) * (others - moved)).sum(axis=(1, 2))  # <= 0 at the nearest point of a convex set
    assert gain.max() <= 1e-4 * np.linalg.norm(chunk - moved) * np.linalg.norm(others - moved, axis=(1, 2)).max()


def test_direction_is_kept_exactly_where_speed_or_steps_are_limited():
    terms = [within([0, 1, 2], 0.03, 5, 2), within([3, 4, 5], 0.05, 5, 2)]
    problem = Problem(5, 7, {}, terms)
    chunks = problem.space.settle(np.random.default_rng(4).normal(0, 0.1, (20, 5, 7)))
    moved = problem.project(chunks, "direction")
    problem.check(moved)
    for group, limit in (([0, 1, 2], 0.03), ([3, 4, 5], 0.05)):
        factor = moved[..., group] / chunks[..., group]
        assert np.allclose(factor, factor[..., :1], rtol=1e-12)
        box, size = np.abs(moved[..., group]).max(axis=-1), np.linalg.norm(moved[..., group], axis=-1)
        full = np.isclose(box, 0.06, rtol=1e-8) | np.isclose(size, limit, rtol=1e-8) | (factor[..., 0] == 1)
        assert full.all()  # as large as possible
    assert np.array_equal(moved[..., 6], chunks[..., 6])


def test_direction_style_slides_along_walls():
    terms = [within([0], 0.05, 4, low=-1, cumulative=True), within([0, 1, 2], 0.012, 4, 2)]
    chunks = np.full((1, 4, 7), [0.016, 0.012, 0.0, 0.01, 0.0, 0.0, 1.0])
    moved = Problem(4, 7, {}, terms).project(chunks, "direction")[0]
    Problem(4, 7, {}, terms).check(moved[None])
    assert np.allclose(moved[:, 1], 0.0072, rtol=1e-6)  # shortened from 20 to 12 mm in its direction
    assert np.allclose(np.cumsum(moved[:, 0])[[2, 3]], [0.0288, 0.0384], rtol=1e-6)
    assert np.array_equal(moved[:, 3:], chunks[0, :, 3:])
    narrow = [within([0], 0.02, 4, low=-1, cumulative=True), within([0, 1, 2], 0.012, 4, 2)]
    stopped = Problem(4, 7, {}, narrow).project(chunks, "direction")[0]
    assert np.cumsum(stopped[:, 0])[-1] == pytest.approx(0.02, rel=1e-3)
    assert np.allclose(stopped[:, 1], 0.0072, rtol=1e-6)  # the wall stops x only


def test_the_nearer_of_two_bounds_is_a_wall():
    sets = {(0, d): IntervalSet.from_pairs([(-0.01, 0.002 if d == 0 else 0.01)]) for d in range(3)}
    chunks = np.array([[[0.02, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    moved = Problem(1, 7, sets).project(chunks, "direction")[0, 0]
    assert np.allclose(moved[:3], [0.002, 0.005, 0.0])
    rail = {(0, 0): IntervalSet.points([0.0])} | {(0, d): IntervalSet.from_pairs([(-0.01, 0.01)]) for d in (1, 2)}
    for sets in (rail, {(0, 0): rail[0, 0]}):  # a rail slows nothing down
        moved = Problem(1, 7, sets).project(chunks, "direction")[0, 0]
        assert np.allclose(moved[:3], [0.0, 0.01, 0.0])


def test_direction_goes_number_by_number_where_no_scaling_helps():
    sets = {(0, 0): IntervalSet.from_pairs([(0.01, 0.02)])}
    chunks = np.array([[[-0.03, 0.04, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    moved = Problem(1, 7, sets).project(chunks, "direction")
    Problem(1, 7, sets).check(moved)
    assert moved[0, 0, 0] == 0.01


@BOTH
def test_a_path_may_not_jump_over_a_zone(style):
    zone = Zone((0,), np.array([0.03]), np.array([0.035]), np.zeros(1), np.ones(1, dtype=bool), np.ones(3, dtype=bool))
    problem = Problem(3, 2, {}, [zone])
    chunks = np.array([[[0.02, 1.0], [0.05, 1.0], [-0.01, 0.0]]])
    moved = problem.project(chunks, style)
    problem.check(moved)
    assert moved[0, 0, 0] == 0.02
    assert 0.0099 < moved[0, 1, 0] < 0.01  # up to the zone, not over it
    assert np.array_equal(moved[..., 1], chunks[..., 1])


@BOTH
def test_a_step_into_a_zone_slides_along_it(style):
    zone = Zone((0, 1), np.array([0.03, -1.0]), np.array([0.5, 1.0]), np.zeros(2), np.ones(2, bool), np.ones(2, bool))
    problem = Problem(2, 7, {}, [zone])
    chunks = np.full((1, 2, 7), [0.02, 0.02, 0.0, 0.01, 0.0, 0.0, 1.0])
    moved = problem.project(chunks, style)[0]
    assert np.array_equal(moved[0], chunks[0, 0])
    assert np.allclose(moved[1, 1], 0.02, rtol=1e-3)
    assert np.array_equal(moved[1, 3:], chunks[0, 1, 3:])


@BOTH
def test_a_gripper_that_has_to_wait_moves_nothing_else(style):
    hold = Hold(6, 1.0, 0.0, 3, None, 1.0, 1)
    chunks = np.full((1, 4, 7), [0.02, -0.01, 0.0, 0.01, 0.0, 0.0, 0.0])
    problem = Problem(4, 7, {}, [hold], np.array([0.0] * 6 + [1.0]))
    moved = problem.project(chunks, style)
    problem.check(moved)
    assert moved[0, :, 6].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert np.array_equal(moved[..., :6], chunks[..., :6])


@BOTH
def test_a_gripper_without_a_set_is_never_between_its_states(style):
    problem = Problem(3, 2, {}, [within([0, 1], 1.0, 3)])
    problem.sets = {}
    chunks = np.array([[[0.05, 1.0]] * 3])
    moved = project_chunks(chunks, {}, problem.terms, problem.laws, problem.space, style)
    assert np.isin(moved[..., 1], [0.0, 1.0]).all()
    problem.check(moved)


def test_numbers_in_a_gap_go_to_its_nearer_end():
    band = IntervalSet.from_pairs([(-0.06, -0.01), (0.02, 0.06)])
    problem = Problem(2, 1, {(0, 0): band, (1, 0): band}, [Change(0, np.full(2, 0.02), None)], gripper=False)
    moved = problem.project(np.array([[[0.004], [0.03]], [[0.006], [0.05]], [[-0.02], [0.001]]]))
    problem.check(moved)
    assert np.allclose(moved[0, :, 0], [0.02, 0.03], rtol=1e-4)  # the nearer end leads nowhere
    assert np.allclose(moved[1, :, 0], [0.02, 0.04], rtol=1e-4)
    assert moved[2, :, 0].tolist() == [-0.02, -0.01]


def test_values_of_tokens_stay_values_of_tokens():
    grid = IntervalSet.points(np.linspace(-0.06, 0.06, 25))
    terms = [Change(0, np.full(6, 0.011), 0.0), within([0], 0.07, 6, low=-0.07, cumulative=True)]
    problem = Problem(6, 1, {(t, 0): grid for t in range(6)}, terms, [0.0], gripper=False)
    chunks = grid.nearest(np.random.default_rng(5).normal(0.02, 0.03, (20, 6, 1)))
    moved = problem.project(chunks)
    problem.check(moved)
    assert np.abs(moved - chunks).max() < 0.1


def test_chunks_do_not_depend_on_each_other():
    problem, chunks = startable(0, 6)
    alone = np.concatenate([problem.project(chunk[None]) for chunk in chunks])
    assert np.allclose(problem.project(chunks), alone, rtol=0, atol=1e-7)


def test_a_start_that_leads_nowhere_is_refused():
    sets = {(0, 0): IntervalSet.from_pairs([(0.05, 0.06)])}
    problem = Problem(2, 1, sets, [within([0], 0.01, 2, low=-0.01, cumulative=True)], gripper=False)
    with pytest.raises(ConstraintError, match="no way of completing"):
        problem.project(np.zeros((1, 2, 1)))


def test_an_unknown_style_is_refused():
    with pytest.raises(ConstraintError, match="'axis', 'direction'"):
        Problem(2, 1, gripper=False).project(np.zeros((1, 2, 1)), "euclid")


def test_nothing_to_do_for_no_chunks():
    assert Problem(2, 3).project(np.zeros((0, 2, 3))).shape == (0, 2, 3)
