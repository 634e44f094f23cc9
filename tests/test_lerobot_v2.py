"""Reading LeRobotDataset v2.0 and v2.1 folders: GR00T's demonstrations, written sets, and everything that is refused."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_lerobot import picture, refusal

from hf_vla_actions.data import ChunkDataset, LeRobotV2Dataset, open_dataset
from hf_vla_actions.data.video import VideoWriter

LENGTHS = (4, 1, 6)
DATA = "data/chunk-000/episode_000002.parquet"
VIDEO = "videos/chunk-000/front/episode_000002.mp4"


def encoded(image):
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def write_v2(root, *, version="v2.1", video=True, lengths=LENGTHS, chunks_size=1000, first=0.0):
    """A small v2.x set as lerobot lays it out: rows count on, brightness of a picture tells the row."""
    features = {
        "front": {
            "dtype": "video" if video else "image",
            "shape": [32, 48, 3],
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": [1], "names": ["angle"]},
        "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
        **{key: {"dtype": "int64", "shape": [1], "names": None} for key in ("task_index", "episode_index", "index")},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    info = {
        "codebase_version": version,
        "robot_type": "arm",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "chunks_size": chunks_size,
        "fps": 10,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        if video
        else None,
        "features": features,
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    tasks = [{"task_index": i, "task": text} for i, text in enumerate(("push", "lift", "unused"))]
    episodes = [{"episode_index": i, "tasks": [], "length": length} for i, length in enumerate(lengths)]
    for name, rows in (("tasks", tasks), ("episodes", episodes)):
        (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = 0
    for number, length in enumerate(lengths):
        rows = np.arange(row, row + length)
        chunk = number // chunks_size
        columns = {
            "observation.state": pa.array([[r / 4] for r in rows], pa.list_(pa.float32())),
            "action": pa.array([[r / 8, -r / 8] for r in rows], pa.list_(pa.float32())),
            "timestamp": pa.array(np.arange(length) / 10 + first, pa.float32()),
            "task_index": pa.array([number % 2] * length),
            "episode_index": pa.array([number] * length),
            "index": pa.array(rows),
        }
        if video:
            path = root / f"videos/chunk-{chunk:03d}/front/episode_{number:06d}.mp4"
            write_video(path, rows)
        else:
            columns["front"] = pa.array([{"bytes": encoded(picture(r)), "path": "x.png"} for r in rows])
        path = root / f"data/chunk-{chunk:03d}/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        row += length
    return root


def write_video(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    video = VideoWriter(path, fps=10, shape=(32, 48, 3))
    for row in rows:
        video.append(picture(row))
    video.close()


@pytest.fixture
def made(tmp_path):
    return write_v2(tmp_path / "set")


@pytest.fixture(scope="module")
def groot(shared):
    return shared / "data/groot_demo_v2/demo_data/robot_sim.PickNPlace"


# the real demonstrations


def test_groots_demonstrations_have_the_facts_that_their_notes_state(groot, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(groot)
    assert type(dataset) is LeRobotV2Dataset
    assert [len(episode) for episode in dataset.episodes] == [416, 470, 470, 412, 328]
    assert (dataset.n_frames, dataset.dof, dataset.fps, dataset.robot_type) == (2096, 44, 20, "GR1ArmsOnly")
    assert dataset.states.shape == (2096, 44)
    assert dataset.camera_names == ("observation.images.egoview", "observation.images.ego_view")
    assert dataset.cameras == ("observation.images.ego_view",)
    assert "observation.images.egoview" in caplog.text
    assert [episode.instruction.split()[2] for episode in dataset.episodes] == [
        "pear",
        "sweet",
        "meat",
        "salt",
        "cupcake",
    ]
    assert len(dataset.instructions) == 5  # "valid" labels another column
    assert dataset.action_names == dataset.state_names
    assert [dataset.action_names[i] for i in (0, 6, 7, 19, 22, 43)] == [
        "left_arm.0",
        "left_arm.6",
        "left_hand.0",
        "neck.0",
        "right_arm.0",
        "waist.2",
    ]
    varies = np.ptp(dataset.actions, axis=0) > 0
    assert np.flatnonzero(varies).tolist() == [*range(7), *range(22, 34)]
    np.testing.assert_allclose(dataset.timestamps[[0, 415, 416]], [0.05, 20.8, 0.05], atol=1e-4)


def test_the_real_numbers_have_the_statistics_stored_beside_them(groot):
    dataset = open_dataset(groot)
    stats = json.loads((groot / "meta/stats.json").read_text())
    for key, values in (("action", dataset.actions), ("observation.state", dataset.states)):
        found = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
        found |= {"q01": np.quantile(values, 0.01, axis=0), "q99": np.quantile(values, 0.99, axis=0)}
        for name, value in found.items():
            np.testing.assert_allclose(value, stats[key][name], atol=1e-5, err_msg=f"{key} {name}")


def test_picture_of_a_step_is_the_frame_of_that_number_bit_for_bit(groot):
    av = pytest.importorskip("av")
    dataset = open_dataset(groot)
    episode = dataset.episodes[4]
    with av.open(str(groot / f"videos/chunk-000/{dataset.cameras[0]}/episode_000004.mp4")) as container:
        in_order = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(in_order) == len(episode)
    for step in (0, 327, 1, 2, 3, 249, 250, 251, 100, 326, *np.random.default_rng(0).integers(0, 328, 8).tolist()):
        found = np.asarray(dataset.frame(episode.start + step, "ego_view"))
        assert (found == in_order[step]).all(), step
    assert (np.asarray(ChunkDataset(dataset, 2)[episode.start + 5]["images"][0]) == in_order[5]).all()


def test_a_camera_without_files_is_an_error_only_where_it_is_asked_for(groot):
    words = ("observation.images.egoview", "has no file", "['observation.images.ego_view']")
    refusal(lambda: open_dataset(groot, cameras=["egoview"]), *words)
    dataset = open_dataset(groot)
    refusal(lambda: dataset.frame(0, "egoview"), "episode_000000.mp4 is missing")


# written sets


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "2.1"])
@pytest.mark.parametrize("video", [False, True])
def test_rows_episodes_and_pictures_come_back(tmp_path, version, video):
    dataset = open_dataset(write_v2(tmp_path / "set", version=version, video=video, chunks_size=2))
    assert type(dataset) is LeRobotV2Dataset
    assert (dataset.name, dataset.fps, dataset.robot_type) == ("set", 10, "arm")
    assert dataset.actions.tolist() == [[row / 8, -row / 8] for row in range(11)]
    assert dataset.states.tolist() == [[row / 4] for row in range(11)]
    assert [(e.index, e.start, e.stop, e.instruction) for e in dataset.episodes] == [
        (0, 0, 4, "push"),
        (1, 4, 5, "lift"),
        (2, 5, 11, "push"),
    ]
    assert (dataset.action_names, dataset.state_names) == (["x", "y"], ["angle"])
    assert dataset.instructions == ("push", "lift")
    for row in (10, 0, 4, 5, 3):
        error = np.abs(np.asarray(dataset.frame(row, "front")) - picture(row).astype(int))
        assert error.mean() < (4 if video else 1e-9)
