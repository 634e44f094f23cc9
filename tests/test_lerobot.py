"""Reading LeRobotDataset v3.0 folders: the real sample, written sets, and everything that is refused."""

import io
import json
import multiprocessing
import pickle
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_vla_actions.data import Episode, LeRobotDataset, LeRobotWriter
from hf_vla_actions.data.parquet import ParquetImages
from hf_vla_actions.data.video import VideoReader, VideoWriter
from hf_vla_actions.errors import DatasetError

LENGTHS = (4, 1, 6)
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def picture(row, camera=0):
    """A smooth picture whose brightness tells the row and whose tint tells the camera."""
    down, right = np.mgrid[:32, :48]
    return np.stack([down * 2 + 10 * row, right * 3, np.full_like(down, 90 * camera)], axis=-1).astype(np.uint8)


def write_set(path, *, cameras=("front", "wrist"), **options):
    shapes = dict.fromkeys(cameras, (32, 48, 3))
    names = {"action_names": ["x", "y"], "state_names": ["angle"]}
    row = 0
    with LeRobotWriter(path, fps=10, robot_type="arm", image_shapes=shapes, **names, **options) as writer:
        for number, length in enumerate(LENGTHS):
            rows = np.arange(row, row + length)
            images = {name: [picture(r, i) for r in rows] for i, name in enumerate(cameras)}
            actions = np.stack([rows, -rows], axis=1) / 8
            writer.add_episode(["push", "lift"][number % 2], actions, images, states=rows[:, None] / 4)
            row += length
    return path


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("pristine") / "set")


@pytest.fixture(scope="module")
def pristine_video(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("pristine") / "video_set", cameras=("front",), video=True)


@pytest.fixture(scope="module")
def noise_video(tmp_path_factory):
    """60 frames that compress badly: more than a decoder reads ahead."""
    path = tmp_path_factory.mktemp("pristine") / "noise"
    options = {"image_shapes": {"front": (64, 96, 3)}, "video": True}
    with LeRobotWriter(path, fps=10, robot_type="arm", action_names=["x"], **options) as writer:
        frames = np.random.default_rng(0).integers(0, 256, (60, 64, 96, 3), dtype=np.uint8)
        writer.add_episode("push", np.zeros((60, 1)), {"front": frames})
    return path


@pytest.fixture
def broken(tmp_path):
    """A set of one's own, to damage."""
    return write_set(tmp_path / "set", cameras=("front",))


def edit_info(root, **changes):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_column(path, name, column):
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), path)


def refusal(opener, *words):
    """The message of the refusal: one line that holds every word."""
    with pytest.raises(DatasetError) as caught:
        opener()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return message


# the real sample


def test_the_real_sample_has_the_facts_that_its_notes_state(shared):
    dataset = LeRobotDataset(shared / "data/bridge_sample")
    assert (dataset.n_frames, len(dataset), len(dataset.episodes), dataset.dof) == (200, 200, 20, 7)
    assert (dataset.fps, dataset.robot_type) == (5, "widowx")
    assert dataset.action_names == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    assert dataset.camera_names == dataset.cameras == tuple(f"observation.images.image_{i}" for i in range(3))
    assert dataset.episodes[1] == Episode(1, 10, 20, "flip pot upright which is in sink")
    counts = {text: sum(e.instruction == text for e in dataset.episodes) for text in dataset.instructions}
    assert counts == {
        "flip pot upright which is in sink": 4,
        "put carrot on plate": 6,
        "put cup from counter or drying rack into sink": 5,
        "turn lever vertical to front": 5,
    }
    assert dataset.instruction(199) == "turn lever vertical to front"


