"""LeRobotDataset objects of the lerobot package as readers.

The package cannot stand beside current torch; a stand-in from a `datasets.Dataset` has what its objects are documented to
have: `hf_dataset` under a transform to tensors, `meta`, and items with pictures as float32 (3, height, width) in [0, 1].
"""

import pickle
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_lerobot import edit_info, picture, refusal, write_set
from test_lerobot_v2 import write_v2

from hf_vla_actions.data import ChunkDataset, LiveDataset, MixtureDataset, open_dataset


def to_torch(batch):
    """As lerobot does it: pictures to float32 (3, height, width) / 255, all else to tensors."""
    out = {}
    for key, values in batch.items():
        if isinstance(values[0], Image.Image):
            out[key] = [torch.from_numpy(np.array(v)).permute(2, 0, 1).float() / 255 for v in values]
        else:
            out[key] = [v if isinstance(v, str) else torch.tensor(v) for v in values]
    return out


class StandIn(torch.utils.data.Dataset):
    """What a LeRobotDataset gives: `episodes` chooses some, `delta_timestamps` adds a time axis and `_is_pad`."""

    def __init__(self, root, *, tasks, episodes=None, delta_timestamps=None, image_transforms=None):
        reader = open_dataset(root)
        files = sorted(str(file) for file in (root / "data").rglob("*.parquet"))
        self.repo_id, self.root, self.episodes = "someone/arm", root, episodes
        self.delta_timestamps, self.image_transforms = delta_timestamps, image_transforms
        self.meta = SimpleNamespace(
            info=reader.info,
            features=reader.info["features"],
            fps=reader.info["fps"],
            robot_type=reader.info["robot_type"],
            tasks=tasks,
        )
        rows = datasets.Dataset.from_parquet(files, cache_dir=str(root.parent / "cache"), keep_in_memory=True)
        for camera in reader.camera_names:
            if camera in rows.column_names:
                rows = rows.cast_column(camera, datasets.Image())
        if episodes is not None:
            rows = rows.filter(lambda row: row["episode_index"] in episodes, keep_in_memory=True)
        rows.set_transform(to_torch)
        self.hf_dataset = rows
        self.calls = 0

    def __len__(self):
        return len(self.hf_dataset)

    def __getitem__(self, index):
        self.calls += 1
        item = self.hf_dataset[index]
        for key, deltas in (self.delta_timestamps or {}).items():
            item[key] = torch.stack([item[key]] * len(deltas))
            item[f"{key}_is_pad"] = torch.zeros(len(deltas), dtype=torch.bool)
        if self.image_transforms is not None:
            item = {k: self.image_transforms(v) if v.ndim == 3 else v for k, v in item.items()}
        return item


def frame_of_tasks():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"task_index": [0, 1]}, index=["push", "lift"])


@pytest.fixture
def root(tmp_path):
    return write_set(tmp_path / "set")


def test_a_live_dataset_is_read_like_its_folder(root):
    dataset, folder = LiveDataset(StandIn(root, tasks=frame_of_tasks())), open_dataset(root)
    assert (dataset.name, dataset.root, dataset.fps, dataset.robot_type) == ("arm", Path(root), 10, "arm")
    for name in (
        "camera_names",
        "cameras",
        "action_names",
        "state_names",
        "dof",
        "n_frames",
        "instructions",
        "episodes",
    ):
        assert getattr(dataset, name) == getattr(folder, name), name
    for name in ("actions", "states", "timestamps"):
        assert getattr(dataset, name).dtype == np.float64
        assert getattr(dataset, name).tolist() == getattr(folder, name).tolist()
    for row in (10, 0, 4):
        assert dataset.instruction(row) == folder.instruction(row)
        for camera in ("front", "wrist"):
            assert np.array_equal(dataset.frame(row, camera), folder.frame(row, camera))


def test_v2_objects_have_their_tasks_in_a_dict(tmp_path):
    root = write_v2(tmp_path / "set", video=False)
    dataset = LiveDataset(StandIn(root, tasks={0: "push", 1: "lift", 2: "unused"}))
    assert dataset.instructions == ("push", "lift")
    assert np.array_equal(dataset.frame(10, "front"), picture(10))


def test_chosen_episodes_keep_their_numbers(root):
    dataset = LiveDataset(StandIn(root, tasks=frame_of_tasks(), episodes=[0, 2]))
    assert [(e.index, e.start, e.stop) for e in dataset.episodes] == [(0, 0, 4), (2, 4, 10)]
    assert dataset.actions[4].tolist() == [5 / 8, -5 / 8]
    assert np.array_equal(dataset.frame(4, "front"), picture(5))
    assert ChunkDataset(dataset, 2, episodes=[2])[0]["actions"][0].tolist() == [5 / 8, -5 / 8]


def test_numbers_are_read_without_pictures_and_a_row_is_decoded_once(root):
    live = StandIn(root, tasks=frame_of_tasks())
    dataset = LiveDataset(live)
    assert live.calls == 0
    item = MixtureDataset([(ChunkDataset(dataset, 2), 1)])[3]
    assert (live.calls, len(item["images"]), item["unnorm_key"]) == (1, 2, "arm")
    assert pickle.loads(pickle.dumps(dataset))._last is None


def test_objects_of_another_kind_raise(root):
    for other in (str(root), torch.utils.data.TensorDataset(torch.zeros(2)), {"meta": 1}):
        refusal(
            lambda other=other: LiveDataset(other), "expected a LeRobotDataset", type(other).__name__, "open_dataset"
        )
    live = StandIn(root, tasks=frame_of_tasks())
    live.meta = SimpleNamespace(fps=10)
    refusal(lambda: LiveDataset(live), "expected a LeRobotDataset", "tasks")


def test_pictures_that_were_changed_or_stacked_raise(root):
    live = StandIn(root, tasks=frame_of_tasks(), delta_timestamps={"observation.images.front": [-0.1, 0.0]})
    refusal(lambda: LiveDataset(live).frame(0, "front"), "(2, 3, 32, 48)", "delta_timestamps")
    for change in (lambda x: (x - 0.5) / 0.29, lambda x: x * 0.9):
        live = StandIn(root, tasks=frame_of_tasks(), image_transforms=change)
        refusal(
            lambda live=live: LiveDataset(live).frame(9, "front"), "front' of episode 2 step 4", "image_transforms"
        )
    live = StandIn(root, tasks=frame_of_tasks())
    live.hf_dataset = live.hf_dataset.remove_columns("observation.images.front")
    refusal(lambda: LiveDataset(live).frame(0, "front"), "got None")


def test_actions_may_have_delta_timestamps(root):
    live = StandIn(root, tasks=frame_of_tasks(), delta_timestamps={"action": [0.0, 0.1]})
    assert LiveDataset(live).actions.shape == (11, 2)
    assert np.array_equal(LiveDataset(live).frame(3, "wrist"), picture(3, 1))


def test_inconsistent_objects_raise(root):
    live = StandIn(root, tasks=frame_of_tasks())
    refusal(lambda: LiveDataset(StandIn(root, tasks={0: "push"})), "meta.tasks of arm", "[1]")
    live.hf_dataset = live.hf_dataset.select([0, 4, 1, 2])
    refusal(lambda: LiveDataset(live), "shuffled")
    live = StandIn(root, tasks=frame_of_tasks())
    live.hf_dataset = live.hf_dataset.remove_columns("action")
    refusal(lambda: LiveDataset(live), "no columns ['action']")
    edit_info(root, features={k: v for k, v in live.meta.features.items() if k != "action"})
    refusal(lambda: open_dataset(root), "action_key 'action'")
