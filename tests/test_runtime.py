"""Executors that wait for their chunk: receding horizon, ensembling, retiming, real-time chunking in lockstep."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from tiny import INSTRUCTIONS, picture, sharpen, tiny_llava

from hf_vla_actions import ActionSpace, Gripper, PoseDims
from hf_vla_actions.actions.rotations import from_matrix, size_of, to_matrix
from hf_vla_actions.constraints import Context, Prefix, Range, Rate, RetimedChunk, Speed, Target, Workspace
from hf_vla_actions.errors import ActionSpaceError, ExecutionError
from hf_vla_actions.runtime import (
    AsyncPolicy,
    Overlap,
    Policy,
    RealTimeChunking,
    RecedingHorizon,
    Retime,
    SimulatedClock,
    SimulatedWorker,
    TemporalEnsemble,
    at_anchor,
    ensemble_weights,
    overlap_weights,
)

DELTA = ActionSpace(("x", "y", "gripper"), ("m", "m", None), (True, True, False), gripper=Gripper("gripper"))
PLAIN = ActionSpace.unnamed(2)


class Counting:
    """A source of random chunks that remembers what it was asked and what it said."""

    def __init__(self, horizon=16, dof=2, seed=0):
        self.rng, self.shape = np.random.default_rng(seed), (horizon, dof)
        self.looks, self.chunks, self.prefixes = [], [], []

    def __call__(self, obs, prefix=None):
        self.looks.append(obs["step"])
        self.prefixes.append(prefix)
        self.chunks.append(self.rng.normal(size=self.shape))
        return self.chunks[-1].copy()


def run(policy, steps):
    return np.array([policy({"step": step}) for step in range(steps)])


def test_a_second_at_ten_hertz_with_horizon_16_and_4_executed_steps_needs_3_inferences():
    source = Counting(horizon=16)
    actions = run(RecedingHorizon(source, execute_steps=4), 10)
    assert source.looks == [0, 4, 8]
    np.testing.assert_array_equal(actions[:8], np.concatenate([chunk[:4] for chunk in source.chunks[:2]]))
    np.testing.assert_array_equal(actions[8:], source.chunks[2][:2])


@pytest.mark.parametrize(("inner", "outer", "looks"), [(4, None, 3), (4, 2, 5), (None, 5, 2), (None, None, 1)])
def test_a_policy_in_a_policy_keeps_its_source_and_what_is_not_said_again(inner, outer, looks):
    source = Counting()
    policy = RecedingHorizon(source, inner)
    outside = RecedingHorizon(policy, outer)
    run(outside, 10)
    assert len(source.looks) == looks
    # The source may ask the inner policy what was done: they share it.
    assert len(policy.executed) == len(outside.executed) == 10
    policy.first_context = "something"
    outside.reset()
    assert not policy.executed
    assert policy.first_context is None


def test_reset_forgets_and_what_is_returned_may_be_changed():
    source = Counting()
    policy = RecedingHorizon(source, 4)
    first = policy({"step": 0})
    first *= 100
    np.testing.assert_array_equal(policy.executed[-1], source.chunks[0][0])
    policy.reset()
    np.testing.assert_array_equal(policy({"step": 9}), source.chunks[1][0])
    assert source.looks == [0, 9]


def test_a_source_that_keeps_writing_into_its_array_changes_nothing():
    array = np.zeros((4, 2))
    policy = RecedingHorizon(lambda obs: array)
    policy({})
    array[:] = 7
    assert (policy({}) == 0).all()


class Single(Policy):
    def __call__(self, obs):
        return np.zeros(2)

    def reset(self):
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecedingHorizon(lambda obs: np.zeros(2))({}), "single actions cannot stand here"),
        (lambda: RecedingHorizon(lambda obs: np.zeros((1, 4, 2)))({}), r"\(horizon, dof\), got shape \(1, 4, 2\)"),
        (lambda: RecedingHorizon(lambda obs: np.zeros((0, 2)))({}), "got shape"),
        (lambda: RecedingHorizon(lambda obs: [[0, 1], [np.nan, 0]])({}), "step 1 of a chunk has NaN"),
        (lambda: RecedingHorizon(lambda obs: "chunk")({}), "array of numbers"),
        (lambda: RecedingHorizon(Counting(3), 4)({"step": 0}), "more than the horizon 3"),
        (lambda: RecedingHorizon(Counting(3), 0), "whole number of at least 1"),
        (lambda: RecedingHorizon(np.zeros((3, 2))), "takes a function"),
        (lambda: RecedingHorizon(Single()), "Single decides single actions"),
        (lambda: RecedingHorizon(TemporalEnsemble(Counting(), space=PLAIN)), "decides single actions"),
        (lambda: TemporalEnsemble(RealTimeChunking(Counting(), 4, delay_steps=1), space=PLAIN), "leave out"),
        (lambda: TemporalEnsemble(Counting(), -0.1, space=PLAIN), "other end is favours"),
        (lambda: TemporalEnsemble(Counting(), math.nan, space=PLAIN), "exp_weight"),
        (lambda: TemporalEnsemble(Counting(), space=PLAIN, favours="new"), "favours is one of"),
        (lambda: TemporalEnsemble(Counting(dof=3), space=PLAIN)({"step": 0}), r"\(horizon, 2\)"),
        (lambda: RealTimeChunking(Counting(), delay_steps=1), "give execute_steps"),
        (lambda: RealTimeChunking(Counting(), 2, delay_steps=3), "at least delay_steps"),
        (lambda: RealTimeChunking(Counting(8), 6, delay_steps=3)({"step": 0}), "at most the horizon"),
        (lambda: RealTimeChunking(Counting(8), 8, delay_steps=0)({"step": 0}), "execute_steps below it"),
        (lambda: overlap_weights(3, 4), "4 steps cannot be frozen of 3"),
        (lambda: Overlap(np.zeros((2, 2)), [1.0, 1.1], 1), "weights fall"),
        (lambda: Overlap(np.zeros((2, 2)), [0.5, 0.1], 1), "1 for the 1 frozen"),
        (lambda: Overlap(np.zeros((2, 2)), [0.5, 0.6], 0), "weights fall"),
        (lambda: Overlap(np.zeros((2, 2)), [1.0], 1), "weights"),
        (lambda: Overlap(np.full((1, 2), np.inf), [1.0], 1), "NaN or infinite"),
        (lambda: Overlap.of(np.zeros((5, 2)), 1).imposed_on(np.zeros((4, 2))), "after an overlap"),
    ],
)
def test_what_cannot_be_carried_out_raises(make, message):
    with pytest.raises(ExecutionError, match=message):
        make()


def oracle_ensemble(chunks, step, exp_weight, favours):
    """What the papers say, prediction by prediction."""
    said = [(made, chunk[step - made]) for made, chunk in enumerate(chunks) if 0 <= step - made < len(chunk)]
    if favours == "newest":
        said = said[::-1]
    total, weights = 0.0, 0.0
    for i, (_, action) in enumerate(said):
        weight = math.exp(-exp_weight * i)
        total, weights = total + weight * action, weights + weight
    return total / weights


@settings(max_examples=30, deadline=None)
@given(
    horizon=st.integers(1, 6),
    steps=st.integers(1, 12),
    exp_weight=st.sampled_from([0.0, 0.01, 0.5, 3.0]),
    favours=st.sampled_from(["oldest", "newest"]),
)
def test_an_ensemble_is_what_the_papers_say(horizon, steps, exp_weight, favours):
    source = Counting(horizon)
    actions = run(TemporalEnsemble(source, exp_weight, space=PLAIN, favours=favours), steps)
    assert source.looks == list(range(steps))
    for step in range(steps):
        expected = oracle_ensemble(source.chunks[: step + 1], step, exp_weight, favours)
        np.testing.assert_allclose(actions[step], expected, rtol=1e-12, atol=1e-14)


def test_weights_favour_the_end_they_say():
    np.testing.assert_allclose(ensemble_weights(3, 0.01), np.exp([0, -0.01, -0.02]) / np.exp([0, -0.01, -0.02]).sum())
    np.testing.assert_array_equal(ensemble_weights(5, 0.3)[::-1], ensemble_weights(5, 0.3, "newest"))
    assert ensemble_weights(5, 0.3).argmax() == 0
    assert ensemble_weights(4, 0.0).tolist() == [0.25] * 4
    # The other convention with a negative number, as some executors take it.
    negative = np.exp(0.3 * np.arange(5))
    np.testing.assert_allclose(ensemble_weights(5, 0.3, "newest"), negative / negative.sum())


def constant_chunks(*values):
    chunks = [np.array([value] * 4, dtype=float) for value in values]
    return lambda obs: chunks[obs["step"]]


@pytest.mark.parametrize(("third", "exp_weight", "state"), [(0, 0.0, 0), (1, 0.0, 1), (1, 2.0, 0)])
def test_a_binary_gripper_is_voted_on_and_never_halfway(third, exp_weight, state):
    source = constant_chunks([1, 0, 0], [0, 0, 1], [0, 0, third])
    actions = run(TemporalEnsemble(source, exp_weight, space=DELTA), 3)
    assert actions[:, 2].tolist() == [0, float(exp_weight == 0), state]  # a tie of two is open
    np.testing.assert_allclose(actions[2, 0], ensemble_weights(3, exp_weight)[0])


def test_commands_of_a_relative_gripper_are_voted_on():
    space = ActionSpace(("x", "g"), delta=(True, None), gripper=Gripper("g", open=1, closed=-1, relative=True))
    actions = run(TemporalEnsemble(constant_chunks([0, 1], [0, -1], [0, -1], [0, 0.01]), space=space), 4)
    assert actions[:, 1].tolist() == [1, -1, -1, -1]
    actions = run(TemporalEnsemble(constant_chunks([0, 1], [0, 0], [0, 1]), space=space), 3)
    assert actions[:, 1].tolist() == [1, 0, 1]  # a tie with "keep" keeps


@pytest.mark.parametrize("form", ["euler_xyz", "quat_xyzw", "rot6d", "axis_angle"])
def test_absolute_rotations_are_averaged_as_rotations(form):
    names = tuple(f"r{i}" for i in range(size_of(form)))
    space = ActionSpace(names, delta=False, pose=PoseDims(rotation=names, form=form))
    angles = np.deg2rad([[175.0], [-175.0], [178.0]])  # the mean of the numbers would be on the other side
    values = from_matrix(Rotation.from_euler("z", angles).as_matrix(), form)
    action = run(TemporalEnsemble(constant_chunks(*values), space=space), 3)[-1]
    mean = Rotation.from_euler("z", angles).mean().as_matrix()
    np.testing.assert_allclose(to_matrix(action, form), mean, atol=1e-12)


def test_rotations_all_around_are_averaged_to_a_rotation():
    space = ActionSpace(("a", "b", "c"), delta=False, pose=PoseDims(rotation=("a", "b", "c"), form="axis_angle"))
    policy = TemporalEnsemble(constant_chunks(*(np.pi * np.eye(3))), 0.3, space=space)
    # The nearest matrix to their mean is a reflection, the nearest rotation the one of most weight.
    np.testing.assert_allclose(np.abs(run(policy, 3)[-1]), [np.pi, 0, 0], atol=1e-6)


def test_an_ensemble_refuses_what_it_cannot_average():
    names = ("a", "b", "c")
    unsaid = ActionSpace(names, delta=False, pose=PoseDims(rotation=names))
    with pytest.raises(ExecutionError, match="how the rotation"):
        TemporalEnsemble(Counting(), space=unsaid)
    with pytest.raises(ExecutionError, match="at_anchor"):
        TemporalEnsemble(Counting(), space=ActionSpace(("x", "y"), delta=True, anchor="chunk"))
    chunks = iter([np.zeros((4, 2)), np.zeros((5, 2))])
    policy = TemporalEnsemble(lambda obs: next(chunks), space=PLAIN)
    policy({})
    with pytest.raises(ExecutionError, match=r"shape \(5, 2\) after"):
        policy({})
    retimed = RetimedChunk(np.zeros((2, 2)), np.array([0, 0]))
    with pytest.raises(ExecutionError, match="retimed"):
        TemporalEnsemble(lambda obs: retimed, space=PLAIN)({})


def test_an_ensemble_forgets_at_reset():
    source = Counting(4)
    policy = TemporalEnsemble(source, space=PLAIN)
    run(policy, 3)
    policy.reset()
    np.testing.assert_array_equal(policy({"step": 0}), source.chunks[3][0])


def test_retiming_goes_as_far_on_the_same_path_and_counts_decoded_steps():
    rng = np.random.default_rng(0)
    chunks = [np.concatenate([rng.normal(size=(8, 2)) * 0.03, rng.integers(0, 2, (8, 1))], 1) for _ in range(3)]
    looks = []

    def predict(obs):
        looks.append(obs["step"])
        return chunks[len(looks) - 1]

    policy = Retime(predict, [Speed(("x", "y"), 0.02)], space=DELTA, execute_steps=4)
    actions = []
    while len(looks) < 3:
        actions.append(policy({"step": len(actions)}))
    done = np.array(actions[:-1])
    assert (np.hypot(done[:, 0], done[:, 1]) <= 0.02).all()
    meant = np.concatenate([chunk[:4] for chunk in chunks[:2]])
    assert looks == [0, sum(np.ceil(np.hypot(*c[:2]) / 0.02) for c in chunks[0][:4]), len(done)]
    np.testing.assert_allclose(done[:, :2].sum(0), meant[:, :2].sum(0), atol=1e-12)
    # Every decoded place is passed through.
    path, places = np.cumsum(done[:, :2], 0), np.cumsum(meant[:, :2], 0)
    assert np.abs(path[:, None] - places).max(-1).min(0).max() < 1e-12
    assert policy.decoded_steps == 24
    assert policy.actions_made > 24


def test_retiming_knows_its_last_action_and_the_observation():
    space = ActionSpace(("x", "y"), ("m", "m"), False)
    chunk = np.array([[0.10, 0.0], [0.12, 0.0]])
    policy = Retime(
        lambda obs: chunk + obs["step"],
        lambda obs: [Rate("x", 0.05), Range("x", high=obs["wall"])],
        space=space,
        execute_steps=1,
        context=lambda obs: Context(last_action=[0.08, 0.0]) if not policy.executed else None,
    )
    assert policy({"step": 0, "wall": 1.0})[0] == pytest.approx(0.1)
    assert policy({"step": 1, "wall": 1.0})[0] == pytest.approx(0.15)  # 0.05 from its own last action
    assert policy({"step": 0, "wall": 0.12})[0] <= 0.12


def test_steps_that_cannot_be_split_are_projected_and_said(caplog):
    policy = Retime(
        lambda obs: np.array([[1.0, 0.0, 0.0]]), [Speed(("x", "y"), 0.01)], space=DELTA, execute_steps=1, max_parts=4
    )
    assert policy({})[0] == pytest.approx(0.01, rel=1e-4)
    assert policy.stuck_steps == 1
    assert "cannot be split small enough" in caplog.text


def test_retiming_refuses_a_retimed_chunk():
    inner = Retime(lambda obs: np.zeros((2, 3)), space=DELTA)
    with pytest.raises(ExecutionError, match="retimed"):
        Retime(inner, space=DELTA)({})
    assert len(RecedingHorizon(inner)({})) == 3


def oracle_weights(n_all, d, s):
    """Equation 5 of arXiv:2506.07339, step by step."""
    weights = []
    for i in range(n_all):
        c = (n_all - s - i) / (n_all - s - d + 1)
        weights.append(1.0 if i < d else c * (math.exp(c) - 1) / (math.e - 1) if i < n_all - s else 0.0)
    return weights


@pytest.mark.parametrize(("horizon", "d", "s"), [(16, 2, 4), (8, 0, 1), (8, 4, 4), (50, 5, 25), (3, 1, 1)])
def test_weights_of_the_overlap_are_those_of_the_paper(horizon, d, s):
    weights = overlap_weights(horizon - s, d)
    expected = oracle_weights(horizon, d, s)
    np.testing.assert_allclose(weights, expected[: horizon - s], rtol=1e-14)
    assert not any(expected[horizon - s :])
    assert (np.diff(weights) <= 0).all()


def test_real_time_chunking_freezes_what_is_carried_out_meanwhile():
    source = Counting(horizon=8)
    policy = RealTimeChunking(source, execute_steps=3, delay_steps=2)
    actions = run(policy, 9)
    assert source.looks == [0, 3, 6]
    assert source.prefixes[0] is None
    first, second = source.prefixes[1:]
    np.testing.assert_array_equal(first.actions, source.chunks[0][3:])
    np.testing.assert_allclose(first.weights, overlap_weights(5, 2))
    # Steps 3 and 4 are the old chunk's; step 5 is the new one's; and so on.
    np.testing.assert_array_equal(actions[3:5], source.chunks[0][3:5])
    np.testing.assert_array_equal(actions[5], source.chunks[1][2])
    np.testing.assert_array_equal(actions[6:8], source.chunks[1][3:5])
    np.testing.assert_array_equal(second.actions[:2], actions[6:8])
    policy.reset()
    policy({"step": 0})
    assert source.prefixes[-1] is None


def test_real_time_chunking_keeps_two_ways_apart():
    """A chunk that goes left or right at random, drawn towards the overlap: without it the robot goes back and forth."""

    def seams(make):
        rng, heights = np.random.default_rng(0), []

        def predict(obs, prefix=None):
            modes = np.array([np.full((8, 1), 1.0), np.full((8, 1), -1.0)])
            if prefix is None:
                return modes[rng.integers(2)]
            n = len(prefix.actions)
            cost = (prefix.weights[:, None] * (modes[:, :n] - prefix.actions) ** 2).sum((1, 2))
            return modes[cost.argmin()]

        policy = make(predict)
        heights = [policy({})[0] for _ in range(180)]
        return int((np.diff(heights) != 0).sum())

    assert seams(lambda predict: RecedingHorizon(predict, 3)) >= 15
    assert seams(lambda predict: RealTimeChunking(predict, 3, delay_steps=1)) == 0


def test_an_overlap_becomes_constraints_with_its_weights():
    overlap = Overlap.of(np.arange(8.0).reshape(4, 2), 1)
    prefix, *pulls = overlap.constraints(sigma=[0.1, 0.2])
    assert isinstance(prefix, Prefix)
    assert np.shape(prefix.actions) == (1, 2)
    assert all(isinstance(pull, Target) for pull in pulls)
    assert [(pull.steps, pull.dim, pull.value, pull.sigma) for pull in pulls[:2]] == [(1, 0, 2, 0.1), (1, 1, 3, 0.2)]
    np.testing.assert_allclose([pull.weight for pull in pulls[::2]], overlap.weights[1:])
    assert len(overlap.constraints()) == 1
    assert Overlap.of(np.zeros((2, 2)), 0).constraints() == []


def test_a_policy_of_tokens_continues_its_last_chunk():
    vla = sharpen(tiny_llava(horizon=6))
    half_bins = np.array([np.diff(np.unique(row)).max() / 2 for row in vla.action_config.token_values()])

    def predict(obs, prefix=None):
        inputs = vla.prepare(picture(obs["step"]), "move to the red block")
        free, chunk = (
            vla.predict_action(**inputs, constraints=limits, mode="mask")[0]
            for limits in ([], [] if prefix is None else prefix.constraints(sigma=1e-3))
        )
        if prefix is not None:
            n = len(prefix.actions)
            away, far = (np.abs(c[:n] - prefix.actions)[:, :6] / half_bins[:6] for c in (chunk, free))
            assert (away[: prefix.frozen] <= 1 + 1e-9).all()
            assert far[: prefix.frozen].max() > 1
            assert (prefix.weights @ away).sum() < (prefix.weights @ far).sum() / 2
        return chunk

    policy = RealTimeChunking(predict, 2, delay_steps=1)
    actions = run(policy, 5)
    assert actions.shape == (5, 7)


NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
POSE = PoseDims(NAMES[:3], NAMES[3:6], form="euler_xyz", turns="compose")
UNITS = ("m",) * 3 + ("rad",) * 3 + (None,)
RELATIVE = ActionSpace(
    NAMES, UNITS, (True,) * 6 + (False,), "base", gripper=Gripper("gripper"), pose=POSE, anchor="chunk"
)
ABSOLUTE = ActionSpace(NAMES, UNITS, False, "base", gripper=Gripper("gripper"), pose=POSE)


def test_chunks_relative_to_their_anchor_are_decoded_against_the_state_that_made_them():
    rng = np.random.default_rng(1)
    chunk = rng.normal(size=(4, 7)) * 0.1
    chunk[:, 6] = 1
    states = rng.normal(size=(5, 6)) * 0.3
    source = at_anchor(lambda obs: chunk, RELATIVE, ABSOLUTE, lambda obs: obs["pose"])
    policy = RecedingHorizon(source, 2)
    actions = np.array([policy({"pose": state}) for state in states])
    for step, anchor in enumerate((0, 0, 2, 2, 4)):
        np.testing.assert_allclose(actions[step, :3], states[anchor, :3] + chunk[step - anchor, :3])
        turned = Rotation.from_euler("xyz", chunk[step - anchor, 3:6]) * Rotation.from_euler("xyz", states[anchor, 3:])
        np.testing.assert_allclose(
            Rotation.from_euler("xyz", actions[step, 3:6]).as_matrix(), turned.as_matrix(), atol=1e-12
        )


def test_what_is_left_of_a_chunk_is_seen_from_the_new_state():
    rng = np.random.default_rng(2)
    seen = []

    def predict(obs, prefix=None):
        seen.append(prefix)
        chunk = rng.normal(size=(6, 7)) * 0.1
        chunk[:, 6] = 1
        return chunk

    policy = RealTimeChunking(
        at_anchor(predict, RELATIVE, ABSOLUTE, lambda obs: obs["pose"]), execute_steps=2, delay_steps=1
    )
    states = rng.normal(size=(4, 6)) * 0.3
    actions = np.array([policy({"pose": state}) for state in states])
    back = RELATIVE.convert(seen[1].actions, ABSOLUTE, states[2])
    np.testing.assert_allclose(back[:1], actions[2:3], atol=1e-12)  # the frozen one is what was carried out
    np.testing.assert_allclose(seen[1].weights, overlap_weights(4, 1))


def test_spaces_without_a_way_between_them_are_refused_before_anything_is_predicted():
    with pytest.raises(ActionSpaceError):
        at_anchor(lambda obs: 1 / 0, RELATIVE, ActionSpace(("q1", "q2"), delta=False), lambda obs: None)


def test_retiming_keeps_what_speaks_of_the_whole_chunk_too():
    policy = Retime(
        lambda obs: np.tile([0.05, 0.0, 1.0], (4, 1)),
        [Speed(("x", "y"), 0.02), Workspace("x", -1.0, 0.1)],
        space=DELTA,
        context=Context(pose={"x": 0.0}),
    )
    actions = run(policy, 8)
    assert np.cumsum(actions[:, 0]).max() <= 0.1


def test_every_executor_takes_a_policy_of_a_model_and_tells_it_what_was_done():
    vla = sharpen(tiny_llava(horizon=4))
    space = vla.action_config.space(vla.action_config.resolve(None))
    told = Context(last_action=[0.0] * 6 + [1])

    def policy():
        runner = vla.policy(constraints=[Rate("x", 0.001)], context=lambda obs: None if runner.executed else told)
        return runner

    def obs(step):
        return {"images": picture(step), "instruction": "move to the red block"}

    clock = SimulatedClock()
    for executor in (
        TemporalEnsemble(policy(), 0.01, space=space),
        RecedingHorizon(policy(), 2),
        AsyncPolicy(policy(), space=space, clock=clock, worker=SimulatedWorker(clock, 0.2)),
    ):
        source, begins = executor.predict_chunk, []

        def looking(obs, source=source, executor=executor, begins=begins):
            last = executor.executed[-1][0] if executor.executed else 0.0
            chunk = source(obs)
            begins.append(abs(chunk[0, 0] - last))
            return chunk

        executor.predict_chunk = looking
        for step in range(4):
            assert executor(obs(step)).shape == (7,)
            clock.advance(0.2)
        assert len(begins) >= 2
        assert max(begins) <= 0.001


@pytest.mark.parametrize("mode", ["project", "transport"])
def test_tokens_go_on_from_the_chunk_under_way(mode):
    vla = sharpen(tiny_llava(horizon=6))
    obs = {"images": picture(0), "instruction": INSTRUCTIONS[0]}
    plain = vla.policy(mode=mode, execute_steps=2)
    first = plain.predict_chunk(obs)
    alone = plain.predict_chunk({**obs, "images": picture(3)})
    going_on = plain.predict_chunk({**obs, "images": picture(3)}, prefix=Overlap.of(first[2:], 2))
    np.testing.assert_allclose(going_on[:2], first[2:4], atol=1e-9)
    assert np.abs(alone[:2] - first[2:4]).max() > 1e-6
    robot = RealTimeChunking(vla.policy(mode=mode), execute_steps=2, delay_steps=2)
    sent = [robot(obs) for _ in range(6)]
    np.testing.assert_allclose(sent[2:4], first[2:4], atol=1e-9)
