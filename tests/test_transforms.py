"""Dataset transforms against slow loops over their definitions, and the reader that sees a dataset through one."""

import logging
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf_vla_actions.actions import ActionSpace, Gripper
from hf_vla_actions.data import ChunkDataset, LeRobotDataset, LeRobotWriter
from hf_vla_actions.data import transforms as rules
from hf_vla_actions.data.transforms_dataset import TransformedDataset
from hf_vla_actions.data.transforms_table import TRANSFORMS, Transform, find_transform
from hf_vla_actions.errors import ActionSpaceError, DatasetError

OPENING = st.lists(st.sampled_from([0.0, 0.04, 0.05, 0.3, 0.5, 0.95, 0.96, 1.0]) | st.floats(0, 1), max_size=12)
COMMANDS = st.lists(st.sampled_from([-1.0, -0.1, -0.11, 0.0, 0.1, 0.11, 1.0]) | st.floats(-1, 1), max_size=12)


def slow_decided(values):
    out = []
    for i in range(len(values)):
        decided = [v > 0.95 for v in values[i:] if v > 0.95 or v < 0.05]
        out.append(float(decided[0]) if decided else values[-1])
    return out


def slow_absolute(values):
    told = [None if -0.1 <= v <= 0.1 else v < 0 for v in values]
    given_ = [t for t in told if t is not None]
    state = not given_[0] if given_ else True
    out = []
    for t in told:
        state = state if t is None else t
        out.append(float(state))
    return out


@settings(max_examples=150, deadline=None)
@given(OPENING)
def test_the_gripper_takes_the_next_decided_value(values):
    assert rules.decided_gripper(np.array(values)).tolist() == slow_decided(values)


def test_the_gripper_s_undecided_end_becomes_its_last_value_as_it_is():
    assert rules.decided_gripper(np.array([1, 0.6, 0.0, 0.7, 0.3, 0.4])).tolist() == [1, 0, 0, 0.4, 0.4, 0.4]
    assert rules.decided_gripper(np.array([0.05, 0.95, 0.951])).tolist() == [1, 1, 1]  # neither is decided


@settings(max_examples=150, deadline=None)
@given(COMMANDS)
def test_commands_become_states(values):
    assert rules.absolute_gripper(np.array(values)).tolist() == slow_absolute(values)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=10), st.booleans())
def test_states_and_commands_are_inverse(states, before):
    values = np.array(states, dtype=float)
    commands = rules.relative_gripper(values, float(before))
    if commands.any() or before:
        assert rules.absolute_gripper(commands).tolist() == values.tolist()
    assert np.abs(commands).sum() == sum(a != b for a, b in zip([before, *states], states, strict=False))


@settings(max_examples=50, deadline=None)
@given(arrays(float, st.tuples(st.integers(2, 6), st.just(6)), elements=st.floats(-4, 4, width=32)))
def test_pairs_of_formulas_are_inverse(poses):
    np.testing.assert_allclose(rules.poses_of(poses[0], rules.motions(poses)), poses, atol=1e-12)
    np.testing.assert_allclose(rules.calvin_metric_back(rules.calvin_metric(poses)), poses, rtol=1e-15)
    np.testing.assert_allclose(rules.calvin_gripper_back(rules.calvin_gripper(poses)), poses, atol=1e-15)
    ends = np.sign(poses - 0.1)
    assert rules.libero_gripper_back(rules.libero_gripper(ends)).tolist() == ends.tolist()


