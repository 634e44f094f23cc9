"""Inference beside execution: what is sent belongs to its time, whatever the latencies; simulated clocks, no sleeping."""

import itertools
import math
import threading
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_vla_actions import ActionSpace, Gripper, PoseDims
from hf_vla_actions.constraints import Speed
from hf_vla_actions.errors import ExecutionError
from hf_vla_actions.runtime import (
    AsyncPolicy,
    RealTimeChunking,
    RecedingHorizon,
    Retime,
    SimulatedClock,
    SimulatedWorker,
    TemporalEnsemble,
    ThreadWorker,
    at_anchor,
    overlap_weights,
)

PERIOD = 0.125  # exact in binary, as all times below
SPACE = ActionSpace(("look", "step"), ("m", "m"), True, rate_hz=1 / PERIOD)
DRIVE = ActionSpace(("x", "g"), ("m", None), (True, False), gripper=Gripper("g"), rate_hz=8.0)


class Looks:
    """A source whose actions say which look (from 1 on) and which step they are; a function says how long it takes."""

    def __init__(self, clock, latencies, horizon=8):
        self.clock, self.horizon, self.waits = clock, horizon, itertools.cycle(latencies)
        self.began, self.ready, self.stamps, self.prefixes = [], [], [], []

    def __call__(self, obs, prefix=None):
        self.began.append(self.clock())
        self.stamps.append(obs["time"])
        self.prefixes.append(prefix)
        return np.array([[len(self.began), step] for step in range(self.horizon)], dtype=float)

    def latency(self):
        wait = next(self.waits)
        self.ready.append(self.clock() + wait)
        return wait


def make(latencies, horizon=8, wrap=lambda source: source, space=SPACE, **options):
    clock = SimulatedClock(100.0)
    source = Looks(clock, latencies, horizon)
    worker = SimulatedWorker(clock, source.latency)
    options = {"timestamp": lambda obs: obs["time"], **options}
    return clock, source, AsyncPolicy(wrap(source), space=space, clock=clock, worker=worker, **options)


def run(policy, clock, periods):
    """Actions of calls with so many periods after each."""
    actions = []
    for wait in periods:
        actions.append(policy({"time": clock()}))
        clock.advance(wait * PERIOD)
    return np.array(actions)


quarters = st.integers(0, 32).map(lambda n: n * PERIOD / 4)
EPISODE = st.tuples(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=25))


@settings(max_examples=150, deadline=None)
@given(
    latencies=st.lists(quarters, min_size=1, max_size=12),
    episodes=st.lists(EPISODE, min_size=1, max_size=3),
    horizon=st.integers(1, 14),
    execute_steps=st.integers(1, 4),
    max_in_flight=st.integers(1, 3),
)
def test_every_action_is_that_of_the_newest_chunk_there_is_at_its_time(
    latencies, episodes, horizon, execute_steps, max_in_flight
):
    """Against an oracle that only knows the times: looks may take any time and arrive in any order, calls may be left
    out, observations may be old."""
    clock, source, policy = make(latencies, horizon, execute_steps=execute_steps, max_in_flight=max_in_flight)
    late = 0
    for (calls,) in episodes:
        policy.reset()
        first, start, stamp = len(source.began), None, -math.inf
        for wait, age in calls:
            stamp = max(stamp, clock() - age * PERIOD)
            if start is None:
                stamp = clock()
            action = policy({"time": stamp})
            now = clock()
            if start is None:
                start = source.ready[first]
                assert now == start  # it waited for the first chunk, and that one begins now
            arrived = [
                # The tick nearest to the observation; the first chunk begins when it arrives.
                (0 if look == first else math.floor((source.stamps[look] - start) / PERIOD + 0.5), ready, look)
                for look, ready in enumerate(source.ready)
                if look >= first and ready <= now
            ]
            # Those that began at this very call come next time, unless it is the first one.
            arrived = [one for one in arrived if one[2] == first or source.began[one[2]] < now]
            anchor, _, look = max(arrived, key=lambda one: one[2])
            step = round((now - start) / PERIOD) - anchor
            if step < horizon:
                np.testing.assert_array_equal(action, [look + 1, step])
            else:
                np.testing.assert_array_equal(action, [0, 0])
                late += 1
            clock.advance(wait * PERIOD)
    assert policy.report.late_steps == late
    assert policy.report.inferences == len(source.began)