def test_the_real_numbers_have_the_published_statistics(shared):
    dataset = LeRobotDataset(shared / "data/bridge_sample")
    published = {
        "min": [-0.01902, -0.02927, -0.02046, -0.15955, -0.09305, -0.25427, 0],
        "q01": [-0.01751, -0.02121, -0.01869, -0.15162, -0.08684, -0.07522, 0],
        "mean": [0.00151, -0.00156, -0.00358, -0.01415, -0.00347, -0.00127, 0.7448],
        "std": [0.00598, 0.00582, 0.00763, 0.03646, 0.02533, 0.0281, 0.43055],
        "q99": [0.01649, 0.00956, 0.02222, 0.05193, 0.04507, 0.05122, 1],
        "max": [0.018, 0.0122, 0.02887, 0.06869, 0.04913, 0.06741, 1],
    }
    actions, states = dataset.actions, dataset.states
    assert actions.dtype == states.dtype == np.float64
    found = {"min": actions.min(0), "mean": actions.mean(0), "std": actions.std(0), "max": actions.max(0)}
    found |= {"q01": np.quantile(actions, 0.01, axis=0), "q99": np.quantile(actions, 0.99, axis=0)}
    for name, values in published.items():
        np.testing.assert_allclose(found[name], values, atol=5.1e-6, err_msg=name)
    gripper = actions[:, 6]
    assert [(gripper == 0).sum(), (gripper == 1).sum(), ((gripper > 0) & (gripper < 1)).sum()] == [49, 145, 6]
    first = [episode.start for episode in dataset.episodes]
    assert np.abs(actions[first, :6]).max() < 7.7e-7
    np.testing.assert_allclose(
        states.mean(0), [0.27396, -0.02298, 0.15962, -0.05121, -0.20646, 0.00519, 0.9271], atol=5.1e-6
    )


def test_real_pictures_are_those_that_pil_decodes_from_the_raw_bytes(shared):
    root = shared / "data/bridge_sample"
    dataset = LeRobotDataset(root)
    table = pq.read_table(root / DATA)
    for row in (0, 9, 10, 117, 199, 3):
        for camera in dataset.cameras:
            raw = Image.open(io.BytesIO(table[camera][row]["bytes"].as_py())).convert("RGB")
            frame = dataset.frame(row, camera)
            assert frame.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(frame), np.asarray(raw))


def test_a_real_video_gives_the_same_frames_by_time_as_decoded_in_order(shared):
    av = pytest.importorskip("av")
    videos = shared / "data/groot_demo_v2/demo_data/robot_sim.PickNPlace/videos/chunk-000/observation.images.ego_view"
    path = videos / "episode_000004.mp4"
    with av.open(str(path)) as container:
        in_order = {i: frame.to_ndarray(format="rgb24") for i, frame in enumerate(container.decode(video=0)) if i < 60}
    reader = VideoReader(path)
    for i in (0, 1, 2, 3, 40, 41, 5, 4, 59, 0):
        np.testing.assert_array_equal(np.asarray(reader.frame(i / 20, 0.025)), in_order[i], err_msg=str(i))


# written sets


def test_rows_episodes_and_pictures_come_back(pristine):
    dataset = LeRobotDataset(pristine)
    rows = np.arange(11)
    assert dataset.actions.tolist() == [[row / 8, -row / 8] for row in range(11)]
    assert dataset.states.tolist() == (rows[:, None] / 4).tolist()
    assert dataset.episodes == (Episode(0, 0, 4, "push"), Episode(1, 4, 5, "lift"), Episode(2, 5, 11, "push"))
    assert dataset.instructions == ("push", "lift")
    for row in (10, 0, 4, 5, 3):
        np.testing.assert_array_equal(np.asarray(dataset.frame(row, "front")), picture(row, 0))
        np.testing.assert_array_equal(np.asarray(dataset.frame(row, "wrist")), picture(row, 1))


@pytest.mark.parametrize("row_group_size", [1, 3, 100])
def test_row_groups_may_be_cut_anywhere(broken, row_group_size):
    pq.write_table(pq.read_table(broken / DATA), broken / DATA, row_group_size=row_group_size)
    dataset = LeRobotDataset(broken)
    for row in range(11):
        np.testing.assert_array_equal(np.asarray(dataset.frame(row, "front")), picture(row))


def test_rows_and_pictures_run_through_several_data_files(tmp_path):
    dataset = LeRobotDataset(write_set(tmp_path / "set", cameras=("front",), data_files_size_in_mb=0))
    assert len(list((tmp_path / "set" / "data" / "chunk-000").iterdir())) == len(LENGTHS)
    assert dataset.actions[:, 0].tolist() == (np.arange(11) / 8).tolist()
    for row in (10, 3, 4, 5, 0):
        np.testing.assert_array_equal(np.asarray(dataset.frame(row, "front")), picture(row))


def test_episodes_may_stand_in_any_order_in_their_table(broken):
    expected = LeRobotDataset(broken).episodes
    pq.write_table(pq.read_table(broken / EPISODES).take([2, 0, 1]), broken / EPISODES)
    assert LeRobotDataset(broken).episodes == expected


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_pictures_are_the_same_however_few_are_kept(pristine, cache_bytes):
    images = ParquetImages([pristine / DATA], "observation.images.wrist", cache_bytes=cache_bytes)
    assert len(images) == 11
    for row in (10, 0, 9, 4, 4, 5, 3, 10):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(images.encoded(row)))), picture(row, 1))