def test_golden_numbers_of_libero_and_calvin():
    assert rules.libero_gripper(np.array([-1, -0.3, 0, 0.25, 1, 1.5])).tolist() == [1, 1, 1, 0.75, 0, 0]
    assert rules.calvin_gripper(np.array([-1, 1])).tolist() == [0, 1]
    row = np.array([[1, -0.5, 0.25, 1, -0.5, 0.2, -1]])
    actions, _, rows = TRANSFORMS["calvin_metric"](row)
    np.testing.assert_allclose(actions, [[0.02, -0.01, 0.005, 0.05, -0.025, 0.01, 0]], rtol=1e-15)
    assert rows.tolist() == [0]
    assert TRANSFORMS["calvin"](row)[0].tolist() == [[*row[0, :6], 0]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bridge_equals_a_slow_loop(data):
    n = data.draw(st.integers(0, 8))
    numbers = arrays(float, (n, 7), elements=st.floats(-1, 1, width=32))
    actions, states = data.draw(numbers), data.draw(numbers)
    actions[:, 6] = np.abs(actions[:, 6])
    before = actions.copy(), states.copy()
    gripper = slow_decided(actions[1:, 6].tolist())
    made, kept, rows = TRANSFORMS["bridge_orig_commanded"](actions, states)
    assert rows.tolist() == list(range(1, n))
    assert made.tolist() == [[*actions[row, :6], gripper[row - 1]] for row in range(1, n)]
    assert kept.tolist() == states[1:].tolist()
    made, kept, rows = TRANSFORMS["bridge_orig"](actions, states)
    assert rows.tolist() == list(range(1, n - 1))
    assert made.tolist() == [[*(states[row + 1, :6] - states[row, :6]), gripper[row - 1]] for row in range(1, n - 1)]
    assert kept.tolist() == [states[row].tolist() for row in range(1, n - 1)]
    assert (actions.tolist(), states.tolist()) == (before[0].tolist(), before[1].tolist())  # pure


def test_relabelling_needs_states_and_does_not_wrap_angles():
    states = np.zeros((4, 7))
    states[:, 5] = [0, 3.1, -3.1, -3.0]
    assert TRANSFORMS["bridge_orig"](np.zeros((4, 7)), states)[0][:, 5].tolist() == pytest.approx([-6.2, 0.1])
    with pytest.raises(DatasetError, match="needs states of at least 6 dimensions, got None"):
        TRANSFORMS["bridge_orig"](np.zeros((4, 7)), None)
    with pytest.raises(DatasetError, match="got 5"):
        TRANSFORMS["bridge_orig"](np.zeros((4, 7)), states[:, :5])
    assert TRANSFORMS["bridge_orig_commanded"](np.zeros((4, 7)), None)[1] is None


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_every_transform_gives_another_space_so_that_it_cannot_be_applied_twice(name):
    transform = TRANSFORMS[name]
    assert transform.source != transform.result
    assert (transform.result.gripper.open, transform.result.gripper.closed) == (1.0, 0.0)
    assert transform.result.rate_hz == transform.source.rate_hz
    assert find_transform(name) is transform


@pytest.mark.parametrize("name", ["libero", "calvin"])
def test_the_gripper_contract_undoes_the_transform(name):
    transform = TRANSFORMS[name]
    raw = np.random.default_rng(0).uniform(-1, 1, (9, 7))
    raw[:, 6] = np.sign(raw[:, 6])
    made = transform(raw)[0]
    opening = transform.result.gripper.to_opening(made[:, 6])
    assert transform.source.gripper.from_opening(opening).tolist() == raw[:, 6].tolist()


MINE = Transform(
    "mine",
    lambda a, s: (a[::2] * 2, None if s is None else s[::2], np.arange(0, len(a), 2)),
    *[ActionSpace(["x", "y"])] * 2,
)


def test_one_s_own_transform_is_found_by_module_and_name():
    assert find_transform("test_transforms:MINE").name == "mine"
    with pytest.raises(DatasetError, match="no transform is named 'bridge'; there are"):
        find_transform("bridge")
    with pytest.raises(DatasetError, match="cannot be imported"):
        find_transform("no_such_module:x")
    with pytest.raises(DatasetError, match="cannot be imported"):
        find_transform("test_transforms:NONE")
    with pytest.raises(DatasetError, match="is list, expected"):
        find_transform("test_transforms:BAD")


BAD = [
    (lambda a, s: (a[:1], None, np.arange(2)), "actions of shape"),
    (lambda a, s: (a[:, :1], None, np.arange(3)), "actions of shape"),
    (lambda a, s: (a, None, np.array([0, 2, 1])), "do not rise"),
    (lambda a, s: (a, None, np.array([0, 1, 3])), "do not rise"),
    (lambda a, s: (a, None, np.array([-1, 0, 1])), "do not rise"),
    (lambda a, s: (a, None, np.array([0.0, 1, 2])), "do not rise"),
    (lambda a, s: (a * np.nan, None, np.arange(3)), "not finite"),
    (lambda a, s: (a, a, np.arange(3)), "without being given any"),
]


@pytest.mark.parametrize(("function", "match"), BAD)
def test_a_transform_that_gives_what_does_not_fit_raises(function, match):
    transform = Transform("bad", function, ActionSpace(["x", "y"]), ActionSpace(["x", "y"]))
    with pytest.raises(DatasetError, match=match):
        transform(np.ones((3, 2)))


@pytest.mark.parametrize(
    ("actions", "states"), [(np.ones((3, 3)), None), (np.ones(2), None), (np.ones((3, 2)), np.ones((2, 2)))]
)
def test_a_transform_given_what_does_not_fit_raises(actions, states):
    with pytest.raises(DatasetError, match=r"expects actions \(n, 2\)|states of shape"):
        MINE(actions, states)


def written(path, names, episodes, fps=5):
    """A dataset whose pictures show their row; `episodes` gives the actions of each."""
    row = 0
    with LeRobotWriter(
        path,
        fps=fps,
        robot_type="arm",
        action_names=names,
        state_names=[f"s{name}" for name in names],
        image_shapes={"a": (4, 4, 3)},
    ) as writer:
        for number, actions in enumerate(episodes):
            pictures = {"a": [np.full((4, 4, 3), row + step, np.uint8) for step in range(len(actions))]}
            writer.add_episode(f"task {number}", actions, pictures, np.cumsum(actions, axis=0))
            row += len(actions)
    return LeRobotDataset(path)


SEVEN = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


def episode(n, gripper, seed=0):
    actions = np.random.default_rng(seed).uniform(-1, 1, (n, 7)).astype(np.float32).astype(float)
    actions[:, 6] = np.resize(gripper, n)
    return actions


@pytest.fixture
def bridge(tmp_path):
    return written(tmp_path / "b", SEVEN, [episode(5, [1, 0.5, 0]), episode(2, [1], 1), episode(4, [0, 0.5], 2)])


def test_rows_pictures_and_instructions_stay_together(bridge, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = TransformedDataset(bridge, TRANSFORMS["bridge_orig"])
    assert "keeps no step of 1 of 3 episodes, which are left out: [1]" in caplog.text
    assert dataset.rows.tolist() == [1, 2, 3, 8, 9]
    assert [(e.index, e.start, e.stop, e.instruction) for e in dataset.episodes] == [
        (0, 0, 3, "task 0"),
        (2, 3, 5, "task 2"),
    ]
    assert [dataset.frame(row, "a").getpixel((0, 0))[0] for row in range(5)] == [1, 2, 3, 8, 9]
    assert dataset.instruction(4) == "task 2"
    assert dataset.timestamps.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.2, 0.4])
    np.testing.assert_allclose(dataset.states, bridge.states[[1, 2, 3, 8, 9]])
    np.testing.assert_allclose(
        dataset.actions[:, :6], (bridge.states[[2, 3, 4, 9, 10]] - bridge.states[[1, 2, 3, 8, 9]])[:, :6]
    )
    assert dataset.actions[:, 6].tolist() == [0, 0, 1, 0, 0]
    assert (dataset.n_frames, dataset.dof, dataset.action_names, len(dataset)) == (5, 7, SEVEN, 5)
    with pytest.raises(DatasetError, match="row 5 is not in"):
        dataset.frame(5, "a")