@settings(max_examples=150, deadline=None)
@example([0.375, 0.0], [0.03125, 0.25, 0.21875, 0.0625, 0.25, 0.125, 0.25], 4, 2, 2)  # two looks of one tick
@given(
    latencies=st.lists(st.floats(0, 1.0), min_size=1, max_size=12),
    waits=st.lists(st.floats(0.02, 0.3), min_size=1, max_size=40),
    horizon=st.integers(2, 14),
    max_in_flight=st.integers(1, 3),
    reset_at=st.integers(0, 40),
)
def test_nothing_is_sent_twice_out_of_order_or_stale(latencies, waits, horizon, max_in_flight, reset_at):
    clock, source, policy = make(latencies, horizon, max_in_flight=max_in_flight)
    sent, start, first = [], {}, 0
    for call, wait in enumerate(waits):
        if call == reset_at:
            policy.reset()
            sent, start, first = [], {}, len(source.began)
        look, step = (int(number) for number in policy({"time": clock()}))
        now = clock()
        if not start:
            start[first + 1] = now
        if look:
            assert look > first  # reset forgets
            assert source.ready[look - 1] <= now
            assert not sent or (look, step) > sent[-1]  # once, and in order: looks are numbered by their time
            sent.append((look, step))
            due = start.get(look, source.stamps[look - 1]) + step * PERIOD
            assert abs(now - due) <= 1.5 * PERIOD + 1e-6
        clock.advance(wait)


def test_on_a_steady_loop_steps_are_at_their_time_and_skipped_ones_are_counted():
    clock, _, policy = make([2.5 * PERIOD], horizon=8)
    actions = run(policy, clock, [1] * 10)
    # The first look is waited for. The second begins at tick 1 and is there at tick 4, where its step 3 is due.
    expected = [[1, 0], [1, 1], [1, 2], [1, 3], [2, 3], [2, 4], [2, 5], [3, 3], [3, 4], [3, 5]]
    np.testing.assert_array_equal(actions, expected)
    report = policy.report
    assert (report.inferences, report.actions, report.late_steps) == (4, 10, 0)
    assert report.skipped_steps == 3 + 3
    assert report.waited == report.latency(0.5) == report.latency(1.0) == 2.5 * PERIOD
    assert "10 actions, 0 of them late, 4 inferences; latency 312 / 312 / 312 ms" in str(report)
    assert "skipped steps 6" in str(report)


def test_looks_begin_no_sooner_than_they_should():
    clock, source, policy = make([PERIOD / 2], horizon=16, wrap=lambda source: RecedingHorizon(source, 4))
    run(policy, clock, [1] * 11)
    begins = np.diff(source.began[1:]) / PERIOD
    assert begins.tolist() == [4.0]
    assert source.began[1] == source.ready[0] + 4 * PERIOD


def test_a_stalled_loop_finds_itself_later_in_the_plan():
    clock, _, policy = make([0.0, 60.0], horizon=8)
    actions = run(policy, clock, [1, 3, 2, 1, 1, 1])
    assert actions[:, 1].tolist() == [0, 1, 4, 6, 7, 0]
    assert actions[:, 0].tolist() == [1, 1, 1, 1, 1, 0]
    assert policy.report.missed_ticks == 3
    assert policy.report.late_steps == 1


def test_chunks_that_come_too_late_are_dropped_and_counted():
    clock, source, policy = make([0.0, 10 * PERIOD, PERIOD / 2], horizon=4, max_in_flight=2)
    actions = run(policy, clock, [1] * 14)
    assert source.ready[1] - source.ready[0] == 11 * PERIOD
    assert actions[4, 0] > 2
    assert 2 not in actions[:, 0]
    report = policy.report
    assert report.dropped_stale == 1
    clock, source, policy = make([0.0, 10 * PERIOD, 99.0], horizon=4)
    assert run(policy, clock, [1] * 13)[4:, 0].tolist() == [0] * 9
    assert policy.report.dropped_passed == 1
    assert policy.report.late_steps == 9


