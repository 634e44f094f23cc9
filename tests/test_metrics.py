"""Metrics against slow oracles that are written from the definitions, number by number."""

import math

import numpy as np
import pytest

from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.metrics import (
    action_metrics,
    chunks_within_bins,
    drift_by_step,
    error_by_step,
    event_scores,
    free_running_gap,
    gripper_accuracy,
    gripper_events,
    gripper_states,
    limit_conflict,
    path_deviation,
    token_accuracy,
    within_bins,
)

MASK = np.array([[True, True], [True, False]])


def test_padding_does_not_count():
    true = np.zeros((2, 2, 2))
    predicted = np.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 0.0], [99.0, 99.0]]])
    found = action_metrics(predicted, true, MASK, ("x", "y"), "l1")
    assert found == {"l1": 2.5, "l1/x": 3.0, "l1/y": 2.0}


def test_token_accuracy_per_dimension():
    true = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    predicted = np.array([[[1, 0], [3, 4]], [[0, 6], [0, 0]]])
    found = token_accuracy(predicted, true, MASK, ("x", "y"))
    assert found["token_accuracy/x"] == pytest.approx(2 / 3)
    assert found["token_accuracy/y"] == pytest.approx(2 / 3)
    assert found["token_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("open_value", "closed_value"), [(1.0, 0.0), (-1.0, 1.0)])
def test_gripper_accuracy_knows_which_side_is_open(open_value, closed_value):
    def at(share):
        return closed_value + np.array(share) * (open_value - closed_value)

    found = gripper_accuracy(
        at([[0.9, 0.2], [0.4, 0.0]]), at([[1.0, 1.0], [0.0, 1.0]]), MASK, open_value, closed_value
    )
    assert found["gripper_accuracy"] == pytest.approx(2 / 3)


def test_arrays_that_do_not_fit_raise():
    with pytest.raises(VLAActionsError, match="shapes"):
        token_accuracy(np.zeros((2, 2, 3)), np.zeros((2, 2, 2)), MASK, ("x", "y"))
    with pytest.raises(VLAActionsError, match="no step is real"):
        token_accuracy(np.zeros((2, 2, 2)), np.zeros((2, 2, 2)), np.zeros((2, 2), bool), ("x", "y"))


N, HORIZON, NAMES = 40, 6, ("x", "y", "gripper")


@pytest.fixture(params=range(3))
def case(request):
    """Predicted and demonstrated actions, codes, gripper states and a mask with ends of episodes in it."""
    rng = np.random.default_rng(request.param)
    mask = np.arange(HORIZON) < rng.integers(1, HORIZON + 1, N)[:, None]
    actions = rng.normal(size=(2, N, HORIZON, 3))
    actions[:, ~mask] = np.nan  # whatever stands behind the end is not looked at
    states = rng.random((2, N, HORIZON)) > 0.5
    before = rng.choice([0.0, 1.0, np.nan], N)
    return actions, rng.integers(0, 12, (2, N, HORIZON, 3)), states, mask, before


def real_steps(mask):
    return [(i, t) for i in range(len(mask)) for t in range(HORIZON) if mask[i, t]]


def test_within_bins_counts_codes_near_the_demonstrated_ones(case):
    _, (predicted, true), _, mask, _ = case
    found = within_bins(predicted, true, mask, NAMES, (1, 4))
    for k in (1, 4):
        for dim, name in enumerate(NAMES):
            near = [abs(int(predicted[i, t, dim]) - int(true[i, t, dim])) <= k for i, t in real_steps(mask)]
            assert found[f"within_{k}_bins/{name}"] == pytest.approx(sum(near) / len(near))
        assert found[f"within_{k}_bins"] == pytest.approx(np.mean([found[f"within_{k}_bins/{n}"] for n in NAMES]))
    assert len(found) == 8
    exact = within_bins(predicted, true, mask, NAMES, (0,))
    assert exact["within_0_bins/y"] == token_accuracy(predicted, true, mask, NAMES)["token_accuracy/y"]


def test_within_bins_of_small_unsigned_codes_does_not_wrap_around():
    low, high = np.zeros((1, 1, 1), np.uint8), np.full((1, 1, 1), 255, np.uint8)
    one = np.ones((1, 1), bool)
    assert within_bins(low, high, one, ("x",))["within_5_bins"] == 0
    assert chunks_within_bins(low, high, one)["chunks_within_1_bins"] == 0


def test_chunk_counts_if_all_of_it_is_near(case):
    _, (predicted, true), _, mask, _ = case
    near = np.clip(predicted, true - 1, true + 1)
    near[::3] = true[::3]
    near[1, 0, 0] = true[1, 0, 0] + 2
    found = chunks_within_bins(near, true, mask)
    for k in (0, 1):
        good = [
            all(abs(near[i, t, d] - true[i, t, d]) <= k for t in range(HORIZON) if mask[i, t] for d in range(3))
            for i in range(N)
        ]
        assert found[f"chunks_within_{k}_bins"] == pytest.approx(sum(good) / N)
    assert 0 < found["chunks_within_0_bins"] < found["chunks_within_1_bins"] < 1


def test_gripper_states_step_by_step(case):
    _, _, (predicted, true), mask, _ = case
    found = gripper_states(predicted, true, mask)
    for name, state in (("open", True), ("closed", False)):
        pairs = [(predicted[i, t] == state, true[i, t] == state) for i, t in real_steps(mask)]
        right = sum(p and d for p, d in pairs)
        precision, recall = right / sum(p for p, _ in pairs), right / sum(d for _, d in pairs)
        assert found[f"gripper_{name}_precision"] == pytest.approx(precision)
        assert found[f"gripper_{name}_recall"] == pytest.approx(recall)
        assert found[f"gripper_{name}_f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def events_of(states, mask, before, i, kind):
    """Steps at which chunk i becomes open (kind True) or closed."""
    steps, previous = [], before[i]
    for t in range(HORIZON):
        if mask[i, t] and states[i, t] == kind and previous == float(not kind):
            steps.append(t)
        previous = float(states[i, t])
    return steps


def most_pairs(one, other, tolerance):
    """The most events that can be matched one to one: tried out."""
    if not one:
        return 0
    best = most_pairs(one[1:], other, tolerance)
    for j, t in enumerate(other):
        if abs(t - one[0]) <= tolerance:
            best = max(best, 1 + most_pairs(one[1:], other[:j] + other[j + 1 :], tolerance))
    return best


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_gripper_events_are_matched_as_well_as_can_be(case, tolerance):
    _, _, (predicted, true), mask, before = case
    found = gripper_events(predicted, true, mask, before, tolerance)
    for name, kind in (("opening", True), ("closing", False)):
        pairs = [[events_of(s, mask, before, i, kind) for s in (predicted, true)] for i in range(N)]
        n_predicted, n_true = (sum(len(pair[which]) for pair in pairs) for which in (0, 1))
        hits = sum(most_pairs(*pair, tolerance) for pair in pairs)
        assert found[f"gripper_{name}_events"] == n_true > 0
        assert found[f"gripper_{name}_predicted"] == n_predicted > 0
        assert found[f"gripper_{name}_precision"] == pytest.approx(hits / n_predicted)
        assert found[f"gripper_{name}_recall"] == pytest.approx(hits / n_true)
        assert found[f"gripper_{name}_f1"] == pytest.approx(2 * hits / (n_predicted + n_true))


def test_matching_of_any_events_loses_no_pair():
    rng = np.random.default_rng(0)
    predicted, true = rng.random((2, 300, 6)) > 0.6
    for tolerance in (1, 3):
        hits = sum(
            most_pairs(list(np.flatnonzero(p)), list(np.flatnonzero(d)), tolerance)
            for p, d in zip(predicted, true, strict=True)
        )
        found = event_scores("e", predicted, true, tolerance)
        assert found["e_recall"] * found["e_events"] == pytest.approx(hits)


def test_chunks_of_one_action_have_events_where_the_state_before_is_known():
    states, mask = np.array([[True], [True], [True]]), np.ones((3, 1), bool)
    before = np.array([0.0, 1.0, np.nan])
    assert gripper_events(states, states, mask, before)["gripper_opening_events"] == 1
    assert gripper_events(states, states, mask)["gripper_opening_events"] == 0


def test_what_cannot_be_counted_is_left_out():
    closed, mask = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    found = gripper_states(closed, closed, mask) | gripper_events(closed, closed, mask)
    assert found["gripper_closed_f1"] == 1
    assert not [name for name in found if "open_" in name or name.endswith(("ing_f1", "ing_recall"))]
    assert all(math.isfinite(value) for value in found.values())
    wrong = gripper_states(~closed, closed, mask)
    assert (wrong["gripper_open_precision"], wrong["gripper_closed_recall"], wrong["gripper_open_f1"]) == (0, 0, 0)
    assert "gripper_open_recall" not in wrong


def test_errors_along_the_chunk(case):
    (predicted, true), _, _, mask, _ = case
    by_step, drift = error_by_step(predicted, true, mask), drift_by_step(predicted, true, mask)
    for t in range(HORIZON):
        rows = [i for i in range(N) if mask[i, t]]
        for d in range(3):
            single = [abs(predicted[i, t, d] - true[i, t, d]) for i in rows]
            summed = [abs(sum(predicted[i, s, d] - true[i, s, d] for s in range(t + 1))) for i in rows]
            assert by_step[t, d] == pytest.approx(np.mean(single))
            assert drift[t, d] == pytest.approx(np.mean(summed))
    assert drift[-1].max() > by_step[-1].max()


def test_steps_that_no_chunk_has_are_unknown():
    mask = np.zeros((3, HORIZON), bool)
    mask[:, :2] = True
    found = error_by_step(np.ones((3, HORIZON, 1)), np.zeros((3, HORIZON, 1)), mask)
    np.testing.assert_array_equal(found[:, 0], [1, 1, *[np.nan] * 4])


@pytest.mark.parametrize("adds_up", [True, False])
def test_path_deviation_is_the_largest_distance(case, adds_up):
    (predicted, true), _, _, mask, _ = case
    found = path_deviation(predicted[..., :2], true[..., :2], mask, adds_up)
    for i in range(N):
        at, worst = np.zeros(2), 0.0
        for t in range(HORIZON):
            if mask[i, t]:
                error = predicted[i, t, :2] - true[i, t, :2]
                at = at + error if adds_up else error
                worst = max(worst, math.hypot(*at))
        assert found[i] == pytest.approx(worst)


def test_gap_is_the_difference_of_two_errors(case):
    (free, true), _, _, mask, _ = case
    forced = 0.7 * true + 0.3 * free
    found = free_running_gap(free, forced, true, mask, NAMES)
    one = np.mean([abs(free[i, t, 1] - true[i, t, 1]) for i, t in real_steps(mask)])
    assert found["gap_l1/y"] == pytest.approx(0.7 * one)
    assert set(found) == {"gap_l1", *(f"gap_l1/{n}" for n in NAMES)}
    assert free_running_gap(forced, free, true, mask, NAMES)["gap_l1"] == pytest.approx(-found["gap_l1"])


def test_conflict_counts_steps_and_chunks(case):
    _, _, _, mask, _ = case
    rng = np.random.default_rng(1)
    excess = np.where(rng.random((N, HORIZON)) > 0.8, rng.random((N, HORIZON)), 1e-12)
    found = limit_conflict(excess, mask)
    over = [excess[i, t] for i, t in real_steps(mask) if excess[i, t] > 1e-9]
    assert found["conflict_steps"] == pytest.approx(len(over) / mask.sum())
    assert found["conflict_mean"] == pytest.approx(np.mean(over))
    assert found["conflict_worst"] == max(over)
    chunks = [any(excess[i, t] > 1e-9 for t in range(HORIZON) if mask[i, t]) for i in range(N)]
    assert found["conflict_chunks"] == pytest.approx(np.mean(chunks))
    kept = limit_conflict(np.zeros((N, HORIZON)), mask)
    assert set(kept.values()) == {0.0}
    with pytest.raises(VLAActionsError, match="at least 0"):
        limit_conflict(excess - 1, mask)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_raise(which, value):
    pair = [np.zeros((2, 3, 2)), np.zeros((2, 3, 2))]
    pair[which][1, 1, 0] = value
    mask = np.ones((2, 3), bool)
    for measure in (error_by_step, drift_by_step, lambda *a: path_deviation(*a, True)):
        with pytest.raises(VLAActionsError, match=f"{('predicted', 'demonstrated')[which]} has 1 NaN"):
            measure(*pair, mask)
    with pytest.raises(VLAActionsError, match="1 NaN"):
        action_metrics(*pair, mask, ("x", "y"), "l1")
    mask[1, 1:] = False
    assert error_by_step(*pair, mask).max() == 0


def test_codes_states_and_tolerances_that_are_none_raise():
    mask = np.ones((2, 3), bool)
    with pytest.raises(VLAActionsError, match="whole numbers"):
        within_bins(np.zeros((2, 3, 1)), np.zeros((2, 3, 1), int), mask, ("x",))
    states = np.zeros((2, 3), bool)
    for before in ([0.5, 1], [1]):
        with pytest.raises(VLAActionsError, match="before is"):
            gripper_events(states, states, mask, np.array(before))
    with pytest.raises(VLAActionsError, match="tolerance"):
        gripper_events(states, states, mask, tolerance=-1)
    with pytest.raises(VLAActionsError, match="shapes"):
        gripper_states(states, states[:, :2], mask)