def test_task_text_may_be_a_column_named_task(broken):
    path = broken / "meta" / "tasks.parquet"
    pq.write_table(pa.table({"task": ["lift", "push"], "task_index": [1, 0]}), path)
    assert LeRobotDataset(broken).instructions == ("push", "lift")


def test_lists_of_variable_type_and_plain_numbers_are_vectors_too(broken):
    edit_column(broken / DATA, "action", pa.array([[i, i + 0.5] for i in range(11)], pa.list_(pa.float64())))
    edit_column(broken / DATA, "observation.state", pa.array(range(11), pa.float32()))
    dataset = LeRobotDataset(broken)
    assert dataset.actions.tolist() == [[i, i + 0.5] for i in range(11)]
    assert dataset.states.tolist() == [[i] for i in range(11)]


def test_instruction_may_change_within_an_episode(broken):
    edit_column(broken / DATA, "task_index", pa.array([0, 0, 1, 1, 1] + [0] * 6))
    dataset = LeRobotDataset(broken)
    assert [dataset.instruction(row) for row in (0, 1, 2)] == ["push", "push", "lift"]
    assert dataset.episodes[0].instruction == "push"


def test_cameras_are_chosen_by_their_last_part_and_keep_the_order(pristine):
    dataset = LeRobotDataset(pristine, cameras=["wrist", "observation.images.front"])
    assert dataset.cameras == ("observation.images.wrist", "observation.images.front")
    assert dataset.camera_names == ("observation.images.front", "observation.images.wrist")
    assert LeRobotDataset(pristine, cameras="wrist").cameras == ("observation.images.wrist",)
    assert LeRobotDataset(pristine, cameras=[]).cameras == ()


def test_depth_maps_are_no_cameras(broken):
    features = json.loads((broken / "meta/info.json").read_text())["features"]
    depth = {"dtype": "video", "shape": [8, 8, 1], "names": None, "info": {"video.is_depth_map": True}}
    edit_info(broken, features=features | {"observation.images.depth": depth})
    assert LeRobotDataset(broken).camera_names == ("observation.images.front",)


def test_names_in_a_dict_are_read_and_those_of_a_wrong_number_are_none(broken):
    features = json.loads((broken / "meta/info.json").read_text())["features"]
    features["action"]["names"] = {"motors": ["a", "b"]}
    edit_info(broken, features=features)
    assert LeRobotDataset(broken).action_names == ["a", "b"]
    features["action"]["names"] = ["actions"]
    edit_info(broken, features=features)
    assert LeRobotDataset(broken).action_names is None


def test_states_are_none_where_there_are_none_or_none_are_wanted(tmp_path, pristine):
    assert LeRobotDataset(pristine, state_key=None).states is None
    with LeRobotWriter(tmp_path / "set", fps=5, robot_type="arm", action_names=["x"]) as writer:
        writer.add_episode("push", np.zeros((2, 1)))
    assert LeRobotDataset(tmp_path / "set").states is None