def test_what_is_under_way_at_a_reset_never_arrives():
    clock, _, policy = make([0.0, 5 * PERIOD, 0.0, 0.0], horizon=20)
    run(policy, clock, [1, 1])
    policy.reset()
    assert not policy.executed
    actions = run(policy, clock, [1] * 8)
    assert 2 not in actions[:, 0]
    assert policy.report.discarded == 1
    assert actions[0].tolist() == [3, 0]


def drive(on_late, chunk, space=DRIVE, calls=8, **options):
    clock = SimulatedClock()
    worker = SimulatedWorker(clock, iter([0.0, *[99.0] * calls]).__next__)
    policy = AsyncPolicy(lambda obs: chunk, space=space, clock=clock, worker=worker, on_late=on_late, **options)
    actions = run(policy, clock, [1] * calls)
    assert policy.report.late_steps == calls - len(chunk)
    return actions


CHUNK = np.array([[0.02, 1.0], [0.04, 0.0]])


@pytest.mark.parametrize(
    ("on_late", "x"),
    [
        ("hold", [0.02, 0.04, 0, 0, 0, 0, 0, 0]),
        ("brake", [0.02, 0.04, 0.03, 0.02, 0.01, 0, 0, 0]),
        ("last", [0.02, 0.04, 0.04, 0.04, 0.04, 0.04, 0.04, 0.04]),
    ],
)
def test_late_changes(on_late, x):
    actions = drive(on_late, CHUNK, brake_steps=3)
    np.testing.assert_allclose(actions[:, 0], x, atol=1e-15)
    assert actions[:, 1].tolist() == [1] + [0] * 7  # the gripper keeps its state


@pytest.mark.parametrize(
    ("on_late", "x"),
    [
        ("hold", [0.5, 0.54, 0.54, 0.54, 0.54, 0.54, 0.54, 0.54]),
        ("brake", [0.5, 0.54, 0.57, 0.59, 0.60, 0.60, 0.60, 0.60]),
        ("last", [0.5, 0.54, 0.54, 0.54, 0.54, 0.54, 0.54, 0.54]),
    ],
)
def test_late_targets(on_late, x):
    turn = ("roll", "pitch", "yaw")
    pose = PoseDims(rotation=turn, form="euler_xyz")
    space = ActionSpace(("x", *turn), ("m", *["rad"] * 3), False, pose=pose)
    chunk = np.array([[0.5, 0.0, 0.0, 3.1], [0.54, 0.0, 0.0, -3.1]])
    actions = drive(on_late, chunk, space, rate_hz=8, brake_steps=3)
    np.testing.assert_allclose(actions[:, 0], x)
    assert actions[:, 3].tolist() == [3.1] + [-3.1] * 7  # no turn around the circle


def test_a_relative_gripper_that_is_late_is_told_nothing():
    gripper = Gripper("g", open=-1, closed=1, relative=True)
    space = ActionSpace(("x", "g"), ("m", None), (True, None), gripper=gripper)
    for on_late, command in (("hold", 0), ("brake", 0), ("last", 1)):
        assert drive(on_late, CHUNK[::-1], space, rate_hz=8)[2:, 1].tolist() == [command] * 6


def test_braking_with_a_single_action_before():
    space = ActionSpace(("x", "y"), ("m", "m"), (True, False))
    actions = drive("brake", np.array([[0.04, 0.7]]), space, rate_hz=8, brake_steps=3)
    np.testing.assert_allclose(actions[:, 0], [0.04, 0.03, 0.02, 0.01, 0, 0, 0, 0])
    assert (actions[:, 1] == 0.7).all()


def test_a_call_that_comes_too_early_is_told_to_hold(caplog):
    clock, _, policy = make([0.0, 99.0], horizon=8)
    actions = run(policy, clock, [1, 0.25, 0.25, 0.25, 0.25, 1])
    assert actions[:, 1].tolist() == [0, 1, 0, 2, 0, 0]  # the last is at 2.0, and step 2 went out half a period before
    assert policy.report.early_calls == 3
    assert policy.report.late_steps == 0
    assert caplog.text.count("again within half a control period") == 1


