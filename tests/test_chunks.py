"""Chunks of actions against a slow loop, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vla_actions.data import ChunkDataset, LeRobotDataset, LeRobotWriter
from hf_vla_actions.errors import DatasetError

LENGTHS = (3, 1, 8, 2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("chunks") / "set"
    options = {"action_names": ["x", "y"], "state_names": ["angle"], "image_shapes": {"a": (4, 4, 3), "b": (2, 6, 3)}}
    row = 0
    with LeRobotWriter(path, fps=10, robot_type="arm", **options) as writer:
        for number, length in enumerate(LENGTHS):
            rows = np.arange(row, row + length)
            images = {
                "a": [np.full((4, 4, 3), r, np.uint8) for r in rows],
                "b": [np.full((2, 6, 3), 100 + r, np.uint8) for r in rows],
            }
            writer.add_episode(f"task {number % 3}", np.stack([rows, -rows], axis=1), images, rows[:, None] * 2.0)
            row += length
    return LeRobotDataset(path)


def slow_chunks(dataset, horizon, episodes, skip_first):
    """One step after the other: (episode, step, actions, mask)."""
    for index in episodes:
        episode = dataset.episodes[index]
        for start in range(episode.start + skip_first, episode.stop):
            rows = [min(start + ahead, episode.stop - 1) for ahead in range(horizon)]
            mask = [start + ahead < episode.stop for ahead in range(horizon)]
            yield index, start - episode.start, [dataset.actions[row].tolist() for row in rows], mask


@settings(deadline=None, max_examples=60)
@given(
    horizon=st.integers(1, 12),
    episodes=st.none() | st.lists(st.integers(0, len(LENGTHS) - 1), max_size=5),
    skip_first=st.integers(0, 9),
)
def test_chunks_are_those_of_a_slow_loop(dataset, horizon, episodes, skip_first):
    chosen = range(len(LENGTHS)) if episodes is None else episodes
    expected = list(slow_chunks(dataset, horizon, chosen, skip_first))
    if not expected:
        with pytest.raises(DatasetError, match="no step is left"):
            ChunkDataset(dataset, horizon, episodes=episodes, skip_first=skip_first)
        return
    chunks = ChunkDataset(dataset, horizon, episodes=episodes, skip_first=skip_first)
    actions, mask = chunks.actions_only()
    assert actions.shape == (len(chunks), horizon, 2)
    assert actions.tolist() == [chunk for _, _, chunk, _ in expected]
    assert mask.tolist() == [m for *_, m in expected]
    for item in {0, len(chunks) // 2, len(chunks) - 1}:
        one = chunks[item]
        assert (one["episode"], one["step"]) == expected[item][:2]
        assert one["actions"].tolist() == expected[item][2]
        assert one["action_pad_mask"].tolist() == expected[item][3]


def test_an_item_holds_pictures_instruction_actions_mask_and_proprio_of_one_step(dataset):
    item = ChunkDataset(dataset, 3)[10]  # step 6 of 8 of episode 2
    assert (item["episode"], item["step"], item["instruction"]) == (2, 6, "task 2")
    assert [(image.size, image.getpixel((0, 0))) for image in item["images"]] == [
        ((4, 4), (10, 10, 10)),
        ((6, 2), (110, 110, 110)),
    ]
    assert item["actions"].tolist() == [[10, -10], [11, -11], [11, -11]]
    assert item["action_pad_mask"].tolist() == [True, True, False]
    assert item["actions"].dtype == np.float64
    assert item["action_pad_mask"].dtype == np.bool_
    assert item["proprio"].tolist() == [20]


def test_only_chosen_cameras_are_given_and_proprio_is_none_without_states(dataset):
    chosen = LeRobotDataset(dataset.root, cameras=["b"], state_key=None)
    item = ChunkDataset(chosen, 2)[0]
    assert [image.size for image in item["images"]] == [(6, 2)]
    assert item["proprio"] is None


def test_changing_an_item_does_not_change_the_dataset(dataset):
    chunks = ChunkDataset(dataset, 2)
    chunks[0]["actions"][:] = 99
    chunks[0]["proprio"][:] = 99
    chunks.actions_only()[0][:] = 99
    assert chunks[0]["actions"].tolist() == [[0, 0], [1, -1]]
    assert chunks[0]["proprio"].tolist() == [0]


def test_chunks_are_counted_like_a_list(dataset):
    chunks = ChunkDataset(dataset, 2, skip_first=1)
    assert len(chunks) == sum(LENGTHS) - len(LENGTHS)
    assert [item["step"] for item in chunks] == [1, 2, 1, 2, 3, 4, 5, 6, 7, 1]
    assert chunks[-1]["episode"] == chunks[np.int64(9)]["episode"] == 3
    for item in (10, -11):
        with pytest.raises(IndexError, match="10 chunks"):
            chunks[item]


def test_real_chunks_drop_the_first_action_of_each_episode(shared):
    dataset = LeRobotDataset(shared / "data/bridge_sample", cameras=["image_0"])
    chunks = ChunkDataset(dataset, 4, skip_first=1)
    actions, mask = chunks.actions_only()
    assert (len(chunks), actions.shape, int(mask.sum())) == (180, (180, 4, 7), 20 * (6 * 4 + 3 + 2 + 1))
    assert np.abs(ChunkDataset(dataset, 1).actions_only()[0][::10, 0, :6]).max() < 1e-6
    assert np.abs(actions[::9, 0, :6]).max(axis=1).min() > 1e-4
    item = chunks[9]
    assert (item["episode"], item["step"]) == (1, 1)
    assert item["proprio"].tolist() == dataset.states[11].tolist()
    np.testing.assert_array_equal(np.asarray(item["images"][0]), np.asarray(dataset.frame(11, "image_0")))


@settings(deadline=None, max_examples=40)
@given(history=st.integers(1, 10), skip_first=st.integers(0, 2), item=st.integers(0, 6))
def test_the_past_is_that_of_a_slow_loop(dataset, history, skip_first, item):
    chunks = ChunkDataset(dataset, 2, episodes=[2, 0], skip_first=skip_first, history=history)
    one, none = chunks[item], ChunkDataset(dataset, 2, episodes=[2, 0], skip_first=skip_first)[item]
    episode = dataset.episodes[one["episode"]]
    rows, real = [], []
    for back in range(history, 0, -1):
        step = one["step"] - back
        real.append(step >= skip_first)
        rows.append(episode.start + max(step, skip_first))
    assert one["past_pad_mask"].tolist() == real
    assert one["past_actions"].tolist() == dataset.actions[rows].tolist()
    assert one["past_proprio"].tolist() == dataset.states[rows].tolist()
    seen = [[image.getpixel((0, 0))[0] for image in images] for images in one["past_images"]]
    assert seen == [[row, 100 + row] for row in rows]
    assert not set(none) & {"past_images", "past_actions", "past_proprio", "past_pad_mask"}
    assert all(np.array_equal(one[key], none[key]) for key in ("actions", "action_pad_mask", "proprio", "step"))


def test_items_name_the_statistics_that_they_belong_to(dataset):
    assert ChunkDataset(dataset, 2)[0]["unnorm_key"] == "set"
    assert ChunkDataset(dataset, 2, unnorm_key="arm")[0]["unnorm_key"] == "arm"


def test_the_past_of_a_dataset_without_states_has_none(dataset):
    item = ChunkDataset(LeRobotDataset(dataset.root, state_key=None), 2, history=2)[0]
    assert item["past_proprio"] is None
    assert item["past_pad_mask"].tolist() == [False, False]


def test_batches_of_a_dataloader_hold_every_chunk_once(dataset):
    data = pytest.importorskip("torch.utils.data")
    loader = data.DataLoader(ChunkDataset(dataset, 2), batch_size=4, shuffle=True, collate_fn=list)
    seen = sorted(item["images"][0].getpixel((0, 0))[0] for batch in loader for item in batch)
    assert seen == list(range(sum(LENGTHS)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"horizon": 1, "skip_first": -1}, "skip_first must be at least 0, got -1"),
        ({"horizon": 1, "history": -1}, "history must be at least 0, got -1"),
        ({"horizon": 1, "episodes": [0, 4]}, r"episodes \[4\] are not in .* has 4 episodes, from 0 to 3"),
        ({"horizon": 1, "episodes": []}, "no step is left of 0 episodes"),
        ({"horizon": 1, "skip_first": 8}, "no step is left of 4 episodes .* skip_first=8; their longest has 8 steps"),
    ],
)
def test_chunks_that_cannot_be_raises(dataset, options, message):
    with pytest.raises(DatasetError, match=message):
        ChunkDataset(dataset, **options)
