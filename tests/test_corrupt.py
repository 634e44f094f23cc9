"""Damaged datasets: each fault is refused with its place, and nothing is skipped or patched up in silence."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_lerobot import DATA, edit_column, edit_info, picture, refusal, write_set
from test_lerobot_v2 import DATA as DATA_V2
from test_lerobot_v2 import VIDEO, write_v2, write_video

from hf_vla_actions.data import open_dataset
from hf_vla_actions.data.video import VideoReader
from hf_vla_actions.errors import DatasetError


@pytest.fixture
def v3(tmp_path):
    return write_set(tmp_path / "v3", cameras=("front",))


@pytest.fixture
def v2(tmp_path):
    return write_v2(tmp_path / "v2")


def chunk_of(path, group, column):
    """First and last byte of a column in one row group."""
    facts = pq.ParquetFile(path).metadata.row_group(group)
    chunk = next(c for c in map(facts.column, range(facts.num_columns)) if c.path_in_schema.startswith(column))
    return chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def content(dataset):
    pictures = [[np.asarray(dataset.frame(row, c)).tobytes() for c in dataset.cameras] for row in range(len(dataset))]
    return dataset.actions.tolist(), dataset.states.tolist(), dataset.timestamps.tolist(), dataset.episodes, pictures


# parquet


def test_any_flipped_bit_in_the_pages_that_were_written_here_is_found(v3):
    whole, good = (v3 / DATA).read_bytes(), content(open_dataset(v3))
    end = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8  # where the footer begins
    messages = []
    for position in np.random.default_rng(0).integers(4, end, 60).tolist():
        flip(v3 / DATA, position, position % 8)
        try:
            assert content(open_dataset(v3)) == good, position  # a column that nobody reads
        except DatasetError as error:
            messages.append(str(error))
        (v3 / DATA).write_bytes(whole)
    assert len(messages) > 20
    assert all(str(v3 / DATA) in message for message in messages)


def test_a_damaged_number_is_named_by_row_group_column_and_bytes(v3):
    start, stop = chunk_of(v3 / DATA, 2, "action")
    flip(v3 / DATA, (start + stop) // 2)
    words = ("row group 2 (rows 5 to 11)", "column 'action'", f"bytes {start} to {stop}")
    refusal(lambda: open_dataset(v3), v3 / DATA, *words)


def test_a_damaged_picture_is_named_by_row_group_and_leaves_the_others(v3):
    flip(v3 / DATA, chunk_of(v3 / DATA, 1, "observation.images.front.bytes")[1] - 20)
    dataset = open_dataset(v3)
    dataset.frame(3, "front")
    refusal(lambda: dataset.frame(4, "front"), v3 / DATA, "row group 1 (rows 4 to 5)", "observation.images.front")
    refusal(lambda: dataset.frame(4, "front"), "row group 1")  # again
    assert np.array_equal(dataset.frame(5, "front"), picture(5))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_file_in_a_picture_cell_is_named_by_row(v3, damage):
    cells = pq.read_table(v3 / DATA)["observation.images.front"].to_pylist()
    raw = bytearray(cells[7]["bytes"])
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
    cells[7]["bytes"] = bytes(raw if damage == "flip" else raw[: len(raw) // 2])
    column = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    edit_column(v3 / DATA, "observation.images.front", column)
    dataset = open_dataset(v3)
    refusal(lambda: dataset.frame(7, "front"), "episode 2 step 2", v3 / DATA, "row group 0, row 7", "is no picture")


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_a_truncated_file_is_named(v2, keep):
    data = (v2 / DATA_V2).read_bytes()
    (v2 / DATA_V2).write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    refusal(lambda: open_dataset(v2), v2 / DATA_V2, "cannot be read as parquet")


def test_a_missing_episode_is_named(v2):
    (v2 / DATA_V2).unlink()
    refusal(lambda: open_dataset(v2), v2 / DATA_V2, "missing")


def test_episodes_of_another_length_or_number_are_named(v2):
    table = pq.read_table(v2 / DATA_V2)
    pq.write_table(table.slice(0, 5), v2 / DATA_V2)
    refusal(lambda: open_dataset(v2), v2 / DATA_V2, "has 5 rows", "episode 2 the length 6")
    pq.write_table(table, v2 / DATA_V2)
    edit_column(v2 / DATA_V2, "episode_index", pa.array([2, 2, 2, 1, 2, 2]))
    refusal(lambda: open_dataset(v2), "rows 5 to 11 to episode 2", "[1, 2]")


def test_vectors_and_times_that_are_wrong_are_named_by_step(v2):
    rows = [[0.0, 1.0] for _ in range(6)]
    rows[4] = [0.0, float("nan")]
    good = pq.read_table(v2 / DATA_V2)
    edit_column(v2 / DATA_V2, "action", pa.array(rows, pa.list_(pa.float32())))
    refusal(lambda: open_dataset(v2), "'action' of episode 2 step 4", "not finite")
    rows[4] = [0.0]
    edit_column(v2 / DATA_V2, "action", pa.array(rows, pa.list_(pa.float32())))
    refusal(lambda: open_dataset(v2), "'action' of episode 2 step 4", "length 1, expected 2")
    for times, step in (([0, 0.1, 0.2, 0.2, 0.4, 0.5], 3), ([0, 0.1, np.nan, 0.3, 0.4, 0.5], 2)):
        pq.write_table(good, v2 / DATA_V2)
        edit_column(v2 / DATA_V2, "timestamp", pa.array(times, pa.float32()))
        refusal(lambda: open_dataset(v2), "timestamps", f"episode 2 step {step}")


def test_the_very_first_time_must_be_a_number_too(v2):
    path = v2 / "data/chunk-000/episode_000000.parquet"
    edit_column(path, "timestamp", pa.array([np.nan, 0.1, 0.2, 0.3], pa.float32()))
    refusal(lambda: open_dataset(v2), "timestamps", "episode 0 step 0")


# tables of v2.x


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("episodes", '{"episode_index": 2, "leng', ("line 3", "not valid JSON")),
        ("episodes", '{"episode_index": 2}', ("line 3", "lacks ['length']")),
        ("episodes", "[2, 6]", ("line 3", "lacks ['episode_index', 'length']")),
        ("episodes", '{"episode_index": 1, "length": 6}', ("names an episode twice",)),
        ("episodes", '{"episode_index": 2, "length": 0}', ("episode 2 the length 0",)),
        ("episodes", '{"episode_index": 2, "length": "6"}', ("episode 2 the length '6'",)),
        ("episodes", "", ("says 3 episodes", "has 2")),
        ("tasks", '{"task_index": 2, "task": null}', ("line 3", "lacks ['task']")),
    ],
)
def test_lines_that_are_wrong_are_named(v2, name, line, words):
    path = v2 / f"meta/{name}.jsonl"
    path.write_text("\n".join([*path.read_text().splitlines()[:2], line]))
    refusal(lambda: open_dataset(v2), *words, path if "line 3" in words else v2)


def test_a_table_that_is_missing_or_no_text_is_named(v2):
    path = v2 / "meta/tasks.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[1:]))
    refusal(lambda: open_dataset(v2), path, "no text for the task indices [0]")
    path.write_bytes(b'{"task_index": 0, "task": "caf\xe9"}')
    refusal(lambda: open_dataset(v2), path, "no UTF-8 text from byte 30")
    path.unlink()
    refusal(lambda: open_dataset(v2), path, "missing")


def test_templates_that_cannot_be_filled_in_are_named(v2):
    edit_info(v2, data_path="data/{split}/{episode_index:06d}.parquet")
    refusal(lambda: open_dataset(v2), "info.json", "{split}", "'episode_chunk', 'episode_index'")
    edit_info(v2, data_path="data/{episode_index:zz}.parquet")
    refusal(lambda: open_dataset(v2), "info.json", "cannot be filled in")


# videos


def test_a_video_with_too_few_frames_is_named_at_its_first_use(v2):
    write_video(v2 / VIDEO, range(5, 10))
    dataset = open_dataset(v2)
    refusal(lambda: dataset.frame(5, "front"), v2 / VIDEO, "has 5 frames", "episode 2 has 6 steps")
    dataset.frame(4, "front")


def test_more_frames_than_steps_are_refused_only_where_it_is_unclear_which_belong_together(tmp_path):
    for name, first in (("zero", 0.0), ("later", 0.1)):
        root = write_v2(tmp_path / name, first=first)
        assert np.abs(np.asarray(open_dataset(root).frame(9, "front")) - picture(9).astype(int)).mean() < 4
        write_video(root / VIDEO, range(5, 13))
        dataset = open_dataset(root)
        if first:
            refusal(lambda d=dataset: d.frame(9, "front"), "has 8 frames", "6 steps", "0.1000 s", "cannot be known")
        else:
            assert np.abs(np.asarray(dataset.frame(9, "front")) - picture(9).astype(int)).mean() < 4


@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_a_truncated_video_is_named(v2, keep):
    data = (v2 / VIDEO).read_bytes()
    (v2 / VIDEO).write_bytes(data[: int(keep * len(data))])
    refusal(lambda: open_dataset(v2).frame(5, "front"), v2 / VIDEO, "cannot be decoded")


def test_flipped_bits_of_a_real_video_never_change_a_picture_in_silence(shared, tmp_path):
    av = pytest.importorskip("av")
    source = shared / "data/groot_demo_v2/demo_data/robot_sim.PickNPlace/videos/chunk-000/observation.images.ego_view"
    whole = (source / "episode_000004.mp4").read_bytes()
    with av.open(str(source / "episode_000004.mp4")) as container:
        frames = container.decode(video=0)
        good = [next(frames).to_ndarray(format="rgb24") for _ in range(60)]

    path = tmp_path / "flipped.mp4"
    messages = []
    for position in np.random.default_rng(1).integers(60_000, 140_000, 6).tolist():
        path.write_bytes(whole)
        flip(path, position, position % 8)
        reader = VideoReader(path)
        for step in range(60):
            try:
                assert np.array_equal(reader.frame(step / 20, 0.025), good[step]), (position, step)
            except DatasetError as error:
                messages.append(str(error))
    assert len(messages) > 60
    assert all(str(path) in message and "damaged at" in message for message in messages)


def test_bytes_that_break_a_videos_description_raise_nothing_else(v2):
    whole = (v2 / VIDEO).read_bytes()
    dataset_error = 0
    for position in range(len(whole) - 600, len(whole), 12):
        flip(v2 / VIDEO, position, 7)
        try:
            open_dataset(v2).frame(6, "front")
        except DatasetError:
            dataset_error += 1
        (v2 / VIDEO).write_bytes(whole)
    assert dataset_error > 5


# traps of real files


def test_files_may_lie_where_lerobot_puts_them_whatever_the_template_says(v2):
    edit_info(v2, data_path="data/chunk-{episode_index:03d}/episode_{episode_index:06d}.parquet", total_chunks=0)
    edit_info(v2, video_path="videos/chunk-{episode_index:03d}/{video_key}/episode_{episode_index:06d}.mp4")
    dataset = open_dataset(v2)
    assert dataset.actions[-1].tolist() == [10 / 8, -10 / 8]
    dataset.frame(10, "front")


def test_videos_that_were_not_fetched_are_an_error_where_a_picture_is_asked_for(v2, caplog):
    for file in (v2 / "videos").rglob("*.mp4"):
        file.unlink()
    dataset = open_dataset(v2)
    assert dataset.cameras == ("front",)
    assert "no file" in caplog.text
    refusal(lambda: dataset.frame(0, "front"), "episode_000000.mp4 is missing")
    refusal(lambda: open_dataset(v2, cameras=["front"]), "has no file", "[]")


def test_depth_maps_of_v2_are_no_cameras(v2):
    info = json.loads((v2 / "meta/info.json").read_text())
    depth = {"dtype": "video", "shape": [8, 8, 1], "names": None, "video_info": {"video.is_depth_map": True}}
    edit_info(v2, features=info["features"] | {"depth": depth})
    assert open_dataset(v2).camera_names == ("front",)


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ({"arm": {"start": 0, "end": 2}}, ["arm.0", "arm.1"]),
        ({"arm": {"start": 0, "end": 1}, "gripper": {"start": 1, "end": 2}}, ["arm", "gripper"]),
        ({"gripper": {"start": 1, "end": 2}}, ["x", "gripper"]),
        ({"arm": {"start": 0, "end": 2, "original_key": "other"}}, ["x", "y"]),
        ({"arm": {"start": 0, "end": 2}, "both": {"start": 1, "end": 2}}, ["x", "y"]),
        ({}, ["x", "y"]),
    ],
)
def test_groups_of_modality_json_name_the_dimensions(v2, groups, names):
    (v2 / "meta/modality.json").write_text(json.dumps({"action": groups}))
    assert open_dataset(v2).action_names == names


@pytest.mark.parametrize(
    "place", [{"start": 0, "end": 3}, {"start": 1, "end": 1}, {"start": -1, "end": 2}, {"end": 2}]
)
def test_groups_beyond_the_dimensions_raise(v2, place):
    (v2 / "meta/modality.json").write_text(json.dumps({"action": {"arm": place}}))
    refusal(lambda: open_dataset(v2), "modality.json", "'arm'", "'action' has 2")