def test_numbers_are_read_without_pictures_and_videos(broken, pristine_video, tmp_path):
    nothing = pa.array([{"bytes": None, "path": None}] * 11, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    edit_column(broken / DATA, "observation.images.front", nothing)
    dataset = LeRobotDataset(broken)
    assert dataset.actions.shape == (11, 2)
    refusal(lambda: dataset.frame(4, "front"), "row 4", "no picture")
    for part in ("meta", "data"):  # the same set without its videos
        (tmp_path / "no_videos").mkdir(exist_ok=True)
        (tmp_path / "no_videos" / part).symlink_to(pristine_video / part)
    dataset = LeRobotDataset(tmp_path / "no_videos")
    assert dataset.actions.shape == (11, 2)
    refusal(lambda: dataset.frame(0, "front"), "file-000.mp4 is missing")


# videos


def test_video_frames_are_the_same_in_any_order(pristine_video):
    av = pytest.importorskip("av")
    dataset = LeRobotDataset(pristine_video)
    with av.open(str(pristine_video / "videos/observation.images.front/chunk-000/file-000.mp4")) as container:
        in_order = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(in_order) == 11
    for row in (*range(11), 10, 3, 9, 0, 0, 5, 4):
        frame = np.asarray(dataset.frame(row, "front"))
        np.testing.assert_array_equal(frame, in_order[row])
        assert np.abs(frame - picture(row).astype(int)).mean() < 4


def test_leaps_through_a_longer_video_give_the_frames_of_it_decoded_in_order(noise_video):
    av = pytest.importorskip("av")
    dataset = LeRobotDataset(noise_video)
    with av.open(str(noise_video / "videos/observation.images.front/chunk-000/file-000.mp4")) as container:
        in_order = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for row in (3, 30, 20, 5, 6, 50, 31, *np.random.default_rng(0).integers(0, 60, 60)):
        np.testing.assert_array_equal(np.asarray(dataset.frame(row, "front")), in_order[row], err_msg=str(row))


def test_videos_run_through_several_files(tmp_path):
    root = write_set(tmp_path / "set", cameras=("front",), video=True, video_files_size_in_mb=0)
    assert len(list((root / "videos/observation.images.front/chunk-000").iterdir())) == len(LENGTHS)
    dataset = LeRobotDataset(root)
    for row in (10, 0, 4, 5, 3):
        assert np.abs(np.asarray(dataset.frame(row, "front")) - picture(row).astype(int)).mean() < 4


def test_video_cut_short_raises(tmp_path):
    root = write_set(tmp_path / "set", cameras=("front",), video=True)
    path = root / "videos/observation.images.front/chunk-000/file-000.mp4"
    video = VideoWriter(path, fps=10, shape=(32, 48, 3))
    for row in range(8):
        video.append(picture(row))
    video.close()
    dataset = LeRobotDataset(root)
    dataset.frame(7, "front")
    refusal(lambda: dataset.frame(8, "front"), path, "0.0500 s of 0.8000 s", "0.7000 s")
    refusal(lambda: dataset.frame(10, "front"), "1.0000 s", "0.7000 s")
    path.write_bytes(b"no video")
    refusal(lambda: LeRobotDataset(root).frame(0, "front"), path, "cannot be decoded")


def test_row_beyond_the_end_of_its_episode_in_the_video_raises(tmp_path):
    root = write_set(tmp_path / "set", cameras=("front",), video=True)
    edit_column(root / EPISODES, "videos/observation.images.front/to_timestamp", pa.array([0.2, 0.5, 1.1]))
    dataset = LeRobotDataset(root)
    dataset.frame(2, "front")
    refusal(lambda: dataset.frame(3, "front"), "episode 0 step 3", "0.3000", "ends there at 0.2000")


def test_place_of_the_video_unknown_raises(tmp_path):
    root = write_set(tmp_path / "set", cameras=("front",), video=True)
    pq.write_table(
        pq.read_table(root / EPISODES).drop(["videos/observation.images.front/file_index"]), root / EPISODES
    )
    refusal(lambda: LeRobotDataset(root).frame(3, "front"), "episode 0 step 3", "front/file_index", "meta/episodes")


# processes


def mean_red(dataset, row):
    return float(np.asarray(dataset.frame(row, "front"))[..., 0].mean())


def work(dataset, rows, queue):
    queue.put([mean_red(dataset, row) for row in rows])


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("kind", ["pristine", "noise_video"])
def test_forked_workers_and_pickles_read_the_same_pictures(kind, request):
    dataset = LeRobotDataset(request.getfixturevalue(kind))
    rows = np.random.default_rng(0).integers(0, len(dataset), 40).tolist()
    expected = [mean_red(dataset, row) for row in rows]  # leaves files open, at some place, in the parent
    clone = pickle.loads(pickle.dumps(dataset))
    assert [mean_red(clone, row) for row in rows] == expected
    context = multiprocessing.get_context("fork")
    queues = [context.Queue() for _ in range(3)]
    workers = [context.Process(target=work, args=(dataset, rows, queue), daemon=True) for queue in queues]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=20) for queue in queues] == [expected] * 3
    for worker in workers:
        worker.join(timeout=20)
    assert [mean_red(dataset, row) for row in rows] == expected


def test_parquet_and_video_libraries_are_imported_only_when_data_are_opened(tmp_path):
    code = (
        "import sys; import hf_vla_actions.data as data; "
        "assert not {'pyarrow', 'av', 'torch'} & set(sys.modules); "
        f"sys.modules['pyarrow'] = None; data.LeRobotDataset({str(tmp_path)!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.strip().splitlines()[-1] == (
        "ImportError: LeRobot data need pyarrow, which is missing: pip install 'hf_vla_actions[data]'"
    )