@pytest.mark.parametrize("pace", [0.55, 0.75, 0.97, 1.0, 1.03, 1.6])
def test_a_loop_at_another_pace_neither_runs_ahead_nor_falls_behind(pace):
    clock, _, policy = make([0.0, 1e9], horizon=400)
    actions, times = run(policy, clock, [pace] * 200), np.arange(200) * pace
    due = actions[:, 0] == 1
    assert np.abs(times - actions[:, 1])[due].max() <= 1
    assert policy.report.early_calls == (~due).sum() == pytest.approx(200 * max(1 - pace, 0), abs=2)
    assert policy.report.missed_ticks == pytest.approx(200 * max(pace - 1, 0), abs=2)


def test_a_loop_that_trembles_at_the_edge_between_two_ticks_loses_one_at_most():
    clock, _, policy = make([0.0, 1e9], horizon=100)
    actions = run(policy, clock, [1.45, *[1.1, 0.9] * 20])  # 1.45, 2.55, 3.45, 4.55, ...
    assert actions[:, 1].tolist() == [0, 1, *range(3, 42)]
    assert policy.report.early_calls == 0
    assert policy.report.missed_ticks == 1


def test_real_time_chunking_freezes_as_long_as_inference_took():
    latencies = [0.0, 2 * PERIOD, 3.5 * PERIOD, PERIOD, PERIOD]
    clock, source, policy = make(
        latencies, 16, lambda source: RealTimeChunking(source, execute_steps=5, delay_steps=2), execute_steps=5
    )
    actions = run(policy, clock, [1] * 24)
    prefixes = source.prefixes
    assert prefixes[0] is None
    assert [prefix.frozen for prefix in prefixes[1:]] == [2, 2, 4, 4]
    assert [len(prefix.actions) for prefix in prefixes[1:]] == [11] * 4
    np.testing.assert_allclose(prefixes[1].weights, overlap_weights(11, 2))
    for look, tick in enumerate((5, 10, 15, 20), 1):
        n = prefixes[look].frozen
        np.testing.assert_array_equal(prefixes[look].actions[:n], actions[tick : tick + n])
    assert policy.report.overran == 1  # the third took four steps, and two were expected
    assert actions[14].tolist() == [3, 4]
    assert actions[16].tolist() == [3, 6]  # the fourth look was there at 16, but four steps were promised
    assert actions[19].tolist() == [4, 4]


@settings(max_examples=100, deadline=None)
@given(
    latencies=st.lists(st.integers(0, 40).map(lambda n: n * PERIOD / 4), min_size=1, max_size=8),
    calls=st.lists(st.tuples(st.sampled_from([1, 1, 1, 2]), st.integers(0, 2)), min_size=1, max_size=40),
    execute_steps=st.integers(2, 6),
)
def test_what_was_frozen_is_what_was_sent(latencies, calls, execute_steps):
    clock, source, policy = make(latencies, 10, lambda s: RealTimeChunking(s, execute_steps, delay_steps=2))
    sent, stamp = {}, -math.inf
    for wait, age in calls:
        stamp = max(stamp, clock() - age * PERIOD) if sent else clock()
        action = policy({"time": stamp})
        sent[clock()] = action
        clock.advance(wait * PERIOD)
    for stamp, prefix in zip(source.stamps, source.prefixes, strict=True):
        if prefix is not None:
            for step in range(prefix.frozen):
                action = sent.get(stamp + step * PERIOD)
                assert action is None or (action == prefix.actions[step]).all()


