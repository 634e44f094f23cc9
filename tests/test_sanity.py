"""What is odd about a dataset's numbers: each oddity is planted, found and named with its place, and only that one."""

import numpy as np
import pytest

from hf_vla_actions import ActionSpace, ActionStats, Gripper
from hf_vla_actions.data import Episode, open_dataset
from hf_vla_actions.data.guesses import guess_kinds, guess_open, is_binary
from hf_vla_actions.data.sanity import check_numbers
from hf_vla_actions.errors import DatasetError, VLAActionsError
from hf_vla_actions.plots import plot_action_histograms

SPACE = ActionSpace(["x", "y", "gripper"], ["m", "m", None], (True, True, False), "base", Gripper("gripper", 1.0, 0.0))
EPISODES = tuple(Episode(10 + i, 30 * i, 30 * (i + 1), "pick") for i in range(8))


@pytest.fixture
def data():
    """Eight clean episodes of deltas, the states that follow from them, and times."""
    rng = np.random.default_rng(0)
    actions = np.column_stack([rng.normal(0, 0.01, (240, 2)), np.ones(240)])
    states = np.zeros((240, 3))
    for e in EPISODES:
        actions[e.start + rng.integers(8, 20) : e.stop, 2] = 0.0
        states[e.start : e.stop, :2] = rng.normal(0, 0.05, 2) + np.cumsum(
            np.vstack([np.zeros((1, 2)), actions[e.start : e.stop - 1, :2]]), axis=0
        )
        states[e.start : e.stop, 2] = actions[e.start : e.stop, 2]
    return {"actions": actions, "states": states, "timestamps": np.tile(np.arange(30) / 5, 8)}


def look(data, space=SPACE, **options):
    facts = {"states": data["states"], "timestamps": data["timestamps"], "rate_hz": 5}
    return check_numbers(data["actions"], EPISODES, space, **{**facts, **options})


def test_clean_data_give_neither_problems_nor_notes(data):
    report = look(data)
    assert (report.problems, report.notes) == ((), ())
    assert [d.kind for d in report.dimensions] == ["delta", "delta", "binary"]
    assert report.measured_hz == pytest.approx(5)
    low, high = np.quantile(data["actions"][:, 0], [0.01, 0.99])
    x = report.dimensions[0]
    assert (x.low, x.high) == (pytest.approx(low), pytest.approx(high))
    assert x.clipped == np.mean((data["actions"][:, 0] < low) | (data["actions"][:, 0] > high))
    assert "nothing that speaks against" in report.text()


def test_every_number_that_is_not_finite_is_named(data):
    data["actions"][31, 1], data["states"][239, 0] = np.nan, np.inf
    actions, states = look(data).problems
    assert actions.startswith("1 actions are NaN or infinite: 'y' = nan in episode 11 step 1.")
    assert states.startswith("1 states are NaN or infinite: dimension 0 = inf in episode 17 step 29.")
    data["actions"][:] = np.nan
    with pytest.raises(DatasetError, match="no row"):
        look(data)


def test_constant_and_two_valued_dimensions_are_notes(data):
    data["actions"][:, 0] = 0.3
    data["actions"][:, 1] = np.where(np.arange(240) % 3 == 0, 7.0, 0.0)
    notes = look(data).notes
    assert any("no token can move them: x" in note for note in notes)
    assert any("two values" in note and "y (0 or 7)" in note for note in notes)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (np.where(np.arange(240) == 100, 1.0, np.random.default_rng(1).normal(0, 0.001, 240)), "half ranges beyond"),
        (np.where(np.arange(240) == 100, 1.0, 0.0), "without width"),
        (100 + np.random.default_rng(1).normal(0, 1e-6, 240), "noise of rounding"),
    ],
)
def test_dimensions_that_would_explode_are_problems(data, column, words):
    data["actions"][:, 1] = column
    problems = look(data).problems
    assert len(problems) == 1
    assert "'y'" in problems[0]
    assert words in problems[0]


def test_statistics_of_other_data_are_a_problem(data):
    other = ActionStats.from_ranges([-0.01, -0.05, 0], [0.01, 0.05, 1], mask=[True, True, False])
    report = look(data, stats=other)
    share = np.mean(np.abs(data["actions"][:, 0]) > 0.01)
    assert report.dimensions[0].clipped == pytest.approx(share)
    assert [problem.split(" lie")[0] for problem in report.problems] == [f"{share:.1%} of 'x'"]
    with pytest.raises(DatasetError, match="2 dimensions"):
        look(data, stats=ActionStats.from_ranges([0, 0], [1, 1]))