# refusals


def test_folder_that_is_no_dataset_raises(tmp_path, pristine):
    refusal(lambda: LeRobotDataset(tmp_path / "a" / "b"), tmp_path / "a" / "b", "does not exist", tmp_path, "is empty")
    (tmp_path / "readme.txt").write_text("hello")
    refusal(lambda: LeRobotDataset(tmp_path / "a"), "does not exist", "holds ['readme.txt']")
    refusal(lambda: LeRobotDataset(tmp_path), "no meta/info.json", "holds ['readme.txt']")
    refusal(lambda: LeRobotDataset(tmp_path / "readme.txt"), "is a file")
    refusal(lambda: LeRobotDataset(pristine.parent), f"did you mean {pristine}?")


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v4.0", "v30"])
def test_other_version_raises(broken, version):
    edit_info(broken, codebase_version=version)
    refusal(lambda: LeRobotDataset(broken), f"LeRobotDataset {version}, this class reads v3.0", "open_dataset")


def test_the_real_v2_set_raises(shared):
    root = shared / "data/groot_demo_v2/demo_data/robot_sim.PickNPlace"
    refusal(lambda: LeRobotDataset(root), "v2.0", "this class reads v3.0", "open_dataset")


def test_info_that_is_no_json_or_lacks_something_raises(broken):
    edit_info(broken, fps=None)
    refusal(lambda: LeRobotDataset(broken), "info.json lacks ['fps']")
    (broken / "meta/info.json").write_text("[]")
    refusal(lambda: LeRobotDataset(broken), "JSON object, got list")
    (broken / "meta/info.json").write_text("{")
    refusal(lambda: LeRobotDataset(broken), "info.json is not valid JSON")


def test_empty_dataset_raises(broken):
    path = broken / EPISODES
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    edit_info(broken, total_episodes=0, total_frames=0)
    refusal(lambda: LeRobotDataset(broken), broken, "is empty: 0 episodes, 0 frames")


@pytest.mark.parametrize("name", [DATA, EPISODES, "meta/tasks.parquet"])
def test_missing_or_corrupt_parquet_raises(broken, name):
    content = (broken / name).read_bytes()
    (broken / name).write_bytes(content[:-20])
    refusal(lambda: LeRobotDataset(broken), broken / name, "cannot be read as parquet")
    (broken / name).write_bytes(b"")
    refusal(lambda: LeRobotDataset(broken), broken / name, "cannot be read as parquet")
    (broken / name).unlink()
    refusal(lambda: LeRobotDataset(broken), name.split("/")[1])


def test_parquet_with_damaged_pages_raises(broken):
    content = bytearray((broken / DATA).read_bytes())
    group = pq.ParquetFile(broken / DATA).metadata.row_group(1)
    column = next(group.column(i) for i in range(group.num_columns) if "action" in group.column(i).path_in_schema)
    start = column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (broken / DATA).write_bytes(content)
    refusal(lambda: LeRobotDataset(broken), broken / DATA, "cannot be read as parquet")


def test_missing_column_raises(broken):
    pq.write_table(pq.read_table(broken / DATA).drop(["action"]), broken / DATA)
    refusal(lambda: LeRobotDataset(broken), broken / DATA, "no column 'action'", "task_index")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_action_that_is_not_finite_raises(broken, value):
    rows = [[0.0, 1.0] for _ in range(11)]
    rows[7][1] = value
    edit_column(broken / DATA, "action", pa.array(rows, pa.list_(pa.float32(), 2)))
    refusal(lambda: LeRobotDataset(broken), "'action' of episode 2 step 2", "not finite", value)


def test_all_rows_that_are_not_finite_are_named_raises(broken):
    rows = [[np.nan if step in (1, 7, 9) else 0.0, 1.0] for step in range(11)]
    edit_column(broken / DATA, "action", pa.array(rows, pa.list_(pa.float32(), 2)))
    first = "'action' of episode 0 step 1"
    refusal(lambda: LeRobotDataset(broken), first, "2 more rows: episode 2 step 2, episode 2 step 4)")


def test_state_that_is_not_finite_raises_unless_states_are_left_out(broken):
    edit_column(broken / DATA, "observation.state", pa.array([0.0] * 10 + [np.nan]))
    refusal(lambda: LeRobotDataset(broken), "'observation.state' of episode 2 step 5", "state_key=None")
    assert LeRobotDataset(broken, state_key=None).states is None