def test_chunks_and_other_processes_take_it_for_any_reader(bridge):
    dataset = pickle.loads(pickle.dumps(TransformedDataset(bridge, TRANSFORMS["bridge_orig"])))
    chunks = ChunkDataset(dataset, 2, episodes=[2])
    assert len(chunks) == 2
    item = chunks[1]
    assert (item["episode"], item["step"], item["instruction"]) == (2, 1, "task 2")
    assert item["images"][0].getpixel((0, 0)) == (9, 9, 9)
    assert item["actions"].tolist() == [dataset.actions[4].tolist()] * 2
    assert item["action_pad_mask"].tolist() == [True, False]
    assert item["proprio"].tolist() == dataset.states[4].tolist()


def test_converting_twice_raises(bridge):
    once = TransformedDataset(bridge, TRANSFORMS["bridge_orig_commanded"])
    assert once.space.gripper == Gripper("gripper", 1.0, 0.0)
    for name in ("bridge_orig_commanded", "bridge_orig", "libero", "fractal"):
        with pytest.raises(ActionSpaceError, match="transformed by bridge_orig_commanded already"):
            TransformedDataset(once, TRANSFORMS[name])
    back = Transform("back", lambda a, s: (a, s, np.arange(len(a))), once.space, once.space)
    assert TransformedDataset(once, back).rows.tolist() == list(range(once.n_frames))