def test_deltas_and_targets_are_told_from_the_states(data):
    absolute = ActionSpace(SPACE.names, SPACE.units, (False, True, False), "base", SPACE.gripper)
    (note,) = look(data, absolute).notes
    assert note.startswith("declared absolute")
    assert note.endswith(": x")
    data["actions"][:-1, 0] = data["states"][1:, 0]
    assert look(data, absolute).notes == ()
    assert guess_kinds(data["actions"], data["states"], EPISODES)[:2] == ["absolute", "delta"]
    assert guess_kinds(data["actions"], None, EPISODES)[:2] == ["unknown", "unknown"]


def test_a_gripper_whose_sign_is_the_other_way_round_is_noted(data):
    turned = ActionSpace(SPACE.names, SPACE.units, SPACE.delta, "base", Gripper("gripper", open=0.0, closed=1.0))
    (note,) = look(data, turned).notes
    assert "the other way round" in note
    data["actions"][:, 2] = 1.0
    assert any("always closed" in note for note in look(data, turned).notes)


def test_the_hand_is_guessed_only_where_most_episodes_agree(data):
    gripper = data["actions"][:, 2]
    assert guess_open(gripper, EPISODES) == 1.0
    assert guess_open(-gripper, EPISODES) == -1.0
    for e in EPISODES[:4]:
        gripper[e.start : e.stop] = 1 - gripper[e.start : e.stop]
    assert guess_open(gripper, EPISODES) is None
    assert guess_open(gripper, EPISODES[4:]) is None  # too few of them


def test_rates_and_gaps_come_from_the_timestamps(data):
    (problem,) = look(data, rate_hz=10).problems
    assert "declared 10 Hz" in problem
    data["timestamps"][45:60] += 0.2
    report = look(data)
    assert report.problems == ()
    (note,) = report.notes
    assert "1 steps last 0.4 to 0.4 s instead of 0.2 s, first in episode 11 step 15" in note


def test_idle_frames_first_actions_and_copies_are_noted(data):
    for e in EPISODES:
        data["actions"][e.start, :2] = 0.0
    (note,) = look(data).notes
    assert "--skip_first 1" in note
    data["actions"][5:29, :2] = 0.0
    data["actions"][5:29, 2], data["states"][5:30] = 1.0, data["states"][5]
    data["actions"][210:240], data["states"][210:240] = data["actions"][180:210], data["states"][180:210]
    notes = " ".join(look(data).notes)
    assert "23 frames" in notes
    assert "13% of all actions move nothing" in notes
    assert "1 episodes repeat" in notes


def test_binary_needs_both_ends():
    assert is_binary(np.array([0.0] * 50 + [1.0] * 50))
    assert not is_binary(np.linspace(0, 1, 100))
    assert not is_binary(np.zeros(10))


def test_shapes_that_do_not_fit_raise(data):
    data["actions"] = data["actions"][:, :2]
    with pytest.raises(DatasetError, match=r"n_frames, 3"):
        look(data)


def test_the_figure_shades_what_is_outside(data):
    report = look(data)
    axes = plot_action_histograms(data["actions"], report.dimensions, n_bins=16)
    assert [ax.get_title(loc="left") for ax in axes] == [f"{d.clipped:.1%} outside" for d in report.dimensions]
    assert axes[0].get_xlabel() == "x [m]"
    with pytest.raises(VLAActionsError, match="finite"):
        plot_action_histograms(data["actions"] * np.nan, report.dimensions)


def test_real_data_show_what_is_known_of_them(shared):
    bridge = open_dataset(shared / "data" / "bridge_sample")
    names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    space = ActionSpace(names, delta=(True,) * 6 + (False,), gripper=Gripper("gripper", open=1.0, closed=0.0))
    facts = {"rate_hz": bridge.fps, "states": bridge.states, "timestamps": bridge.timestamps}
    report = check_numbers(bridge.actions, bridge.episodes, space, **facts)
    assert [d.kind for d in report.dimensions] == ["delta"] * 6 + ["binary"]
    assert report.problems == ()
    (note,) = report.notes
    assert "100% of the episodes begin with an action that moves nothing" in note
    told = check_numbers(bridge.actions, bridge.episodes, space, **facts, skip_first=1)
    assert not [text for text in told.notes if "skip_first" in text], "it is left out already"