def test_relative_chunks_are_decoded_against_the_state_at_their_anchor():
    relative = ActionSpace(("x", "y"), ("m", "m"), True, "base", anchor="chunk", rate_hz=8.0)
    absolute = ActionSpace(("x", "y"), ("m", "m"), False, "base", rate_hz=8.0)
    clock = SimulatedClock()
    chunk = np.cumsum(np.full((6, 2), 0.01), axis=0)
    worker = SimulatedWorker(clock, 1.5 * PERIOD)
    source = at_anchor(lambda obs: chunk, relative, absolute, lambda obs: obs["state"])
    policy = AsyncPolicy(source, space=absolute, clock=clock, worker=worker)
    states = np.random.default_rng(0).normal(size=(6, 2))
    actions = []
    for state in states:
        actions.append(policy({"state": state}))
        clock.advance(PERIOD)
    expected = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (3, 2)]  # tick: anchor and step
    for action, (anchor, step) in zip(actions, expected, strict=True):
        np.testing.assert_allclose(action, states[anchor] + chunk[step])
    with pytest.raises(ExecutionError, match="at_anchor"):
        AsyncPolicy(lambda obs: chunk, space=relative)


def test_what_was_sent_since_an_observation_does_not_come_before_its_chunk():
    clock, told = SimulatedClock(), []

    def source(obs, prefix=None):
        told.append((obs["time"], None if not robot.executed else robot.executed[-1][0], prefix))
        begin = 0.0 if prefix is None else prefix.actions[0]
        return begin + np.tile(np.arange(8.0)[:, None], (1, 2))  # a target that moves a unit a period

    robot = RealTimeChunking(source, 3, delay_steps=3)
    absolute = ActionSpace(("x", "y"), ("m", "m"), False, "base", rate_hz=8.0)
    worker = SimulatedWorker(clock, 0.9 * PERIOD)
    policy = AsyncPolicy(robot, space=absolute, clock=clock, worker=worker, timestamp=lambda obs: obs["time"])
    for _ in range(12):
        policy({"time": max(clock.now - 2 * PERIOD, 0.0)})  # a camera that takes two periods
        clock.advance(PERIOD)
    assert len(told) > 3
    for _, last, prefix in told[1:]:
        assert prefix.actions[0, 0] - last == pytest.approx(1)


def test_a_retimed_chunk_is_carried_out_action_by_action():
    clock = SimulatedClock()
    slow = Retime(lambda obs: CHUNK, [Speed("x", 0.01)], space=DRIVE)
    policy = AsyncPolicy(slow, space=DRIVE, clock=clock, worker=SimulatedWorker(clock, 99.0))
    actions = run(policy, clock, [1] * 7)
    np.testing.assert_allclose(actions[:, 0], [0.01] * 6 + [0])
    assert actions[:, 1].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert policy.report.late_steps == 1


def test_time_only_goes_forward():
    clock, _, policy = make([0.0])
    policy({"time": 100.0})
    clock.now = 99.0
    with pytest.raises(ExecutionError, match=r"clock went backwards, from 100\.0 s to 99\.0 s"):
        policy({"time": 99.0})
    clock, _, policy = make([0.0])
    policy({"time": 99.5})
    clock.advance(PERIOD)
    for stamp in (99.0, 101.0, math.nan):
        with pytest.raises(ExecutionError, match=rf"observation of {stamp} s, after one of 99\.5 s"):
            policy({"time": stamp})
        clock.advance(PERIOD)
    policy({"time": 99.5})  # a camera that has nothing new
    policy.reset()
    clock.now = 0.0
    policy({"time": 0.0})  # an episode has its own time
    with pytest.raises(ExecutionError, match="time goes forward"):
        clock.advance(-1.0)
    with pytest.raises(ExecutionError, match="latency"):
        SimulatedWorker(clock, -1.0).start(lambda: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_late": "stop"}, "on_late is one of"),
        ({"rate_hz": 10.0}, "meant for 8.0 Hz"),
        ({"rate_hz": math.nan}, r"meant for|positive"),
        ({"space": ActionSpace(("x",), delta=True), "rate_hz": 0.0}, "positive number"),
        ({"space": ActionSpace(("x",), delta=True)}, "pass rate_hz"),
        ({"space": ActionSpace.unnamed(2), "rate_hz": 8}, "change or a target"),
        ({"brake_steps": 0}, "brake_steps"),
        ({"execute_steps": 1.5}, "execute_steps"),
        ({"max_in_flight": 0}, "max_in_flight"),
    ],
)
def test_options_that_cannot_be_raise(options, message):
    with pytest.raises(ExecutionError, match=message):
        AsyncPolicy(lambda obs: CHUNK, **{"space": DRIVE, **options})


