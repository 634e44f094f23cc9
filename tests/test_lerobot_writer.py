"""Writing LeRobotDataset v3.0: the same form as the real sample, whole or not at all."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_vla_actions.data import LeRobotDataset, LeRobotWriter
from hf_vla_actions.data.lerobot_stats import QUANTILES, PixelCounts
from hf_vla_actions.errors import DatasetError

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
NAMES = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def options(**changes):
    return {"fps": 5, "robot_type": "arm", "action_names": ["x", "y"]} | changes


@pytest.fixture
def one_camera(tmp_path):
    """A writer of 2-d actions and one camera, that nobody has written to."""
    with LeRobotWriter(tmp_path / "set", **options(image_shapes={"top": (4, 6, 3)})) as writer:
        yield writer
        writer.add_episode("push", np.zeros((2, 2)), {"top": noise(2, 4, 6, 3)})


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory, shared):
    """The real sample, read and written again."""
    sample = LeRobotDataset(shared / "data/bridge_sample")
    path = tmp_path_factory.mktemp("rewritten") / "set"
    shapes = {camera: (64, 64, 3) for camera in sample.cameras}
    with LeRobotWriter(
        path, fps=5, robot_type="widowx", action_names=NAMES, state_names=NAMES, image_shapes=shapes
    ) as writer:
        for episode in sample.episodes:
            rows = range(episode.start, episode.stop)
            images = {camera: [np.asarray(sample.frame(row, camera)) for row in rows] for camera in shapes}
            span = slice(episode.start, episode.stop)
            writer.add_episode(episode.instruction, sample.actions[span], images, sample.states[span])
    return sample, LeRobotDataset(path)


def assert_same_stats(found, expected):
    assert set(found) == set(expected)
    for key, stats in expected.items():
        assert set(found[key]) == set(stats)
        for name, value in stats.items():
            assert np.shape(found[key][name]) == np.shape(value)
            # float32 sums in the sample against float64 here
            np.testing.assert_allclose(found[key][name], value, rtol=1e-5, atol=1e-7, err_msg=f"{key} {name}")


def test_the_real_sample_written_again_has_the_same_numbers_and_pictures(rewritten):
    sample, again = rewritten
    np.testing.assert_array_equal(again.actions, sample.actions)
    np.testing.assert_array_equal(again.states, sample.states)
    assert again.episodes == sample.episodes
    assert again.instructions == sample.instructions
    for row in range(0, 200, 17):
        for camera in sample.cameras:
            np.testing.assert_array_equal(np.asarray(again.frame(row, camera)), np.asarray(sample.frame(row, camera)))


def test_data_table_is_that_of_the_real_sample_column_by_column(rewritten):
    theirs, ours = (pq.ParquetFile(dataset.root / DATA) for dataset in rewritten)
    assert ours.schema_arrow.equals(theirs.schema_arrow)
    assert ours.num_row_groups == theirs.num_row_groups == 20
    assert json.loads(ours.schema_arrow.metadata[b"huggingface"]) == json.loads(
        theirs.schema_arrow.metadata[b"huggingface"]
    )
    assert {ours.metadata.row_group(i).num_rows for i in range(20)} == {10}
    for name in ("observation.state", "action", "timestamp", "frame_index", "episode_index", "index", "task_index"):
        assert ours.read([name])[name].equals(theirs.read([name])[name]), name


def test_episodes_and_tasks_are_those_of_the_real_sample_column_by_column(rewritten):
    theirs, ours = (pq.read_table(dataset.root / EPISODES) for dataset in rewritten)
    assert set(ours.column_names) == set(theirs.column_names)
    for name in theirs.column_names:
        assert ours.schema.field(name).type == theirs.schema.field(name).type, name
        if not name.startswith("stats/"):
            assert ours[name].equals(theirs[name]), name
    for one, other in zip(ours.to_pylist(), theirs.to_pylist(), strict=True):
        for name, value in other.items():
            if name.startswith(("stats/action", "stats/observation.state", "stats/timestamp", "stats/index")):
                np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    theirs, ours = (pq.read_table(dataset.root / "meta/tasks.parquet") for dataset in rewritten)
    assert ours.equals(theirs)
    assert json.loads(ours.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]


def test_info_and_stats_are_those_of_the_real_sample(rewritten):
    sample, again = rewritten
    assert again.info == sample.info
    theirs, ours = (json.loads((dataset.root / "meta/stats.json").read_text()) for dataset in rewritten)
    assert_same_stats(ours, theirs)


def test_only_the_dataset_is_left_beside_the_target(rewritten):
    root = rewritten[1].root
    assert [entry.name for entry in root.parent.iterdir()] == ["set"]
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) == sorted(
        [DATA, EPISODES, "meta/info.json", "meta/stats.json", "meta/tasks.parquet"]
    )


def test_datasets_decodes_what_was_written(rewritten):
    datasets = pytest.importorskip("datasets")
    sample, again = rewritten
    files = str(again.root / DATA)
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(again.root.parent / "c"))
    row = loaded[117]
    np.testing.assert_allclose(row["action"], sample.actions[117], rtol=1e-7)
    for camera in sample.cameras:
        np.testing.assert_array_equal(np.asarray(row[camera]), np.asarray(sample.frame(117, camera)))


def test_pandas_finds_tasks_by_their_text(rewritten):
    pandas = pytest.importorskip("pandas")
    tasks = pandas.read_parquet(rewritten[1].root / "meta/tasks.parquet")
    assert tasks.loc["put carrot on plate", "task_index"] == 1
    assert list(tasks.columns) == ["task_index"]


def test_pixel_statistics_are_those_of_all_pixels():
    pictures = noise(7, 5, 9, 3) // np.uint8([1, 3, 9])
    first, second = PixelCounts(), PixelCounts()
    for number, picture in enumerate(pictures):
        (first if number < 3 else second).add(picture)
    stats = (first + second).stats()
    pixels = pictures.reshape(-1, 3) / 255
    expected = {"min": pixels.min(0), "max": pixels.max(0), "mean": pixels.mean(0), "std": pixels.std(0)}
    expected |= {name: np.quantile(pixels, q, axis=0) for name, q in QUANTILES.items()}
    for name, value in expected.items():
        np.testing.assert_allclose(np.reshape(stats[name], 3), value, rtol=1e-9, err_msg=name)
    assert stats["count"] == [7]


def test_quantiles_are_of_all_steps_not_of_episodes(tmp_path):
    episodes = [np.random.default_rng(i).normal(i, 1, (20 + i, 2)) for i in range(4)]
    with LeRobotWriter(tmp_path / "set", **options()) as writer:
        for actions in episodes:
            writer.add_episode("push", actions)
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())["action"]
    everything = np.concatenate(episodes).astype(np.float32)
    np.testing.assert_allclose(stats["q01"], np.quantile(everything, 0.01, axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats["q99"], np.quantile(everything, 0.99, axis=0), rtol=1e-5)


def test_jpeg_pictures_are_stored_with_the_quality_asked_for(tmp_path):
    picture = np.asarray(Image.fromarray(noise(3, 4, 3)).resize((32, 24)))
    shapes = {"image_shapes": {"top": (24, 32, 3)}}
    sizes = {}
    for quality in (30, 90):
        path = tmp_path / str(quality)
        with LeRobotWriter(path, **options(**shapes, jpeg_quality=quality)) as writer:
            writer.add_episode("push", np.zeros((1, 2)), {"top": [picture]})
        cell = pq.read_table(path / DATA)["observation.images.top"][0].as_py()
        assert cell["path"] == "frame-000000.jpg"
        assert Image.open(io.BytesIO(cell["bytes"])).format == "JPEG"
        assert np.abs(np.asarray(LeRobotDataset(path).frame(0, "top")) - picture.astype(int)).mean() < 20
        sizes[quality] = len(cell["bytes"])
    assert sizes[30] < sizes[90]


def test_video_sets_have_video_features_and_no_picture_column(tmp_path):
    path = tmp_path / "set"
    with LeRobotWriter(path, **options(image_shapes={"top": (32, 48, 3)}, video=True)) as writer:
        for length in (3, 2):
            writer.add_episode("push", np.zeros((length, 2)), {"top": noise(length, 32, 48, 3)})
    feature = json.loads((path / "meta/info.json").read_text())["features"]["observation.images.top"]
    assert (feature["dtype"], feature["shape"]) == ("video", [32, 48, 3])
    assert (feature["info"]["video.codec"], feature["info"]["video.pix_fmt"]) == ("h264", "yuv420p")
    assert "observation.images.top" not in pq.read_schema(path / DATA).names
    assert b"images" not in pq.read_schema(path / DATA).metadata[b"huggingface"]
    rows = pq.read_table(path / EPISODES).to_pylist()
    names = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    places = [tuple(row[f"videos/observation.images.top/{name}"] for name in names) for row in rows]
    assert places == [(0, 0, 0.0, 0.6), (0, 0, 0.6, 1.0)]
    av = pytest.importorskip("av")
    with av.open(str(path / "videos/observation.images.top/chunk-000/file-000.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert [round(frame.time, 6) for frame in container.decode(video=0)] == [0, 0.2, 0.4, 0.6, 0.8]


def test_more_episodes_than_wait_for_the_table_are_all_in_it(tmp_path):
    with LeRobotWriter(tmp_path / "set", **options()) as writer:
        for number in range(230):
            writer.add_episode(f"task {number % 7}", np.full((2, 2), number))
    dataset = LeRobotDataset(tmp_path / "set")
    assert [episode.instruction for episode in dataset.episodes] == [f"task {i % 7}" for i in range(230)]
    assert dataset.actions[:, 0].tolist() == np.repeat(np.arange(230.0), 2).tolist()


def test_data_files_begin_anew_when_they_have_grown(tmp_path):
    limits = {"image_shapes": {"top": (64, 64, 3)}, "data_files_size_in_mb": 0.1}
    with LeRobotWriter(tmp_path / "set", **options(**limits)) as writer:
        for number in range(6):
            writer.add_episode("push", np.full((4, 2), number), {"top": noise(4, 64, 64, 3, seed=number)})
    files = sorted((tmp_path / "set/data/chunk-000").iterdir())
    assert [pq.read_metadata(file).num_row_groups for file in files] == [2, 2, 2]
    rows = pq.read_table(tmp_path / "set" / EPISODES).to_pylist()
    assert [row["data/file_index"] for row in rows] == [0, 0, 1, 1, 2, 2]
    dataset = LeRobotDataset(tmp_path / "set")
    assert dataset.actions[:, 1].tolist() == np.repeat(np.arange(6.0), 4).tolist()
    np.testing.assert_array_equal(np.asarray(dataset.frame(13, "top")), noise(4, 64, 64, 3, seed=3)[1])


def test_nothing_stands_at_the_target_before_close_and_an_empty_folder_is_taken(tmp_path):
    path = tmp_path / "set"
    path.mkdir()
    writer = LeRobotWriter(path, **options())
    writer.add_episode("push", np.zeros((2, 2)))
    assert list(path.iterdir()) == []
    writer.close()
    writer.close()
    assert LeRobotDataset(path).n_frames == 2
    with pytest.raises(DatasetError, match="is closed"):
        writer.add_episode("push", np.zeros((2, 2)))


# whole or not at all


@pytest.mark.parametrize("video", [False, True])
def test_an_exception_leaves_nothing(tmp_path, video):
    def interrupted():
        shapes = {"image_shapes": {"top": (32, 48, 3)}, "video": video}
        with LeRobotWriter(tmp_path / "set", **options(**shapes)) as writer:
            writer.add_episode("push", np.zeros((2, 2)), {"top": noise(2, 32, 48, 3)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_forgotten_leaves_nothing(tmp_path):
    writer = LeRobotWriter(tmp_path / "set", **options())
    writer.add_episode("push", np.zeros((2, 2)))
    assert len(list(tmp_path.iterdir())) == 1
    del writer
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_fails_while_it_is_written_leaves_nothing(tmp_path):
    class Camera(list):
        """Gives good pictures when they are checked, and fails when they are read again."""

        def __iter__(self):
            if self.pop() is None:
                raise OSError("camera is gone")
            self.append(None)
            return iter([noise(4, 6, 3)] * 2)

        def __len__(self):
            return 2

    writer = LeRobotWriter(tmp_path / "set", **options(image_shapes={"top": (4, 6, 3)}))
    with pytest.raises(OSError, match="camera is gone"):
        writer.add_episode("push", np.zeros((2, 2)), {"top": Camera([1])})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DatasetError, match="is closed"):
        writer.add_episode("push", np.zeros((2, 2)))


def test_a_set_without_episodes_raises(tmp_path):
    with pytest.raises(DatasetError, match="no episode was added"):
        LeRobotWriter(tmp_path / "set", **options()).close()
    with pytest.raises(DatasetError, match="no episode was added"), LeRobotWriter(tmp_path / "set", **options()):
        pass
    assert list(tmp_path.iterdir()) == []


def test_target_in_use_raises(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="set exists and is not empty; give another path"):
        LeRobotWriter(tmp_path / "set", **options())
    with pytest.raises(DatasetError, match=r"notes.txt is a file; give the path of a folder"):
        LeRobotWriter(tmp_path / "set" / "notes.txt", **options())
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    assert (tmp_path / "set" / "notes.txt").read_text() == "mine"


def test_target_that_another_filled_meanwhile_raises_and_is_kept(tmp_path):
    writer = LeRobotWriter(tmp_path / "set", **options())
    writer.add_episode("push", np.zeros((2, 2)))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="exists and is not empty"):
        writer.close()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["set", "set/notes.txt"]


# arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "fps must be above 0, got 0"),
        ({"action_names": []}, r"action_names must be one distinct name a dimension, got \[\]"),
        ({"action_names": ["x", "x"]}, "action_names must be one distinct"),
        ({"state_names": []}, "state_names must be one distinct"),
        ({"image_shapes": {"top": (4, 6)}}, r"'observation.images.top' must be \(height, width, 3\), got \(4, 6\)"),
        ({"image_shapes": {"top": (4, 6, 1)}}, r"must be \(height, width, 3\), got \(4, 6, 1\)"),
        ({"image_shapes": {"top": (5, 6, 3)}, "video": True}, "needs even height and width"),
        ({"jpeg_quality": 0}, "jpeg_quality is 1 to 95"),
        ({"jpeg_quality": 90, "video": True}, "jpeg_quality .* got 90, video=True"),
    ],
)
def test_arguments_that_cannot_be_raises(tmp_path, changes, message):
    with pytest.raises(DatasetError, match=message):
        LeRobotWriter(tmp_path / "set", **options(**changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": " "}, "episode 0 needs an instruction, got ' '"),
        (
            {"actions": np.zeros(2)},
            r"actions must have shape \(steps, 2\), one column each of \['x', 'y'\]; got \(2,\)",
        ),
        ({"actions": np.zeros((2, 3))}, r"got \(2, 3\)"),
        ({"actions": np.zeros((0, 2))}, "at least one step"),
        ({"actions": np.array([[0, 0], [0, np.nan]])}, "actions of step 1 must be finite"),
        ({"actions": np.array([[0, 0], [1e39, 0]])}, "actions of step 1 must be finite float32"),
        ({"states": np.zeros((2, 1))}, "states and state_names go together"),
        ({"images": None}, r"expected images of the cameras \['observation.images.top'\], got \[\]"),
        ({"images": {"side": noise(2, 4, 6, 3)}}, r"got \['observation.images.side'\]"),
        ({"images": {"top": noise(3, 4, 6, 3)}}, "has 3 pictures for 2 actions"),
        ({"images": {"top": noise(2, 6, 4, 3)}}, r"step 0 must be uint8 of shape \(4, 6, 3\), got uint8 of shape"),
        ({"images": {"top": [noise(4, 6, 3), noise(4, 6, 3) / 255]}}, "step 1 must be uint8 .* got float64"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_episode_that_does_not_fit_raises_and_the_writer_stays_usable(one_camera, changes, message):
    episode = {"instruction": "push", "actions": np.zeros((2, 2)), "images": {"top": noise(2, 4, 6, 3)}}
    with pytest.raises(DatasetError, match=message) as caught:
        one_camera.add_episode(**(episode | changes))
    assert "\n" not in str(caught.value)
    assert (one_camera.n_episodes, one_camera.n_frames) == (0, 0)


def test_states_of_another_length_raise(tmp_path):
    with LeRobotWriter(tmp_path / "set", **options(state_names=["angle"])) as writer:
        with pytest.raises(DatasetError, match=r"states must have shape \(2, 1\).* got \(3, 1\)"):
            writer.add_episode("push", np.zeros((2, 2)), states=np.zeros((3, 1)))
        with pytest.raises(DatasetError, match="states and state_names go together: got states=None"):
            writer.add_episode("push", np.zeros((2, 2)))
        writer.add_episode("push", np.zeros((2, 2)), states=np.zeros((2, 1)))