def test_actions_of_differing_length_raise(broken):
    rows = [[0.0, 1.0] for _ in range(11)]
    rows[4] = [0.0, 1.0, 2.0]
    edit_column(broken / DATA, "action", pa.array(rows))
    refusal(lambda: LeRobotDataset(broken), "'action' of episode 1 step 0", "length 3, expected 2")
    rows[4] = None
    edit_column(broken / DATA, "action", pa.array(rows, pa.list_(pa.float32(), 2)))
    refusal(lambda: LeRobotDataset(broken), "'action' of episode 1 step 0", "expected 2")
    edit_column(broken / DATA, "action", pa.array(["a"] * 11))
    refusal(lambda: LeRobotDataset(broken), "'action'", "column of type string")


def test_counts_that_differ_from_info_raise(broken):
    edit_info(broken, total_frames=12)
    refusal(lambda: LeRobotDataset(broken), "says 12 frames", "have 11")
    edit_info(broken, total_frames=11, total_episodes=4)
    refusal(lambda: LeRobotDataset(broken), "says 4 episodes", "has 3")


def test_episodes_that_do_not_fit_their_rows_raise(broken):
    path = broken / EPISODES
    edit_column(path, "dataset_to_index", pa.array([4, 5, 10]))
    refusal(lambda: LeRobotDataset(broken), "rows 10 to 11 are in no episode")
    edit_column(path, "dataset_to_index", pa.array([3, 5, 11]))
    refusal(lambda: LeRobotDataset(broken), "episode 1 the rows 4 to 5", "starts at 3")
    edit_column(path, "dataset_from_index", pa.array([0, 3, 5]))
    refusal(lambda: LeRobotDataset(broken), "rows 3 to 5 to episode 1", "[0, 1]")


def test_rows_out_of_order_raise(broken):
    stamps = pq.read_table(broken / DATA)["timestamp"].to_pylist()
    stamps[7], stamps[8] = stamps[8], stamps[7]
    edit_column(broken / DATA, "timestamp", pa.array(stamps, pa.float32()))
    refusal(lambda: LeRobotDataset(broken), "timestamps", "episode 2 step 3")


def test_task_without_text_raises(broken):
    edit_column(broken / DATA, "task_index", pa.array([0] * 10 + [7]))
    refusal(lambda: LeRobotDataset(broken), "tasks.parquet", "[7]", "[0, 1]")
    pq.write_table(pa.table({"task_index": [0, 1]}), broken / "meta/tasks.parquet")
    refusal(lambda: LeRobotDataset(broken), "tasks.parquet", "no text")


def test_empty_cells_raise(broken):
    edit_column(broken / DATA, "task_index", pa.array([0] * 10 + [None], pa.int64()))
    refusal(lambda: LeRobotDataset(broken), "'task_index' has 1 empty cells")


def test_unknown_or_ambiguous_names_raise(tmp_path, pristine):
    words = ("'frnt'", "observation.images.wrist", "did you mean 'observation.images.front'?")
    refusal(lambda: LeRobotDataset(pristine, cameras=["frnt"]), "camera", *words)
    refusal(lambda: LeRobotDataset(pristine).frame(0, "frnt"), "camera", *words)
    refusal(lambda: LeRobotDataset(pristine, action_key="actions"), "action_key 'actions'", "did you mean 'action'?")
    refusal(lambda: LeRobotDataset(pristine, action_key="timestamp"), "action_key 'timestamp'")
    refusal(lambda: LeRobotDataset(pristine, state_key="observation.stat"), "state_key", "'observation.state'?")
    root = write_set(tmp_path / "set", cameras=("left.rgb", "right.rgb"))
    refusal(lambda: LeRobotDataset(root, cameras=["rgb"]), "ambiguous", "['left.rgb', 'right.rgb']")


@pytest.mark.parametrize("row", [-1, 11])
def test_row_out_of_range_raises(pristine, row):
    dataset = LeRobotDataset(pristine)
    refusal(lambda: dataset.frame(row, "front"), f"row {row} ", "rows 0 to 10")
    refusal(lambda: dataset.instruction(row), f"row {row} ")


def test_bytes_that_are_no_picture_raise(broken):
    cells = [{"bytes": b"not a picture", "path": None}] * 11
    column = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    edit_column(broken / DATA, "observation.images.front", column)
    message = refusal(lambda: LeRobotDataset(broken).frame(6, "front"), "episode 2 step 1", "is no picture")
    assert re.search(r"front' of episode 2 step 1 in .*set", message)