def test_policies_that_cannot_run_beside_raise():
    with pytest.raises(ExecutionError, match="one look at a time"):
        AsyncPolicy(RealTimeChunking(lambda obs: CHUNK, 1, delay_steps=1), space=DRIVE, max_in_flight=2)
    with pytest.raises(ExecutionError, match="decides single actions"):
        AsyncPolicy(TemporalEnsemble(lambda obs: CHUNK, space=DRIVE), space=DRIVE)
    with pytest.raises(ExecutionError, match="no quantile"):
        AsyncPolicy(lambda obs: CHUNK, space=DRIVE).report.latency()
    with (
        AsyncPolicy(lambda obs: CHUNK[:, :1], space=DRIVE) as policy,
        pytest.raises(ExecutionError, match="horizon, 2"),
    ):
        policy({})


class Gate:
    """A source that waits until it is told to go on, in a thread."""

    def __init__(self):
        self.go, self.begun, self.calls, self.seen = threading.Semaphore(0), threading.Semaphore(0), 0, []
        self.error = None

    def __call__(self, obs):
        self.calls += 1
        number = self.calls
        self.begun.release()
        assert self.go.acquire(timeout=20)
        self.seen.append(None if self.policy is None else list(self.policy.executed))
        if self.error is not None:
            raise self.error
        return np.array([[number, step] for step in range(8)], dtype=float)

    policy = None


def threaded(gate, clock, **options):
    policy = AsyncPolicy(gate, space=SPACE, clock=clock, **options)
    gate.policy = policy
    return policy


def settle(policy):
    """Wait until the thread has nothing to do."""
    policy._worker.wait()


def test_a_thread_predicts_while_actions_are_sent():
    gate, clock = Gate(), SimulatedClock()
    with threaded(gate, clock) as policy:
        gate.go.release()
        actions = []
        for tick in range(6):
            actions.append(policy({}).tolist())
            if tick == 1:
                assert gate.begun.acquire(timeout=20)
            if tick == 3:
                gate.go.release()
                settle(policy)
            clock.advance(PERIOD)
        assert actions == [[1, 0], [1, 1], [1, 2], [1, 3], [2, 3], [2, 4]]
        # The source sees what had been done when its look began, not what was sent while it thought.
        assert [len(seen) for seen in gate.seen] == [0, 1]
        assert len(policy.executed) == 6
        gate.go.release(3)


def test_what_a_thread_raises_is_raised_by_the_next_call():
    gate, clock = Gate(), SimulatedClock()
    with threaded(gate, clock) as policy:
        gate.go.release()
        policy({})
        clock.advance(PERIOD)
        gate.error = RuntimeError("the camera is gone")
        policy({})
        gate.go.release()
        settle(policy)
        clock.advance(PERIOD)
        with pytest.raises(RuntimeError, match="camera is gone"):
            policy({})
        gate.error = None
        clock.advance(PERIOD)
        gate.go.release()
        assert policy({}).tolist() == [1, 3]  # the old chunk goes on, and a new look has begun
        settle(policy)
        clock.advance(PERIOD)
        gate.go.release()
        assert policy({})[0] == 3


def test_a_reset_discards_what_a_thread_is_at_but_not_its_error():
    gate, clock = Gate(), SimulatedClock()
    policy = threaded(gate, clock)
    gate.go.release()
    policy({})
    clock.advance(PERIOD)
    policy({})  # the second look waits at the gate
    assert gate.begun.acquire(timeout=20)
    assert gate.begun.acquire(timeout=20)
    policy.reset()
    gate.go.release(2)
    assert policy({}).tolist() == [3, 0]
    clock.advance(PERIOD)
    gate.error = RuntimeError("out of memory")
    policy({})
    assert gate.begun.acquire(timeout=20)
    assert gate.begun.acquire(timeout=20)
    policy.reset()
    gate.go.release()
    with pytest.raises(RuntimeError, match="out of memory"):
        policy.close()
    policy.close()
    with pytest.raises(ExecutionError, match="closed"):
        policy({})
    assert policy.report.discarded == 2


