"""Demonstrations under random step limits: in the embedded world, and as targets on recorded data."""

import itertools

import numpy as np
import pytest
import torch

from hf_vla_actions.actions import ActionSpace, Gripper
from hf_vla_actions.data import ChunkDataset, LeRobotDataset, LeRobotWriter
from hf_vla_actions.demo.demonstrations import SLOWEST, write_lerobot_dataset
from hf_vla_actions.demo.expert import MAX_STEP
from hf_vla_actions.demo.world import WorldError
from hf_vla_actions.errors import TrainingError
from hf_vla_actions.train.arguments import DataArguments
from hf_vla_actions.train.augment import LOWEST, SlowedChunks
from hf_vla_actions.train.setup import chunk_datasets

NAMES = ["x", "y", "turn", "still", "gripper"]
SPACE = ActionSpace(
    NAMES, ["m", "m", "rad", None, None], delta=(True, True, True, True, False), gripper=Gripper("gripper")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("augment") / "set"
    rng = np.random.default_rng(0)
    with LeRobotWriter(path, fps=10, robot_type="arm", action_names=NAMES, image_shapes={"a": (4, 4, 3)}) as writer:
        for _ in range(4):
            actions = rng.normal(size=(12, 5)) * (0.02, 0.02, 0.3, 0.0, 0.0)
            actions[:, 4] = np.arange(12) > 6
            actions[3] = (0, 0, 0.2, 0, 0)  # a turn on the spot is no short move
            writer.add_episode("go", actions, {"a": [np.zeros((4, 4, 3), np.uint8)] * 12})
    return path


@pytest.fixture
def chunks(folder):
    return ChunkDataset(LeRobotDataset(folder), 6)


def test_slowed_chunks_begin_the_same_path_in_steps_within_a_limit(chunks):
    slowed = SlowedChunks(chunks, SPACE, 1.0)
    torch.manual_seed(0)
    loosest, tightest = slowed.limits(1.0), slowed.limits(LOWEST)
    longest = []
    for item in range(len(chunks)):
        whole, slow = chunks[item], slowed[item]
        assert slow["actions"].shape == whole["actions"].shape
        assert slow["action_pad_mask"].dtype == np.bool_
        xy = slow["actions"][:, :2]
        longest.append(np.linalg.norm(xy, axis=1).max())
        # Every end of a small step lies on the path: between two corners of the demonstrated one, in order.
        corners = np.concatenate([np.zeros((1, 3)), np.cumsum(whole["actions"][:, :3], axis=0)])
        fine = np.concatenate([np.linspace(a, b, 3001) for a, b in itertools.pairwise(corners)])
        reached = [np.abs(fine - p).max(axis=1).argmin() for p in np.cumsum(slow["actions"][:, :3], axis=0)]
        np.testing.assert_allclose(fine[reached], np.cumsum(slow["actions"][:, :3], axis=0), atol=1e-4)
        assert set(slow["actions"][:, 4]) <= set(whole["actions"][:, 4])
    assert max(longest) <= loosest[0] * (1 + 1e-6)
    assert min(longest) < np.median(longest) < max(longest), "every draw has a limit of its own"
    assert tightest[0] < loosest[0]
    assert slowed.limits(0.5)[2] == np.inf, "what never moves has no limit"


def test_only_the_share_asked_for_is_slowed_and_the_data_stay(chunks):
    before = chunks.actions_only()[0]
    slowed = SlowedChunks(chunks, SPACE, 0.5)
    torch.manual_seed(1)
    changed = [not np.array_equal(slowed[i % 20]["actions"], before[i % 20]) for i in range(400)]
    assert 0.35 < np.mean(changed) < 0.55
    np.testing.assert_array_equal(chunks.actions_only()[0], before)
    assert len(slowed) == len(chunks)


def test_the_end_of_an_episode_stays_padding(chunks):
    slowed = SlowedChunks(chunks, SPACE, 1.0)
    torch.manual_seed(0)
    whole, slow = chunks[11], slowed[11]  # the last step of the first episode
    assert whole["action_pad_mask"].tolist() == [True] + [False] * 5
    real = slow["action_pad_mask"]
    assert real[0]
    assert (np.diff(real.astype(int)) <= 0).all()
    if not real.all():  # the whole step fits
        np.testing.assert_allclose(slow["actions"][real].sum(axis=0)[:3], whole["actions"][0, :3], atol=1e-12)


def test_only_training_chunks_are_slowed(folder):
    args = DataArguments(
        dataset=str(folder), eval_fraction=0.25, action_kind="delta", gripper="gripper", augment_limits=0.3
    )
    train, held_out = chunk_datasets(LeRobotDataset(folder), args, 2, seed=0)
    assert isinstance(train, SlowedChunks)
    assert isinstance(held_out, ChunkDataset)
    args.augment_limits = 0.0
    assert isinstance(chunk_datasets(LeRobotDataset(folder), args, 2, seed=0)[0], ChunkDataset)


@pytest.mark.parametrize("kind", ["absolute", None])
def test_targets_cannot_be_slowed_raises(folder, kind):
    args = DataArguments(dataset=str(folder), action_kind=kind, gripper="gripper", augment_limits=0.3)
    with pytest.raises(TrainingError, match="divides deltas, and these are none: 'x'"):
        chunk_datasets(LeRobotDataset(folder), args, 2, seed=0)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_raises(chunks, tmp_path, share):
    with pytest.raises(TrainingError, match="share of the chunks"):
        SlowedChunks(chunks, SPACE, share)
    with pytest.raises(WorldError, match="share of the episodes"):
        write_lerobot_dataset(tmp_path / "a", episodes=1, augment_limits=share)


def test_a_limited_expert_succeeds_and_is_recorded_as_it_moved(tmp_path):
    data = LeRobotDataset(
        write_lerobot_dataset(tmp_path / "a", episodes=12, seed=5, augment_limits=1.0, progress=False)
    )
    longest = []
    for episode in data.episodes:
        rows = slice(episode.start, episode.stop)
        moves = data.actions[rows, :3]
        longest.append(np.abs(moves).max())
        np.testing.assert_allclose(np.diff(data.states[rows, :3], axis=0), moves[:-1], atol=1e-6)
        assert len(moves) <= 24 / SLOWEST
    assert SLOWEST * MAX_STEP - 1e-9 <= min(longest) < max(longest) <= MAX_STEP + 1e-9
    assert len({round(float(step), 6) for step in longest}) > 8


def test_some_episodes_are_limited_and_without_the_option_none(tmp_path):
    def longest(name, share):
        data = LeRobotDataset(
            write_lerobot_dataset(tmp_path / name, episodes=40, seed=1, augment_limits=share, progress=False)
        )
        return np.array([np.abs(data.actions[e.start : e.stop, :3]).max() for e in data.episodes])

    np.testing.assert_allclose(longest("none", 0.0), MAX_STEP, atol=1e-8)
    some = longest("some", 0.5)
    assert 8 <= (some < MAX_STEP - 1e-6).sum() <= 32