def test_numbers_that_contradict_the_source_raise(tmp_path, caplog):
    zero_one = written(tmp_path / "zero_one", SEVEN, [episode(6, [0, 1])], fps=20)
    for name in ("libero", "calvin"):
        with pytest.raises(ActionSpaceError, match=r"never below 0.*seems to have been converted already"):
            TransformedDataset(zero_one, TRANSFORMS[name])
    TransformedDataset(zero_one, TRANSFORMS["fractal"])
    assert "never told to open" in caplog.text
    signed = written(tmp_path / "signed", SEVEN, [episode(6, [-1, 1])], fps=20)
    with pytest.raises(ActionSpaceError, match="values from -1 to 1; bridge_orig expects"):
        TransformedDataset(signed, TRANSFORMS["bridge_orig"])
    two = written(tmp_path / "two", ["x", "y"], [np.ones((3, 2))])
    with pytest.raises(ActionSpaceError, match="expects 7 dimensions"):
        TransformedDataset(two, TRANSFORMS["libero"])


def test_another_rate_and_other_names_are_told(tmp_path, caplog):
    signed = written(tmp_path / "signed", SEVEN, [episode(6, [-1, 1])], fps=10)
    dataset = TransformedDataset(signed, TRANSFORMS["libero"])
    assert "runs at 10 Hz, the data that libero is meant for at 20 Hz" in caplog.text
    assert "takes them for ['x', 'y', 'z', 'rx', 'ry', 'rz', 'gripper']" in caplog.text
    assert (dataset.fps, dataset.space.rate_hz) == (10, 10)
    assert dataset.actions[:, 6].tolist() == [1, 0] * 3


def test_a_transform_that_keeps_nothing_or_fails_names_the_dataset(bridge):
    space = TRANSFORMS["bridge_orig"].source
    nothing = Transform("nothing", lambda a, s: (a[:0], s[:0], np.arange(0)), space, space)
    with pytest.raises(DatasetError, match="nothing keeps no step of any episode of"):
        TransformedDataset(bridge, nothing)
    with pytest.raises(DatasetError, match=r"episode 0 of .*not finite"):
        TransformedDataset(bridge, Transform("bad", lambda a, s: (a + math.inf, s, np.arange(len(a))), space, space))


def test_bridge_s_real_episodes_lose_their_first_and_last_step(shared):
    from hf_vla_actions.data.rlds import RLDSDataset

    source = RLDSDataset(shared / "data/bridge_rlds")
    dataset = TransformedDataset(source, TRANSFORMS["bridge_orig"])
    assert (dataset.n_frames, len(dataset.episodes), dataset.fps) == (200, 25, 5)
    assert np.abs(source.actions[[e.start for e in source.episodes], :6]).max() < 1e-6  # why the first is dropped
    assert dataset.timestamps[:3].tolist() == pytest.approx([0.2, 0.4, 0.6])
    # The motions reached are the commands, delayed and damped, but of the same size and sign.
    commanded = source.actions[dataset.rows]
    for dim in range(6):
        assert np.corrcoef(commanded[:, dim], dataset.actions[:, dim])[0, 1] > 0.6
    assert ((source.actions[:, 6] > 0.05) & (source.actions[:, 6] < 0.95)).sum() == 6
    gripper = [slow_decided(source.actions[e.start + 1 : e.stop, 6].tolist())[:-1] for e in source.episodes]
    assert dataset.actions[:, 6].tolist() == np.concatenate(gripper).tolist()
    assert dataset.frame(0, "image_0").tobytes() == source.frame(1, "image_0").tobytes()


def test_training_opens_a_dataset_through_a_transform_that_says_what_the_actions_mean(bridge):
    from hf_vla_actions.errors import TrainingError
    from hf_vla_actions.train.arguments import DataArguments
    from hf_vla_actions.train.setup import open_dataset, space_of

    args = DataArguments(dataset=str(bridge.root), transform="bridge_orig")
    dataset = open_dataset(args)
    assert (dataset.n_frames, space_of(dataset, args)) == (5, TRANSFORMS["bridge_orig"].result)
    declared = DataArguments(dataset=str(bridge.root), transform="bridge_orig", gripper="gripper")
    with pytest.raises(TrainingError, match="bridge_orig says what the actions mean; leave out"):
        space_of(dataset, declared)


def test_inspect_says_what_training_will_see(bridge, capsys):
    from hf_vla_actions.hub.inspect import main

    assert main([str(bridge.root), "--transform", "bridge_orig_commanded"]) in (0, 1)
    text = capsys.readouterr().out
    assert "8 frames at 5 Hz" in text
    assert " rad " in text
    assert main([str(bridge.root), "--transform", "bridge_orig", "--action_kind", "delta"]) == 2
    assert "bridge_orig says what the actions mean" in capsys.readouterr().err