def test_an_error_at_the_first_call_is_raised_and_the_next_call_tries_again():
    gate, clock = Gate(), SimulatedClock()
    with threaded(gate, clock) as policy:
        gate.error = ValueError("no such checkpoint")
        gate.go.release()
        with pytest.raises(ValueError, match="no such checkpoint"):
            policy({})
        gate.error = None
        gate.go.release()
        clock.advance(PERIOD)
        assert policy({}).tolist() == [2, 0]


def test_leaving_with_an_error_shows_that_error_and_logs_the_other(caplog):
    gate, clock = Gate(), SimulatedClock()

    def leave():
        with threaded(gate, clock) as policy:
            gate.go.release()
            policy({})
            clock.advance(PERIOD)
            gate.error = RuntimeError("the camera is gone")
            policy({})
            assert gate.begun.acquire(timeout=20)
            assert gate.begun.acquire(timeout=20)
            gate.go.release()
            raise KeyError("what the caller did")

    with pytest.raises(KeyError):
        leave()
    assert "the camera is gone" in caplog.text


def test_threads_end_with_the_policy():
    before = threading.active_count()
    for _ in range(3):
        with AsyncPolicy(lambda obs: CHUNK, space=DRIVE) as policy:
            policy({})
    assert threading.active_count() == before


def test_calls_in_threads_come_back_in_the_order_in_which_they_ended():
    clock = SimulatedClock()
    worker = ThreadWorker(clock, threads=2)
    gates = [threading.Event(), threading.Event()]
    for number, gate in enumerate(gates):
        worker.start(lambda number=number, gate=gate: (gate.wait(20), number)[1])
    gates[1].set()
    worker.wait()
    clock.advance(1.0)
    gates[0].set()
    while not worker._jobs[0].done():
        time.sleep(0.001)
    assert [(outcome.value, outcome.seconds) for outcome in worker.finished()] == [(1, 0.0), (0, 1.0)]
    assert worker.under_way == 0
    worker.close()


def test_a_simulation_waits_for_the_first_call_to_end():
    clock, latencies = SimulatedClock(), iter([0.5, 0.2])
    worker = SimulatedWorker(clock, lambda: next(latencies))
    worker.start(lambda: "long")
    worker.start(lambda: "short")
    for now, value in ((0.2, "short"), (0.5, "long")):
        worker.wait()
        assert clock() == now
        assert [outcome.value for outcome in worker.finished()] == [value]


def test_a_real_clock_and_a_real_thread():
    """Half a second at 50 Hz with inference of 30 ms: whatever the machine does meanwhile, steps are at their time."""
    rate, begins = 50.0, []
    space = ActionSpace(("look", "step"), ("m", "m"), True, rate_hz=rate)

    def predict(obs):
        begins.append(obs["time"])
        time.sleep(0.03)
        return np.array([[len(begins), step] for step in range(20)], dtype=float)

    start, sent = None, []
    with AsyncPolicy(predict, space=space, timestamp=lambda obs: obs["time"]) as policy:
        for _ in range(25):
            action = policy({"time": time.monotonic()})
            now = time.monotonic()
            start = start or now
            sent.append((now, *action.astype(int)))
            time.sleep(max(start + len(sent) / rate - time.monotonic(), 0))
        report = policy.report
    good = [(now, look, step) for now, look, step in sent if look]
    assert len(good) == 25 - report.late_steps - report.early_calls
    assert [(look, step) for _, look, step in good] == sorted({(look, step) for _, look, step in good})
    for now, look, step in good:
        due = (start if look == 1 else begins[look - 1]) + step / rate
        assert now - due > -2 / rate
        assert look == 1 or now - begins[look - 1] >= 0.03
    assert 3 <= report.inferences <= 25
    assert report.latency(0.0) >= 0.03
